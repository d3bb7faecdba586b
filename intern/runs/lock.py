"""One process at a time in a run directory."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from intern.errors import BusyError
from intern.runs.directory import Run
from intern.runs.files import open_to_append


@contextlib.contextmanager
def lock(run: Run) -> Iterator[None]:
    """Lock the run directory. The system releases the lock when the process ends, however it ends.

    If the block ends by an error or Ctrl-C, no lock file is left where there was none.

    Raises:
        BusyError: another process has locked it.
    """
    path = run.path / "run.lock"
    run.path.mkdir(parents=True, exist_ok=True)
    is_new = not run.has(path)
    with open_to_append(path, run.path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _busy(run) from error
        if (
            os.fstat(file.fileno()).st_nlink == 0
        ):  # removed by a process that was refused, between our opening and locking it
            raise _busy(run)
        try:
            yield
        except BaseException:  # also an interruption
            if is_new:
                run.remove(path)
            raise


def _busy(run: Run) -> BusyError:
    return BusyError(f"{run.path}: another process trains in it: wait until it has finished")
