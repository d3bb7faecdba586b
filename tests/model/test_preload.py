"""While libraries are imported the right files are read completely, and nothing is printed about what is wrong."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT
from omegaconf import OmegaConf

import intern.model.preload
from intern.model.preload import BASE_FILE, _read, importing

TINY = str(ROOT / "data/tiny_llama3")


def entry(cache, name, base, used, sizes=(40, 2)):
    folder = cache / name
    folder.mkdir(parents=True)
    (folder / BASE_FILE).write_text(base)
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

    monkeypatch.setattr(intern.model.preload.threading, "Thread", Thread)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return done


def start(cfg):
    with importing(cfg):
        pass


@pytest.fixture(autouse=True)
def thawed():
    yield
    gc.unfreeze()


def configuration(cache, name="data/tiny_llama3"):
    return OmegaConf.create({"model": {"pretrained_model_name_or_path": name, "quantized_cache": str(cache)}})


def test_the_entry_of_this_base_that_was_used_last_is_read_wholly(tmp_path, read):
    entry(tmp_path, "a" * 32, TINY, used=100)
    wanted = entry(tmp_path, "b" * 32, TINY, used=200)
    entry(tmp_path, "c" * 32, "another/base", used=300)
    start(configuration(tmp_path))
    assert read == [(sorted(wanted.glob("*.safetensors")), 42 * 2**20)]
    read.clear()
    start(configuration(tmp_path, name="another/base"))
    assert [files[0].parent.name for files, _ in read] == ["c" * 32]


@pytest.mark.parametrize("case", ["no cache", "no folder", "no model", "a mark that is a folder", "imported"])
def test_where_there_is_nothing_to_read_nothing_is_read_or_said(case, tmp_path, read, monkeypatch, capfd):
    cfg = configuration(tmp_path / "cache")
    if case == "no cache":
        cfg.model.quantized_cache = None
    if case == "no model":
        cfg = OmegaConf.create({"model": "${nowhere}"})
    if case == "a mark that is a folder":
        (tmp_path / "cache" / "x" / BASE_FILE).mkdir(parents=True)
    if case == "imported":
        entry(tmp_path / "cache", "a" * 32, TINY, used=100)
        monkeypatch.setitem(sys.modules, "torch", object())
    start(cfg)
    start(None)
    assert sum(count for _, count in read) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["pipe", "endless device", "huge", "link", "no text"])
def test_a_cache_with_something_else_in_place_of_a_name_is_not_read(kind, tmp_path, read, capfd):
    folder = entry(tmp_path / "cache", "a" * 32, TINY, used=100)
    mark = folder / BASE_FILE
    mark.unlink()
    if kind == "pipe":
        os.mkfifo(mark)
    elif kind == "huge":
        mark.touch()
        os.truncate(mark, 2**40)
    elif kind == "no text":
        mark.write_bytes(b"\xff\xfe")
    else:
        (tmp_path / "name").write_text(TINY)
        mark.symlink_to("/dev/zero" if kind == "endless device" else tmp_path / "name")
    start(configuration(tmp_path / "cache"))
    assert read == [([], 0)] and capfd.readouterr() == ("", "")


def test_weights_of_the_cache_that_are_no_regular_files_are_not_read(tmp_path, read):
    folder = entry(tmp_path, "a" * 32, TINY, used=100, sizes=(1,))
    os.mkfifo(folder / "b.safetensors")
    (folder / "c.safetensors").symlink_to("/dev/zero")
    start(configuration(tmp_path))
    assert read == [([folder / "model-0.safetensors"], 2**20)]


def test_a_query_does_not_read_ahead_where_the_run_says(trained_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained_run, copy, ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    cfg = OmegaConf.load(copy / "config.yaml")
    cfg.model.quantized_cache = str(tmp_path)
    OmegaConf.save(cfg, copy / "config.yaml")
    code = (
        f"import sys; sys.argv[1:] = {[f'run_dir={copy}', 'question=Why?']}\nimport intern.query as m\n"
        "m.importing = lambda cfg: sys.exit(33 if cfg.model.quantized_cache == '~/.cache/intern/quantized' else 34)\nm.main()"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 33


def test_a_file_that_goes_while_it_is_read_ends_the_reading(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    assert _read([tmp_path / "a", tmp_path / "gone", tmp_path / "a"]) == 10


@pytest.mark.parametrize("failure", [None, ImportError])
def test_the_garbage_collector_rests_and_then_leaves_out_what_was_imported(failure, tmp_path, read):
    with contextlib.suppress(ImportError), importing(configuration(tmp_path)):
        assert not gc.isenabled()
        if failure is not None:
            raise failure
    assert gc.isenabled() and gc.get_freeze_count() > 10_000


def test_a_second_job_leaves_the_garbage_of_the_first_one_to_the_collector(tmp_path, read, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    with importing(configuration(tmp_path)):
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("name", ["train", "query", "preview", "doctor"])
def test_commands_begin_it_before_they_import_what_is_heavy(name, trained_run, tmp_path):
    asked = [f"run_dir={trained_run}", "question=Why?"] if name == "query" else ["experiment=tiny_cpu"]
    arguments = [*asked, f"hydra.run.dir={tmp_path}"]
    reads = name in ("train", "query")  # weights
    code = (
        f"import sys; sys.argv[1:] = {arguments}\nimport intern.{name} as m\n"
        f"m.importing = lambda *cfg: sys.exit(33 if len(cfg) == {reads} and 'torch' not in sys.modules else 34)\nm.main()"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 33
