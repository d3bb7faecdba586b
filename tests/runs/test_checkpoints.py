"""A checkpoint proves that it is as it was written: every damage to every file is found and named, without training anything."""

import errno
import hashlib
import importlib.util
import json
import os
import shutil

import pytest
import torch
from helpers import ROOT
from safetensors.torch import save_file

from intern.errors import UserError
from intern.runs.checkpoints import FORMAT, Kind, begin, examine, examine_all, seal
from intern.runs.directory import Run
from intern.training.resume import choose_checkpoint, set_aside

_SPEC = importlib.util.spec_from_file_location("damage_checkpoints", ROOT / "scripts" / "damage_checkpoints.py")
DAMAGING = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(DAMAGING)
DAMAGES = DAMAGING.DAMAGES
TENSORS = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")
FILES = (*TENSORS, "adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "training_args.bin", "manifest.json")  # fmt: skip


def write_checkpoint(run, step, best=None, has_manifest=True, is_sealed=True):
    """A checkpoint with the files that transformers writes, in a run directory."""
    folder = run.checkpoints / f"checkpoint-{step}"
    if has_manifest:
        begin(folder, run.path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.arange(64.0)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    for name in (*TENSORS, "training_args.bin"):
        torch.save({"values": torch.arange(32.0)}, folder / name)
    state = {
        "global_step": step,
        "best_model_checkpoint": str(run.checkpoints / f"checkpoint-{best}") if best else None,
        "log_history": [{"step": step, "loss": 1.0}],
        "stateful_callbacks": {"OptimizerSteps": {"attributes": {}} | ({"format": FORMAT} if has_manifest else {})},
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if has_manifest and is_sealed:
        seal(folder, run.path)
    return folder


def test_a_checkpoint_that_nothing_happened_to_is_whole(tmp_path):
    folder = write_checkpoint(Run(tmp_path), 4)
    assert examine(folder, tmp_path).kind is Kind.WHOLE
    assert sorted(json.loads((folder / "manifest.json").read_text())["files"]) == sorted(set(FILES) - {"manifest.json"})
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    (folder / ".DS_Store").write_text("of the system")
    assert examine(folder, tmp_path).kind is Kind.WHOLE


def test_a_checkpoint_of_another_run_is_not_this_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "environment.json").write_text(json.dumps({"run_id": f"run-{name}"}))
    ours, theirs = (write_checkpoint(Run(tmp_path / name), 4) for name in ("a", "b"))
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    found = examine(ours, tmp_path / "a")
    assert found.kind is Kind.DAMAGED
    assert found.fault == "checkpoint-4/manifest.json is that of another run (run-b, and this one is run-a)"
    assert examine(theirs, tmp_path / "b").kind is Kind.WHOLE


@pytest.mark.parametrize("file", FILES)
def test_every_damage_to_a_file_is_found_and_names_it(file, tmp_path):
    for number, (damage, change) in enumerate(DAMAGES.items()):
        run = Run(tmp_path / str(number))
        folder = write_checkpoint(run, 4)
        change(folder / file)
        found = examine(folder, run.path)
        assert found.kind is Kind.DAMAGED, damage
        named = f"more_{file}" if damage == "a second file" else file
        assert found.fault.startswith(f"checkpoint-4/{named}"), (damage, found.fault)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "trainer_state.json", "manifest.json"])
def test_a_flip_of_any_single_byte_is_found(file, tmp_path):
    folder = write_checkpoint(Run(tmp_path), 4)
    content = (folder / file).read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 32
        (folder / file).write_bytes(changed)
        assert examine(folder, tmp_path).fault.startswith(f"checkpoint-4/{file}"), place


def test_a_manifest_of_another_checkpoint_is_not_believed(tmp_path):
    run = Run(tmp_path)
    shutil.copytree(write_checkpoint(run, 4), run.checkpoints / "checkpoint-8")
    assert examine(run.checkpoints / "checkpoint-8", tmp_path).fault == "checkpoint-8/manifest.json is that of step 4"


def test_a_kill_before_the_manifest_leaves_an_unfinished_checkpoint_and_a_lost_manifest_does_not(tmp_path):
    run = Run(tmp_path)
    folder = write_checkpoint(run, 4, is_sealed=False)
    assert examine(folder, tmp_path).kind is Kind.UNFINISHED
    (folder / ".unfinished").unlink()
    assert examine(folder, tmp_path).fault == "checkpoint-4/manifest.json is missing"
    (run.checkpoints / "checkpoint-6").mkdir()  # killed before the mark was written
    assert examine(run.checkpoints / "checkpoint-6", tmp_path).kind is Kind.UNFINISHED


def test_a_checkpoint_of_an_earlier_version_is_checked_as_far_as_its_files_allow(tmp_path):
    folder = write_checkpoint(Run(tmp_path), 4, has_manifest=False)
    assert examine(folder, tmp_path).kind is Kind.UNVERIFIED
    (folder / "scaler.pt").unlink()  # only fp16 has one
    assert examine(folder, tmp_path).kind is Kind.UNVERIFIED
    read = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_config.json", "trainer_state.json", "adapter_model.safetensors")  # fmt: skip
    for file in read:
        content = (folder / file).read_bytes()
        for damage in ("truncated", "empty", "another type", "missing", "a folder", "a pipe"):
            DAMAGES[damage](folder / file)
            found = examine(folder, tmp_path)
            assert found.kind is Kind.DAMAGED and found.fault.startswith(f"checkpoint-4/{file}"), (file, damage)
            (folder / file).rmdir() if (folder / file).is_dir() else (folder / file).unlink(missing_ok=True)
            (folder / file).write_bytes(content)
    changed = bytearray((folder / "optimizer.pt").read_bytes())
    changed[changed.index(torch.arange(32.0).numpy().tobytes()) + 6] ^= 1  # torch's archives have checksums
    (folder / "optimizer.pt").write_bytes(changed)
    assert examine(folder, tmp_path).fault == "checkpoint-4/optimizer.pt cannot be read"


def test_the_newest_whole_checkpoint_is_chosen_and_one_line_says_why(tmp_path, caplog):
    run = Run(tmp_path)
    assert choose_checkpoint(run, False) == (None, [])
    for step in (2, 4, 6, 10):  # 10 comes after 6, not after 1
        write_checkpoint(run, step)
    write_checkpoint(run, 12, is_sealed=False)
    DAMAGES["one flipped byte"](run.checkpoints / "checkpoint-10" / "optimizer.pt")
    DAMAGES["missing"](run.checkpoints / "checkpoint-6" / "scaler.pt")
    chosen, unusable = choose_checkpoint(run, False)
    assert chosen == run.checkpoints / "checkpoint-4" == run.last_checkpoint()
    assert caplog.messages == [
        f"{run.checkpoints}: checkpoint-10/optimizer.pt has other bytes than were written; checkpoint-6/scaler.pt is missing; "
        "resuming from checkpoint-4 instead"
    ]
    set_aside(unusable, run)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "checkpoint-2", "checkpoint-4", "damaged-checkpoint-10", "damaged-checkpoint-6",
    ]  # fmt: skip
    DAMAGES["empty"](write_checkpoint(run, 10) / "optimizer.pt")
    set_aside(choose_checkpoint(run, False)[1], run)  # in place of the first
    assert (run.checkpoints / "damaged-checkpoint-10" / "optimizer.pt").stat().st_size == 0


def test_without_a_whole_checkpoint_the_run_is_refused_unless_none_was_ever_written_completely(tmp_path, caplog):
    run = Run(tmp_path)
    write_checkpoint(run, 2, is_sealed=False)
    chosen, unusable = choose_checkpoint(run, False)
    assert chosen is None and [one.kind for one in unusable] == [Kind.UNFINISHED]
    assert caplog.messages == [
        f"{run.checkpoints}/checkpoint-2: was not written completely, and is the only one: training starts at step 1"
    ]
    DAMAGES["second half zeroed"](write_checkpoint(run, 4) / "adapter_model.safetensors")
    with pytest.raises(UserError) as caught:
        choose_checkpoint(run, False)
    assert str(caught.value) == (
        f"{run.checkpoints}: no checkpoint is as it was written (checkpoint-4/adapter_model.safetensors has other bytes than were "
        "written): put that file back from a copy, or start again in another hydra.run.dir, or in this one after removing "
        f"{run.checkpoints}"
    )


def test_a_run_that_ends_with_its_best_checkpoint_needs_that_one_too(tmp_path):
    run = Run(tmp_path)
    for step, best in ((2, None), (4, 2), (6, 4)):
        write_checkpoint(run, step, best)
    assert examine_all(run.checkpoints, tmp_path, needs_best=True)[-1].path.name == "checkpoint-6"
    DAMAGES["missing"](run.checkpoints / "checkpoint-4" / "adapter_model.safetensors")
    assert [one.path.name for one in examine_all(run.checkpoints, tmp_path)] == ["checkpoint-6"]
    seen = examine_all(run.checkpoints, tmp_path, needs_best=True)
    assert [(one.path.name, one.is_usable) for one in seen] == [("checkpoint-6", False), ("checkpoint-4", False), ("checkpoint-2", True)]  # fmt: skip
    assert (
        seen[0].fault
        == "checkpoint-4/adapter_model.safetensors is missing, and checkpoint-6 needs it as the best one so far"
    )


@pytest.mark.parametrize(
    "name", ["checkpoint-", "checkpoint-x", "checkpoint-007", "checkpoint-²", "damaged-checkpoint-9"]
)
def test_folders_with_other_names_are_no_checkpoints(name, tmp_path):
    run = Run(tmp_path)
    write_checkpoint(run, 4).rename(run.checkpoints / name)
    assert run.last_checkpoint() is None


def test_a_file_or_a_deep_folder_in_place_of_a_checkpoint_is_damage(tmp_path):
    run = Run(tmp_path)
    run.checkpoints.mkdir()
    (run.checkpoints / "checkpoint-2").write_text("")
    assert examine(run.checkpoints / "checkpoint-2", tmp_path).fault == "checkpoint-2: is not a folder"
    deep = write_checkpoint(run, 4).joinpath(*"abcdefghijklmnopqrst")
    deep.mkdir(parents=True)
    assert "nested deeper" in examine(run.checkpoints / "checkpoint-4", tmp_path).fault


def test_a_file_that_the_disk_does_not_return_is_damage(tmp_path, monkeypatch):
    folder = write_checkpoint(Run(tmp_path), 4)

    def fail(file, algorithm):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(hashlib, "file_digest", fail)
    assert examine(folder, tmp_path).fault == "checkpoint-4/adapter_config.json cannot be read (Input/output error)"
