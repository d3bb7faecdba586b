"""A packed run is one file with what a colleague needs to ask it, and nothing else of its machine."""

import shutil
import tarfile
import time
import zipfile

import pytest
import yaml

from intern.errors import UserError
from intern.inference.answer import query_intern
from intern.runs.directory import Run
from intern.runs.find import resolve
from intern.runs.pack import folder_name, pack

NEEDED = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/tokenizer.json"}
NEEDED |= {"config.yaml", "metrics.json", "prompt.json", "environment.json", "history.jsonl", "loss.png"}


def unpacked(archive, folder):
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    else:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    [run] = folder.iterdir()
    return run


def written(archive, name):
    """When a packed file was written, in seconds; zip files hold local time in steps of two seconds."""
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            return time.mktime((*file.getinfo(name).date_time, 0, 0, -1))
    with tarfile.open(archive) as file:
        return file.getmember(name).mtime


@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_the_receiver_asks_the_unpacked_run_and_gets_the_same_answer(trained_run, tmp_path, ending):
    archive = tmp_path / f"share.{ending}"
    members = pack(Run(trained_run), "first try", archive)
    (tmp_path / "there").mkdir()
    run = unpacked(archive, tmp_path / "there")
    assert run.name == "first-try" and {f"first-try/{name}" for name in NEEDED} <= set(members)
    found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {f"first-try/{name}" for name in found} == set(members)
    assert not [name for name in found if name.startswith(("checkpoints", "wandb", ".hydra", "evaluation"))]
    asked = "How much did Uber's gross bookings grow in 2024?"
    assert query_intern(asked, run_dir=run) == query_intern(asked, run_dir=trained_run)
    assert abs(written(archive, "first-try/metrics.json") - Run(trained_run).metrics.stat().st_mtime) <= 2
    assert resolve(run).score() == Run(trained_run).score()


def test_two_archives_of_a_run_have_the_same_names(trained_run, tmp_path):
    first, second = (pack(Run(trained_run), "a/b c", tmp_path / name) for name in ("1.zip", "2.tgz"))
    assert first == second and first[0].startswith("a-b-c/")


def test_nothing_is_overwritten_and_nothing_unfinished_is_packed(trained_run, tmp_path):
    (tmp_path / "taken.zip").write_text("mine")
    (tmp_path / "linked.zip").symlink_to(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    for out, message in (
        ("taken.zip", "exists already"),
        ("linked.zip", "exists already"),
        ("run.rar", r"must end with \.zip, \.tar\.gz or \.tgz"),
        ("no/folder.zip", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            pack(Run(trained_run), "x", tmp_path / out)
    with pytest.raises(UserError, match="is not finished"):
        pack(Run(tmp_path / "run"), "x", tmp_path / "new.zip")
    assert (tmp_path / "taken.zip").read_text() == "mine" and sorted(path.name for path in tmp_path.iterdir()) == [
        "linked.zip",
        "run",
        "taken.zip",
    ]


def test_credentials_and_the_command_line_stay_here(trained_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained_run, copy, ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["trainer"]["hub_token"] = "hf_SECRET"
    config["logger"]["api_key"] = "SECRET"
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    (copy / "adapter" / "training_args.bin").write_bytes(b"pickle")
    pack(Run(copy), "x", tmp_path / "x.zip")
    (tmp_path / "there").mkdir()
    run = unpacked(tmp_path / "x.zip", tmp_path / "there")
    text = "".join(path.read_text(errors="replace") for path in run.rglob("*") if path.suffix in (".yaml", ".json"))
    assert "SECRET" not in text and '"command"' not in text and "hub_token" in text
    assert not (run / "adapter" / "training_args.bin").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["lora"] == config["lora"]


def test_a_link_in_a_run_is_not_packed(trained_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained_run, copy, ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    (tmp_path / "secret").write_text("x")
    (copy / "adapter" / "tokenizer.json").unlink()
    (copy / "adapter" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"tokenizer\.json: is a link"):
        pack(Run(copy), "x", tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists() and not list(tmp_path.glob(".x.zip*"))


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("first try", "first-try"),
        ("../..", "run"),
        ("2025-01-31/10-15-00", "2025-01-31-10-15-00"),
        ("Läufe r=8", "Läufe-r=8"),
    ],
)
def test_the_folders_name_is_good_on_any_system(name, folder):
    assert folder_name(name) == folder
