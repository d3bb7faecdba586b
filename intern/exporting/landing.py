"""A folder under a provisional name next to the final one -> the final name, once everything in it is written and proven."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from intern.errors import RunError
from intern.exporting.settings import check_empty


@contextlib.contextmanager
def landing(out: Path) -> Iterator[Path]:
    """Give a folder to write to. It becomes `out` at the end; after an exception nothing of it is left.

    Args:
        out: must not exist yet, or be an empty folder.

    Raises:
        UserError: there is something in `out`.
        RunError: it cannot be written.
    """
    check_empty(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise RunError(f"out={out}: cannot be written ({error.strerror})") from error
    try:
        yield draft
        draft.chmod(0o755)
        for file in draft.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()
        draft.rename(out)  # fails if something has appeared there meanwhile
    except OSError as error:
        raise RunError(f"out={out}: cannot be written ({error.strerror or error}): nothing was left there") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
