"""A base that was quantized once -> the same base from a cache on disk, about a third of the original's size to read.

An entry's name says what it was made of (weights, quantization, dtype, library versions), so it is never the wrong one. It appears by
rename when it is whole: a kill leaves a draft that nobody reads, and of two processes the first one's entry stands.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from intern.model.preload import MADE_OF
from intern.units import GIB

log = logging.getLogger(__name__)

_SHARD = "1GB"  # of an entry: no more of it is in host memory at once
_DRAFT = ".draft-"
_OLD = 24 * 3600  # seconds after which a draft is nobody's any more
_NAME = re.compile(r"[0-9a-f]{32}")  # of an entry: nothing else in the folder is ever removed


@dataclass(frozen=True)
class QuantizedCache:
    """The entries in `folder`; the ones that were not used for the longest time go where all would take more than `most` bytes."""

    folder: Path
    most: int

    def entry(self, name: str, config: PreTrainedConfig, quant: BitsAndBytesConfig, dtype: torch.dtype) -> Path | None:
        """Where this base, quantized so, is or would be; None where nothing says which weights it has."""
        weights = _identity(name, config)
        if weights is None:
            return None
        libraries = [version(library) for library in ("bitsandbytes", "transformers", "torch")]
        made_of = [weights, quant.to_dict(), str(dtype), libraries]
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:32]
        return self.folder / key

    def store(self, model: PreTrainedModel, entry: Path, name: str) -> None:
        """Writes the entry of a base with this name; a disk that has no room for it is said and stops nothing."""
        draft = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._drop_old_drafts()
            draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=self.folder))
            model.save_pretrained(str(draft), max_shard_size=_SHARD)
            (draft / MADE_OF).write_text(name, encoding="utf-8")
            if not self._make_room(_size(draft)):
                return
            with contextlib.suppress(FileExistsError):  # another process was first
                if not entry.exists():
                    draft.rename(entry)
                    log.info("quantized base kept in %s (%.1f GiB)", entry, _size(entry) / GIB)
        except OSError as error:
            log.warning("%s: the quantized base is not kept (%s)", self.folder, error)
        finally:
            if draft is not None:
                shutil.rmtree(draft, ignore_errors=True)

    def _make_room(self, size: int) -> bool:
        entries = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        if size > self.most:
            log.warning(
                "%s: the quantized base takes %.1f GiB, more than model.quantized_cache_gib: it is not kept",
                self.folder,
                size / GIB,
            )
            return False
        taken = {path: _size(path) for path in sorted(entries, key=lambda path: path.stat().st_mtime)}
        for path in list(taken):
            if sum(taken.values()) + size <= self.most:
                break
            shutil.rmtree(path, ignore_errors=True)
            del taken[path]
        return True

    def _drop_old_drafts(self) -> None:
        for draft in self.folder.glob(f"{_DRAFT}*"):
            with contextlib.suppress(OSError):
                if time.time() - draft.stat().st_mtime > _OLD:
                    shutil.rmtree(draft)


def used(entry: Path) -> None:
    """Notes that an entry was read: it is not the next one to go."""
    with contextlib.suppress(OSError):
        os.utime(entry)


def _identity(name: str, config: PreTrainedConfig) -> list[object] | None:
    """What tells a base's weights from others: the hub's commit, or the files of a folder by size and time."""
    folder = Path(name)
    if folder.is_dir():
        files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
        return [str(folder.resolve()), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
    commit = getattr(config, "_commit_hash", None)
    return [name, commit] if commit else None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
