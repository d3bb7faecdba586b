"""A disk that is full or read-only -> one line that says what to do."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from intern.errors import RunError, UserError

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


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
        if isinstance(error, UserError | RunError) or (cause := _unwritable(error)) is None:
            raise
        raise RunError(f"{cause.filename or folder}: {os.strerror(cause.errno or 0)}: {remedy}") from error


def _unwritable(error: BaseException) -> OSError | None:
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.errno in _UNWRITABLE:
            return current
        current = current.__cause__ or current.__context__
    return None
