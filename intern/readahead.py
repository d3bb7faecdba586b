"""A quantized base is read while the libraries are still being imported: when it is loaded, its files are in memory already."""

import contextlib
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from intern.paths import find

MADE_OF = "base.txt"  # of an entry of the quantized cache: the name or folder of its base
_KEYS = ("pretrained_model_name_or_path", "quantized_cache")
_BLOCK = 16 * 2**20  # bytes


def read_ahead(cfg: DictConfig) -> None:
    """Starts to read, into the operating system's page cache, what will probably be loaded: the entry of this base that was used last.

    Nothing waits for it, and a wrong guess costs only the reading.

    Args:
        cfg: a training run's configuration.
    """
    if "torch" in sys.modules:  # the libraries are there already: there is no time to use
        return
    with contextlib.suppress(OSError, RuntimeError, ValueError, OmegaConfBaseException):  # a mistake is told later
        name, folder = (OmegaConf.select(cfg, f"model.{key}") for key in _KEYS)
        if isinstance(name, str) and isinstance(folder, str):
            files = _last_used(Path(folder).expanduser(), str(find(name) or name))
            threading.Thread(target=_read, args=(files,), daemon=True).start()


def _last_used(cache: Path, base: str) -> list[Path]:
    """The files of the entry that was made of this base; of the one that was used last where there are several."""
    entries = [mark.parent for mark in cache.glob(f"*/{MADE_OF}") if mark.read_text(encoding="utf-8") == base]
    if not entries:
        return []
    last = max(entries, key=lambda entry: entry.stat().st_mtime)
    return sorted(file for file in last.glob("*.safetensors") if file.is_file())


def _read(files: Sequence[Path]) -> int:
    """How many bytes they have."""
    block, count = bytearray(_BLOCK), 0
    with contextlib.suppress(OSError):
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while read := stream.readinto(block):
                    count += read
    return count
