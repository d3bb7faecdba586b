"""What is read while libraries are being imported: the right files, wholly, and nothing is said about what is wrong."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

import intern.readahead
from intern.readahead import MADE_OF, _read, read_ahead

TINY = str(ROOT / "data/tiny_llama3")


def entry(cache, name, base, used, sizes=(40, 2)):
    folder = cache / name
    folder.mkdir(parents=True)
    (folder / MADE_OF).write_text(base)
    for index, size in enumerate(sizes):
        (folder / f"model-{index}.safetensors").write_bytes(bytes(size * 2**20))
    os.utime(folder, (used, used))
    return folder


@pytest.fixture
def read(monkeypatch):
    """The threads' work, done at once: what was read of which files."""
    done = []

    class Thread:
        def __init__(self, target, args, daemon):
            assert daemon  # a command that ends early does not wait
            self.start = lambda: done.append((args[0], target(*args)))

    monkeypatch.setattr(intern.readahead.threading, "Thread", Thread)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return done


def configuration(cache, name="data/tiny_llama3"):
    return OmegaConf.create({"model": {"pretrained_model_name_or_path": name, "quantized_cache": str(cache)}})


def test_the_entry_of_this_base_that_was_used_last_is_read_wholly(tmp_path, read):
    entry(tmp_path, "a" * 32, TINY, used=100)
    wanted = entry(tmp_path, "b" * 32, TINY, used=200)
    entry(tmp_path, "c" * 32, "another/base", used=300)
    read_ahead(configuration(tmp_path))
    assert read == [(sorted(wanted.glob("*.safetensors")), 42 * 2**20)]
    read.clear()
    read_ahead(configuration(tmp_path, name="another/base"))
    assert [files[0].parent.name for files, _ in read] == ["c" * 32]


@pytest.mark.parametrize("case", ["no cache", "no folder", "no model", "a mark that is a folder", "imported"])
def test_where_there_is_nothing_to_read_nothing_is_read_or_said(case, tmp_path, read, monkeypatch, capfd):
    cfg = configuration(tmp_path / "cache")
    if case == "no cache":
        cfg.model.quantized_cache = None
    if case == "no model":
        cfg = OmegaConf.create({"model": "${nowhere}"})
    if case == "a mark that is a folder":
        (tmp_path / "cache" / "x" / MADE_OF).mkdir(parents=True)
    if case == "imported":
        entry(tmp_path / "cache", "a" * 32, TINY, used=100)
        monkeypatch.setitem(sys.modules, "torch", object())
    read_ahead(cfg)
    assert sum(count for _, count in read) == 0
    assert capfd.readouterr() == ("", "")


def test_a_file_that_goes_while_it_is_read_ends_the_reading(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    assert _read([tmp_path / "a", tmp_path / "gone", tmp_path / "a"]) == 10


@pytest.mark.parametrize("name", ["train", "query"])
def test_commands_begin_it_before_they_import_what_is_heavy(name, trained_run, tmp_path):
    arguments = {
        "train": ["experiment=tiny_cpu", f"hydra.run.dir={tmp_path}"],
        "query": [f"run_dir={trained_run}", "question=Why?", f"hydra.run.dir={tmp_path}"],
    }[name]
    code = (
        f"import sys; sys.argv[1:] = {arguments}\nimport intern.{name} as m\n"
        "m.read_ahead = lambda cfg: sys.exit(33 if cfg.model and 'torch' not in sys.modules else 34)\nm.main()"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 33
