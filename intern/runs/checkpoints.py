"""Checkpoints that prove themselves: a manifest of the files of each, and the newest one that is still as it was written.

A checkpoint is written in this order: the folder with a mark in it, the trainer's files, the manifest with their sizes and SHA-256; then the
mark is removed. So a process that is killed meanwhile leaves the mark, and a checkpoint that has lost its manifest later does not look like
one that a kill has cut short. Versions before the manifest wrote none and no mark: their checkpoints are checked as far as their files allow.
"""

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from intern.errors import UserError
from intern.runs.files import check_folder, list_files, make_folder, open_file, remove_file, write_text
from intern.runs.untrusted import json_object, read_text
from intern.units import MIB

FORMAT = 2  # of checkpoints, in the state of every callback of ours; from 2 on a checkpoint has a manifest
MANIFEST = "manifest.json"
_MARK = ".unfinished"
_STATE = "trainer_state.json"
_LARGEST_STATE = 256 * MIB  # bytes: a million log steps
_ARCHIVES = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "scaler.pt",
)  # what torch.save wrote: zip files with checksums


class Kind(Enum):
    """What a checkpoint turned out to be."""

    WHOLE = auto()
    UNVERIFIED = auto()  # written by a version without manifests, and nothing speaks against it
    UNFINISHED = auto()  # its process was killed while it was written
    DAMAGED = auto()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was looked at.

    Args:
        path: its folder.
        kind: what it turned out to be.
        fault: if it is damaged, which file and in which way, beginning with "checkpoint-STEP/".
    """

    path: Path
    kind: Kind
    fault: str = ""

    @property
    def is_usable(self) -> bool:
        return self.kind in (Kind.WHOLE, Kind.UNVERIFIED)


class _Fault(Exception):
    """A file of a checkpoint that is not as it was written: its path relative to the checkpoint, and what is wrong with it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}")


def begin(checkpoint: Path, root: Path) -> None:
    """Create the folder of a checkpoint and mark it as unfinished.

    Args:
        checkpoint: the folder, RUN/checkpoints/checkpoint-STEP.
        root: the run directory.

    Raises:
        UserError: it or a folder around it is a link or of another kind.
    """
    make_folder(checkpoint, root)
    write_text(checkpoint / _MARK, root, "")
    remove_file(checkpoint / MANIFEST, root)  # of a checkpoint that was saved at the same step before


def seal(checkpoint: Path, root: Path) -> None:
    """Write the manifest of a checkpoint whose files are complete, flush them to the disk, and remove the mark.

    Args:
        checkpoint: the folder.
        root: the run directory.
    """
    files = {
        name: {"bytes": size, "sha256": _sha256(checkpoint / name, root, flushes=True)}
        for name, size in list_files(checkpoint, root).items()
        if not _is_ignored(name) and name != MANIFEST and not name.endswith("/")
    }
    write_text(checkpoint / MANIFEST, root, _manifest(_step(checkpoint), files, run_id(root)))
    remove_file(checkpoint / _MARK, root)


def examine(checkpoint: Path, root: Path) -> Checkpoint:
    """Compare a checkpoint with its manifest, byte by byte.

    Args:
        checkpoint: the folder.
        root: the run directory.
    """
    try:
        sizes = {name: size for name, size in list_files(checkpoint, root).items() if not _is_ignored(name)}
        if MANIFEST in sizes:
            _compare(checkpoint, root, sizes)
            return Checkpoint(checkpoint, Kind.WHOLE)
        if not sizes or (checkpoint / _MARK).is_file():
            return Checkpoint(checkpoint, Kind.UNFINISHED)
        _check_without_manifest(checkpoint, root)
        return Checkpoint(checkpoint, Kind.UNVERIFIED)
    except _Fault as fault:
        return Checkpoint(checkpoint, Kind.DAMAGED, f"{checkpoint.name}/{fault}")
    except OSError as error:
        return Checkpoint(checkpoint, Kind.DAMAGED, f"{checkpoint.name} cannot be read ({error.strerror})")
    except UserError as error:  # a link, a pipe or another special file, which are named by their whole paths
        return Checkpoint(checkpoint, Kind.DAMAGED, str(error).replace(f"{checkpoint.parent}{os.sep}", ""))


def examine_all(folder: Path, root: Path, needs_best: bool = False) -> list[Checkpoint]:
    """Look at the checkpoints of a run from the newest on, until one can be used.

    Args:
        folder: RUN/checkpoints.
        root: the run directory.
        needs_best: whether a checkpoint can only be used if the best one that it names can be used too.

    Returns:
        The checkpoints that were looked at, the newest first: all but the last one cannot be used.

    Raises:
        UserError: the folder or something directly in it is a link or a special file, through which training would write.
    """
    seen: list[Checkpoint] = []
    for path in list_checkpoints(folder, root):
        checkpoint = examine(path, root)
        if checkpoint.is_usable and needs_best and (best := _best_of(path, root)) is not None:
            found = examine(best, root)
            if not found.is_usable:
                reason = found.fault or f"{best.name} was not written completely"
                checkpoint = Checkpoint(
                    path, Kind.DAMAGED, f"{reason}, and {path.name} needs it as the best one so far"
                )
        seen.append(checkpoint)
        if checkpoint.is_usable:
            break
    return seen


def list_checkpoints(folder: Path, root: Path) -> list[Path]:
    """Return the folders RUN/checkpoints/checkpoint-STEP, the newest first. Raises what `examine_all` raises."""
    if not folder.is_symlink() and not folder.exists():
        return []
    names = [name for name in check_folder(folder, root) if name.startswith("checkpoint-")]
    steps = [int(name[11:]) for name in names if name[11:].isdecimal() and str(int(name[11:])) == name[11:]]
    return [folder / f"checkpoint-{step}" for step in sorted(steps, reverse=True)]


def _compare(checkpoint: Path, root: Path, sizes: dict[str, int]) -> None:
    """Raise _Fault for the first file that differs from the manifest; the sizes are compared first, since that costs nothing."""
    files = _read_manifest(checkpoint, root)
    for name, expected in files.items():
        if name not in sizes:
            raise _Fault(name, "is a folder now" if (checkpoint / name).is_dir() else "is missing")
        if sizes[name] != expected["bytes"]:
            raise _Fault(name, f"has {sizes[name]:,} bytes, and {expected['bytes']:,} were written")
    for name in sizes:
        if name != MANIFEST and name not in files:
            raise _Fault(name, "was added after the checkpoint was written")
    for name, expected in files.items():
        try:
            digest = _sha256(checkpoint / name, root)
        except OSError as error:
            raise _Fault(name, f"cannot be read ({error.strerror})") from error
        if digest != expected["sha256"]:
            raise _Fault(name, "has other bytes than were written")


def _read_manifest(checkpoint: Path, root: Path) -> dict[str, dict[str, Any]]:
    try:
        text = read_text(checkpoint / MANIFEST, root, MIB)
        content = json.loads(text)
        files: dict[str, dict[str, Any]] = content["files"]
        has_types = all(isinstance(one["bytes"], int) and isinstance(one["sha256"], str) for one in files.values())
        is_same = has_types and _manifest(content["step"], files, content["run_id"]) == text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # a UserError is a ValueError
        is_same = False
    if not is_same:
        raise _Fault(MANIFEST, "has other bytes than were written")
    if content["step"] != _step(checkpoint):
        raise _Fault(MANIFEST, f"is that of step {content['step']}")
    if None not in (content["run_id"], ours := run_id(root)) and content["run_id"] != ours:
        raise _Fault(MANIFEST, f"is that of another run ({content['run_id']}, and this one is {ours})")
    return files


def run_id(root: Path) -> str | None:
    """Return the id of a run, which its checkpoints carry; None if its environment.json does not say it."""
    try:
        found = json_object(root / "environment.json", root).get("run_id")
    except UserError:
        return None
    return found if isinstance(found, str) else None


def _manifest(step: int, files: dict[str, dict[str, Any]], run: str | None) -> str:
    """Return the text of a manifest, which ends with a hash of itself: a damaged manifest is not taken for a damaged file."""
    body = {"step": step, "run_id": run, "files": files}
    return json.dumps(body | {"sha256": hashlib.sha256(json.dumps(body).encode()).hexdigest()}, indent=1) + "\n"


def _sha256(path: Path, root: Path, flushes: bool = False) -> str:
    with open_file(path, root) as file:
        if flushes:  # rotation removes an older checkpoint next: this one must survive a power failure by then
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_without_manifest(checkpoint: Path, root: Path) -> None:
    """Raise _Fault if a file shows by itself that it is damaged, or if the checkpoint was written with a manifest."""
    try:
        state = json.loads(read_text(checkpoint / _STATE, root, _LARGEST_STATE))
        is_right = state["global_step"] == _step(checkpoint) and isinstance(state["log_history"], list)
        formats = [one.get("format", 1) for one in state["stateful_callbacks"].values() if isinstance(one, dict)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_right, formats = False, []
    if not is_right:
        raise _Fault(_STATE, "is missing" if not (checkpoint / _STATE).exists() else "cannot be read")
    if FORMAT in formats:
        raise _Fault(MANIFEST, "is missing")
    try:
        json_object(checkpoint / "adapter_config.json", root)
    except UserError:
        raise _Fault("adapter_config.json", "cannot be read") from None
    try:
        with safe_open(checkpoint / "adapter_model.safetensors", framework="pt"):
            pass
    except (OSError, SafetensorError):
        raise _Fault("adapter_model.safetensors", "cannot be read") from None
    for name in _ARCHIVES:
        if name == "scaler.pt" and not (checkpoint / name).exists():  # only fp16 has one
            continue
        try:
            with open_file(checkpoint / name, root) as file, zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
            damaged = name
        if damaged is not None:
            raise _Fault(name, "cannot be read")


def _best_of(checkpoint: Path, root: Path) -> Path | None:
    """Return the folder of the best checkpoint that a whole checkpoint names, if it is another one."""
    name = json.loads(read_text(checkpoint / _STATE, root, _LARGEST_STATE)).get("best_model_checkpoint")
    best = checkpoint.with_name(Path(str(name)).name) if name else checkpoint
    return best if best != checkpoint else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _is_ignored(name: str) -> bool:
    """Return whether a file directly in a checkpoint is hidden: systems leave such files, and no library reads one."""
    return name.startswith(".") and "/" not in name
