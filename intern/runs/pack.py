"""A finished run -> one archive for a colleague: what answers need and what was measured, without checkpoints, data and credentials."""

import contextlib
import io
import json
import os
import re
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from intern.errors import UserError
from intern.runs.adapter import FILES
from intern.runs.directory import Run
from intern.runs.files import open_file
from intern.runs.untrusted import read_text
from intern.units import MIB

_ENDINGS = (".zip", ".tar.gz", ".tgz")
_SECRET = re.compile(r"(^|_)(token|password|passwd|secret|api_?key|credentials?)$", re.IGNORECASE)
_CHUNK = MIB  # bytes copied at a time
_LARGEST_CONFIG = MIB // 4  # bytes
_KEPT_OF_ENVIRONMENT = ("run_id", "python", "packages", "gpu", "data")


def pack(run: Run, name: str, out: Path) -> list[str]:
    """Write the archive. It holds one folder, which is a run directory that every command takes.

    Args:
        run: a finished run.
        name: what the run is called; the folder's name is made of it.
        out: the archive; its ending decides the format.

    Returns:
        The names in it, sorted.

    Raises:
        UserError: the run is unfinished, a file of it is a link, `out` exists or has another ending than .zip, .tar.gz and .tgz.
    """
    if not out.name.endswith(_ENDINGS):
        raise UserError(f"out={out}: must end with .zip, .tar.gz or .tgz")
    if not run.finished:
        raise UserError(f"pack={name}: {run.path} is not finished: there is no adapter to pack yet")
    if out.exists() or out.is_symlink():
        raise UserError(f"out={out}: exists already: choose another name, or remove it first")
    if not out.parent.is_dir():
        raise UserError(f"out={out}: no such folder: {out.parent}")
    folder = folder_name(name)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        members = list(_members(run))
        (_write_zip if out.name.endswith(".zip") else _write_tar)(draft, run, folder, members)
        if out.exists():  # another process was first
            raise UserError(f"out={out}: exists already: choose another name, or remove it first")
        draft.rename(out)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return sorted(f"{folder}/{place}" for place, _ in members)


def folder_name(name: str) -> str:
    """Return the name of a run, or its path, as the name of a folder on any system."""
    return re.sub(r"[^\w.=,+-]+", "-", name).strip("-.") or "run"


def _members(run: Run) -> Iterator[tuple[str, bytes | Path]]:
    """Yield the files of the archive, in a fixed order: their places in the run, and their contents or the files to copy."""
    yield "config.yaml", _config(run)
    yield "metrics.json", read_text(run.metrics, run.path, MIB).encode()
    yield "prompt.json", read_text(run.prompt, run.path, 16 * MIB).encode()
    if run.has(run.environment):
        found = run.read_json(run.environment)
        environment = {key: found[key] for key in _KEPT_OF_ENVIRONMENT if key in found}
        yield "environment.json", (json.dumps(environment, indent=2, ensure_ascii=False) + "\n").encode()
    for file in (run.history, run.loss_plot):
        if run.has(file):
            yield file.name, file
    for name in sorted(FILES):
        if run.has(run.adapter / name):
            yield f"adapter/{name}", run.adapter / name


def _config(run: Run) -> bytes:
    """Return config.yaml as training wrote it; values of keys that hold credentials are null."""
    text = read_text(run.config, run.path, _LARGEST_CONFIG)
    run.read_config()  # refuses what is not a configuration
    values = yaml.safe_load(text)
    cleaned = _without_secrets(values)
    return (text if cleaned == values else yaml.safe_dump(cleaned, sort_keys=False, allow_unicode=True)).encode()


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: None if _SECRET.search(str(key)) else _without_secrets(inner) for key, inner in value.items()}
    return [_without_secrets(inner) for inner in value] if isinstance(value, list) else value


def _write_zip(target: Path, run: Run, folder: str, members: list[tuple[str, bytes | Path]]) -> None:
    with zipfile.ZipFile(target, "x", zipfile.ZIP_DEFLATED) as archive:
        for place, content in members:
            entry = zipfile.ZipInfo(f"{folder}/{place}", time.localtime(_time(run, place))[:6])
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as file:
                for part in _parts(run, content):
                    file.write(part)


def _write_tar(target: Path, run: Run, folder: str, members: list[tuple[str, bytes | Path]]) -> None:
    with tarfile.open(target, "x:gz") as archive:
        for place, content in members:
            entry = tarfile.TarInfo(f"{folder}/{place}")
            entry.mode, entry.mtime = 0o644, int(_time(run, place))
            if isinstance(content, bytes):
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            else:
                with open_file(content, run.path) as file:
                    entry.size = os.fstat(file.fileno()).st_size
                    archive.addfile(entry, file)


def _parts(run: Run, content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with open_file(content, run.path) as file:
        while part := file.read(_CHUNK):
            yield part


def _time(run: Run, place: str) -> float:
    """Return when a file of the run was written; "latest" compares this after unpacking too. ZIP begins in 1980."""
    return max((run.path / place).lstat().st_mtime, 366_000_000)
