"""A base that was quantized before -> the same base from a cache on disk, about a third of the original's size to read.

An entry's name is a hash of what it was made of (weights, quantization, dtype, versions of the libraries), so it is never the wrong one.
It appears by rename once it is complete: a kill leaves a partial folder that is never read, and if two processes write the same entry,
the first one's stays.
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
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from intern.errors import UserError
from intern.model.preload import BASE_FILE
from intern.units import GIB

log = logging.getLogger(__name__)

_SHARD = "1GB"  # of an entry: no more of it is in host memory at once
_PARTIAL = ".draft-"
_OLD = 24 * 3600  # seconds after which a partial folder belongs to no process any more
_NAME = re.compile(r"[0-9a-f]{32}")  # of an entry: nothing else in the folder is ever removed


def build_cache(folder: Any, gib: Any) -> "QuantizedCache | None":
    """Return the cache of model.quantized_cache and model.quantized_cache_gib, None if it is switched off.

    Raises:
        UserError: a value of the wrong type.
    """
    if folder is None:
        return None
    if not isinstance(folder, str) or not folder:
        raise UserError(f"model.quantized_cache={folder}: must be a folder, or null for none")
    if isinstance(gib, bool) or not isinstance(gib, int | float):
        raise UserError(f"model.quantized_cache_gib={gib}: must be a number of GiB")
    return QuantizedCache(Path(folder).expanduser(), int(gib * GIB))


@dataclass(frozen=True)
class QuantizedCache:
    """Quantized bases in a folder. Those that were not used for the longest time are removed if all would take more than `most` bytes."""

    folder: Path
    most: int

    def load_or_store(
        self,
        name: str,
        config: PreTrainedConfig,
        quant: BitsAndBytesConfig,
        arguments: dict[str, Any],
        quantize: Callable[[], PreTrainedModel],
    ) -> PreTrainedModel:
        """Return the quantized base from its entry; quantize it and store the entry if there is none that can be read.

        Args:
            name: the base's folder or name on the hub.
            config: the base's configuration.
            quant: the quantization.
            arguments: of from_pretrained; the dtype is among them.
            quantize: loads the original and quantizes it.
        """
        entry = self.entry(name, config, quant, arguments["dtype"])
        if entry is None:
            return quantize()
        model = _read(entry, name, arguments) if entry.is_dir() else None
        if model is None:
            model = quantize()
            self.store(model, entry, name)
        return model

    def entry(self, name: str, config: PreTrainedConfig, quant: BitsAndBytesConfig, dtype: torch.dtype) -> Path | None:
        """Return the folder of this base with this quantization; None if nothing identifies the base's weights."""
        weights = identity(name, config)
        if weights is None:
            return None
        libraries = [version(library) for library in ("bitsandbytes", "transformers", "torch")]
        made_of = [weights, quant.to_dict(), str(dtype), libraries]
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:32]
        return self.folder / key

    def store(self, model: PreTrainedModel, entry: Path, name: str) -> None:
        """Write an entry. A disk without room for it is reported and stops nothing.

        Args:
            model: the quantized base.
            entry: its folder.
            name: the base's folder or name on the hub.
        """
        partial = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_old_partial_folders()
            partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.folder))
            model.save_pretrained(str(partial), max_shard_size=_SHARD)
            (partial / BASE_FILE).write_text(name, encoding="utf-8")
            if not self._make_room(_size(partial)):
                return
            with contextlib.suppress(FileExistsError):  # another process was first
                if not entry.exists():
                    partial.rename(entry)
                    log.info("quantized base stored in %s (%.1f GiB)", entry, _size(entry) / GIB)
        except OSError as error:
            log.warning("%s: the quantized base is not stored (%s)", self.folder, error)
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)

    def _make_room(self, size: int) -> bool:
        entries = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        if size > self.most:
            log.warning(
                "%s: the quantized base takes %.1f GiB, more than model.quantized_cache_gib: it is not stored",
                self.folder,
                size / GIB,
            )
            return False
        sizes = {path: _size(path) for path in sorted(entries, key=lambda path: path.stat().st_mtime)}
        for path in list(sizes):
            if sum(sizes.values()) + size <= self.most:
                break
            shutil.rmtree(path, ignore_errors=True)
            del sizes[path]
        return True

    def _remove_old_partial_folders(self) -> None:
        for partial in self.folder.glob(f"{_PARTIAL}*"):
            with contextlib.suppress(OSError):
                if time.time() - partial.stat().st_mtime > _OLD:
                    shutil.rmtree(partial)


def _read(entry: Path, name: str, arguments: dict[str, Any]) -> PreTrainedModel | None:
    """Return the model of an entry and mark it as used; remove an entry that cannot be read, and return None."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            entry, trust_remote_code=False, local_files_only=True, **arguments
        )
    except (OSError, ValueError, SafetensorError) as error:
        log.warning("%s cannot be read (%s): quantizing again", entry, " ".join(str(error).split())[:200])
        shutil.rmtree(entry, ignore_errors=True)
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # the entries that were not used for the longest time are removed first
    log.info("quantized base read from %s", entry)
    model.name_or_path = model.config._name_or_path = name  # what an adapter names as its base
    return model


def identity(name: str, config: PreTrainedConfig) -> list[object] | None:
    """Return what distinguishes a base's weights from others: the hub's commit, or a folder's files with their sizes and times."""
    folder = Path(name)
    if folder.is_dir():
        files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
        return [str(folder.resolve()), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
    commit = getattr(config, "_commit_hash", None)
    return [name, commit] if commit else None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
