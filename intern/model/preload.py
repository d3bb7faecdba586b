"""What a command does while it imports its libraries, which takes longer than all else before its first step or answer."""

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from intern.paths import find

MADE_OF = "base.txt"  # of an entry of the quantized cache: the name or folder of its base
_KEYS = ("pretrained_model_name_or_path", "quantized_cache")
_BLOCK = 16 * 2**20  # bytes


@contextlib.contextmanager
def importing(cfg: DictConfig | None = None) -> Iterator[None]:
    """Around the imports: meanwhile the base that will probably be loaded is read, and Python's garbage collector rests.

    The libraries' five thousand modules make objects that stay. To search them for garbage again and again takes a sixth of the time
    that the imports take, and once all are there, every later search leaves them out.

    Args:
        cfg: a training run's configuration; None where no weights will be loaded.
    """
    if "torch" in sys.modules:  # all this is done already, in a sweep's second job
        yield
        return
    if cfg is not None:
        _read_ahead(cfg)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _read_ahead(cfg: DictConfig) -> None:
    """Starts to read, into the operating system's page cache, the kept quantized form of this base that was used last.

    Nothing waits for it, and a wrong guess costs only the reading.
    """
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
