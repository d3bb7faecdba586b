"""Read the base's weights ahead while a command imports its libraries, which takes longer than anything else before its first step."""

import contextlib
import gc
import io
import logging
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from intern.paths import find
from intern.runs.files import read_bytes

log = logging.getLogger(__name__)

BASE_FILE = "base.txt"  # of an entry of the quantized cache: the name or folder of its base
_KEYS = ("pretrained_model_name_or_path", "quantized_cache")
_BLOCK = 16 * 2**20  # bytes
_LONGEST_NAME = 4096  # bytes of BASE_FILE


@contextlib.contextmanager
def importing(cfg: DictConfig | None = None) -> Iterator[None]:
    """Wrap the imports: meanwhile the base that will probably be loaded is read, and Python's garbage collector is off.

    The libraries' 5,000 modules create objects that stay. Searching them for garbage again and again takes a sixth of the time of the
    imports; once all of them are there, gc.freeze excludes them from later searches.

    Args:
        cfg: the configuration whose model will be loaded; None if no weights will be loaded. That of a run must come from
            `Run.read_config_to_load`: a run does not choose what is read here.
    """
    if "torch" in sys.modules:  # all this is done already, in a sweep's second job
        yield
        return
    if cfg is not None:
        _read_ahead(cfg)
    gc.disable()
    try:
        with library_output():
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def library_output() -> Iterator[None]:
    """Keep what libraries print while they load out of standard output, which has only what a command shows; it is logged for debugging."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            log.debug("%s", line)


def _read_ahead(cfg: DictConfig) -> None:
    """Start to read the cached quantized form of this base that was used last into the operating system's page cache.

    Nothing waits for it, and a wrong guess costs only the reading.
    """
    with contextlib.suppress(OSError, RuntimeError, ValueError, OmegaConfBaseException):  # mistakes are reported later
        name, folder = (OmegaConf.select(cfg, f"model.{key}") for key in _KEYS)
        if isinstance(name, str) and isinstance(folder, str):
            files = _last_used(Path(folder).expanduser(), str(find(name) or name))
            threading.Thread(target=_read, args=(files,), daemon=True).start()


def _last_used(cache: Path, base: str) -> list[Path]:
    """Return the files of the entry that was made of this base, or of the one that was used last if there are several."""
    entries = [mark.parent for mark in cache.glob(f"*/{BASE_FILE}") if _made_of(mark, cache) == base]
    if not entries:
        return []
    last = max(entries, key=lambda entry: entry.stat().st_mtime)
    return sorted(file for file in last.glob("*.safetensors") if stat.S_ISREG(file.lstat().st_mode))


def _made_of(mark: Path, cache: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):  # anything but a small regular file, or no text
        return read_bytes(mark, cache, _LONGEST_NAME).decode("utf-8")
    return None


def _read(files: Sequence[Path]) -> int:
    """Read the files and return the number of bytes."""
    block, count = bytearray(_BLOCK), 0
    with contextlib.suppress(OSError):
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while read := stream.readinto(block):
                    count += read
    return count
