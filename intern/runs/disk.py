"""A disk that is full or read-only -> one line that says what to do."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from intern.errors import RunError, UserError

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)


@contextlib.contextmanager
def explain_disk_errors(folder: Path, remedy: str) -> Iterator[None]:
    """Turn errors of writing into one line.

    Args:
        folder: what is named if the system does not say which file it was.
        remedy: what the user can do.

    Raises:
        RunError: something inside could not be written: the disk is full or read-only, or the user may not write there.
    """
    try:
        yield
    except Exception as error:  # libraries wrap the system's error in errors of their own
        if isinstance(error, UserError | RunError) or (found := unwritable(error)) is None:
            raise
        file, reason = found
        raise RunError(f"{file or folder}: {reason}: {remedy}") from error


def unwritable(error: BaseException) -> tuple[str | None, str] | None:
    """Return the file, if it is known, and the system's reason from the chain of errors that libraries made of it.

    Args:
        error: of any kind; None is returned if it is about something else.
    """
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.errno in _UNWRITABLE:
            return _name(current), os.strerror(current.errno or 0)
        if not isinstance(current, UserError | RunError):
            for number in _UNWRITABLE:  # safetensors, torch and Arrow keep only the text
                if re.search(rf"\((?:os error|errno:?) {number}\)|\[[Ee]rrno {number}\]", str(current)):
                    return None, os.strerror(number)
        if "PytorchStreamWriter failed writing" in str(current):
            return None, os.strerror(errno.ENOSPC)
        current = current.__cause__ or current.__context__
    return None


def _name(error: OSError) -> str | None:
    name = error.filename
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else None
