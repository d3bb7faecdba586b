"""What made a run fail: disks that are full or read-only in one line, and failure.json for whoever restarts it."""

import contextlib
import shlex
import shutil
from collections.abc import Callable, Iterator

from intern.config.secrets import masked
from intern.errors import BusyError, LostProcess, RunError, UserError, one_line
from intern.runs.directory import Run
from intern.runs.disk import unwritable
from intern.runs.files import remove_file
from intern.units import GIB


@contextlib.contextmanager
def explain_disk_errors(run: Run) -> Iterator[None]:
    """Raise RunError with the remedy if something inside could not be written because the disk is full or read-only."""
    try:
        yield
    except Exception as error:  # libraries wrap the system's error in errors of their own
        found = None if isinstance(error, UserError | RunError) else unwritable(error)
        if found is None:
            raise
        free = shutil.disk_usage(run.path).free / GIB
        raise RunError(
            f"{run.path}: {found[1]} ({free:.1f} GiB are free there): free some space or fix that; what was written is kept, "
            f"and python -m intern.train {shlex.quote(f'resume={run.path}')} resumes from the last checkpoint"
        ) from error


@contextlib.contextmanager
def record_failure(run: Run, records_refusals: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Write failure.json with the reason if the training inside fails, and remove an older one if it succeeds.

    Nothing is written if another process is training there.

    Args:
        run: the run directory.
        records_refusals: whether bad input is recorded too. A run that is refused before it starts changes nothing in its folder.
    """
    try:
        yield
    except BusyError:
        raise
    except LostProcess:  # the process that has ended knows why, and has written it
        raise
    except Exception as error:  # of any kind: it is raised again for the command to show
        failure = {
            "exit_code": 2 if isinstance(error, UserError) else 1,
            "error": masked(one_line(error)),
            "begins_anew": not isinstance(error, UserError) and unwritable(error) is None,
        }
        if not run.finished and (records_refusals() or not isinstance(error, UserError)):
            with contextlib.suppress(OSError, UserError):  # a full disk may be the reason
                run.write_json(run.failure, failure)
        raise
    remove_file(run.failure, run.path)


def discard_failed_attempt(run: Run) -> None:
    """Remove what a failed training would resume from, so that it starts again; not after bad input or a full disk."""
    if run.finished or not run.failure.is_file() or not run.read_json(run.failure).get("begins_anew"):
        return
    if not run.checkpoints.is_symlink():
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    for file in (run.history, run.environment):  # the latter has the id of the tracker's run, which has failed
        remove_file(file, run.path)
