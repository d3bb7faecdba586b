"""One process at a time in a run directory."""

import contextlib
import fcntl
from collections.abc import Iterator

from intern.errors import BusyError
from intern.runs.directory import Run
from intern.runs.files import open_to_append


@contextlib.contextmanager
def lock(run: Run) -> Iterator[None]:
    """Lock the run directory. The system releases the lock when the process ends, however it ends.

    Raises:
        BusyError: another process has locked it.
    """
    with open_to_append(run.path / "run.lock", run.path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"{run.path}: another process trains in it: wait for it, or choose another hydra.run.dir"
            ) from error
        yield
