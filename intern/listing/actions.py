"""What intern.runs does with runs: prints a list or one run's story, packs a run, removes runs after a question."""

import contextlib
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from intern.comparison.groups import given_paths
from intern.display.table import fitted, show
from intern.display.text import visible
from intern.errors import RunError, UserError
from intern.evaluation.bootstrap import FEW, FEW_MARK
from intern.listing.run_list import (
    HEADINGS,
    LEAVING,
    TEXTS,
    ListedRun,
    in_order,
    list_runs,
    listed,
    read_json_or_empty,
    select,
)
from intern.listing.story import story
from intern.runs.find import find_any, resolve
from intern.runs.names import given_name
from intern.runs.pack import folder_name, pack
from intern.runs.removal import Removal, is_ours, of_checkpoints, of_run, remove
from intern.runs.state import State
from intern.units import in_words

_MOST_LEFT = 3  # names in a folder that are not removed


def chosen_runs(
    runs: str | list[str] | None, states: Sequence[str], match: str | None, sort_by: str
) -> list[ListedRun]:
    """Return the runs that a user means, in order.

    Args:
        runs: folders or globs; None for outputs/ and multirun/.
        states, match: as for `select`.
        sort_by: as for `in_order`.

    Raises:
        UserError: a folder that does not exist, or a value that means nothing.
    """
    found = in_order(select(list_runs(given_paths(runs)), states, match), sort_by)
    counts = Counter(one.name for one in found)
    return [replace(one, name=f"{one.name} ({one.folder})") if counts[one.name] > 1 else one for one in found]


def _no_runs(is_filtered: bool) -> str:
    if is_filtered:
        return "No run is like that. All runs below outputs/ and multirun/: python -m intern.runs"
    return "No runs below outputs/ or multirun/ in this folder; runs elsewhere: runs=FOLDER. To train one: python -m intern.train"


def show_list(runs: Sequence[ListedRun], is_filtered: bool) -> None:
    """Print a table of runs, and what they take together.

    Args:
        runs: those to show.
        is_filtered: whether there may be others, for the message that there is none.
    """
    if not runs:
        sys.stdout.write(f"{_no_runs(is_filtered)}\n")
        return
    headings, rows, texts, gone = fitted(HEADINGS, [one.cells() for one in runs], LEAVING, TEXTS)
    show(headings, rows, texts)
    if gone:
        sys.stdout.write(f"\nLeft out at this width: {', '.join(gone)}.")
    counts = Counter(one.state for one in runs)
    named = ", ".join(f"{counts[state]} {state}" for state in State if counts[state])
    sys.stdout.write(f"\n{named}; {in_words(sum(one.size for one in runs))}\n")
    if any(one.few for one in runs):
        sys.stdout.write(f"{FEW_MARK} fewer than {FEW} golden rows: too few to rely on.\n")
    if len({one.rows.identity for one in runs if one.score is not None}) > 1:
        sys.stdout.write("Not all scores were measured on the same rows: intern.compare groups the runs by them.\n")


def show_one(asked: str) -> None:
    """Print the whole story of a run, finished or not."""
    with _named("show"):
        run = find_any(asked)
    config = read_json_or_empty(run.config, run)
    lines = list(
        story(listed(run), config, *(read_json_or_empty(file, run) for file in (run.environment, run.metrics)))
    )
    width = max(len(heading) for heading, _ in lines)
    sys.stdout.write("".join(f"{heading:<{width}}  {visible(text)}\n" for heading, text in lines))


def pack_one(asked: str, out: Path | None) -> None:
    """Pack a finished run, and say what is in the file and how it is used."""
    with _named("pack"):
        run = resolve(asked)
    name = given_name(run) or f"{run.path.parent.name}-{run.path.name}"
    target = out if out is not None else Path(f"{folder_name(name)}.zip")
    members = pack(run, name, target)
    base = str(run.read_config().model.pretrained_model_name_or_path)
    is_local = Path(base).is_dir()
    folder = members[0].partition("/")[0]
    sys.stdout.write("".join(f"{visible(member)}\n" for member in members))
    sys.stdout.write(
        f"\n{target}: {in_words(target.stat().st_size)}. Where it is unpacked:\n"
        f"python -m intern.query {shlex.quote(f'run_dir={folder}')}{' base_model=FOLDER' if is_local else ''} question='...'\n"
    )
    if is_local:
        sys.stdout.write(f"FOLDER is where the base model is there; here it is {visible(base)}\n")


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """Name this command's own key in an error about the run that was asked for."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("run_dir=", f"{key}=", 1)) from error


def remove_some(runs: Sequence[ListedRun], what: str | None, keep_best: int | None, is_agreed: bool) -> None:
    """List what would be removed of which runs, and remove it if the user agrees.

    Args:
        runs: those to choose from.
        what: "checkpoints", "failed", or None for whole finished runs.
        keep_best: how many runs on each golden file stay; None: all are removed.
        is_agreed: whether not to ask.

    Raises:
        UserError: there is no terminal to ask in, or the answer is no.
        RunError: something could not be removed.
    """
    removals = list(_removals(runs, what, keep_best))
    if not removals:
        sys.stdout.write("There is nothing to remove.\n")
        return
    names = {one.run: one.name for one in runs}
    rows = [
        [names[one.run], "the run" if one.whole else "checkpoints", _left(one), in_words(one.size)] for one in removals
    ]
    show(("run", "what goes", "what stays", "frees"), rows, texts=3)
    total = in_words(sum(one.size for one in removals))
    sys.stdout.write(f"\n{len(removals)} of {len(runs)} runs, {total}.\n")
    if not is_agreed:
        _ask(total)
    _remove(removals)


def _removals(runs: Sequence[ListedRun], what: str | None, keep_best: int | None) -> Iterator[Removal]:
    state = State.FAILED if what == "failed" else State.FINISHED
    kept = _best(runs, keep_best) if keep_best is not None else set()
    for one in runs:
        if one.state is not state or one.run in kept or not is_ours(one.run):
            continue
        removal = of_checkpoints(one.run) if what == "checkpoints" else of_run(one.run)
        if removal is not None and removal.paths:
            yield removal


def _best(runs: Sequence[ListedRun], count: int) -> set[object]:
    """Return the best finished runs on each golden file, and those without a score, which cannot be ranked."""
    finished = [one for one in runs if one.state is State.FINISHED]
    kept: set[object] = {one.run for one in finished if one.score is None}
    for rows in {(one.rows.golden, one.rows.identity) for one in finished}:
        ranked = [one for one in finished if (one.rows.golden, one.rows.identity) == rows and one.score is not None]
        kept |= {one.run for one in sorted(ranked, key=lambda one: one.score or 0.0)[:count]}
    return kept


def _left(removal: Removal) -> str:
    if not removal.whole:
        return "everything else"
    more = ", ..." if len(removal.left) > _MOST_LEFT else ""
    return (", ".join(removal.left[:_MOST_LEFT]) or "nothing") + more


def _ask(total: str) -> None:
    """Ask whether to remove; raise UserError if the answer is no, or if there is no terminal to ask in."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("nothing was removed: add yes=true to remove what is listed")
    sys.stdout.write(f"Remove this for good, {total}? [y/N] ")
    sys.stdout.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was removed")


def _remove(removals: Sequence[Removal]) -> None:
    failures = []
    for one in removals:
        try:
            remove(one)
        except UserError as error:
            failures.append(str(error))
        except OSError as error:
            failures.append(f"{error.filename or one.run.path}: cannot be removed ({error.strerror})")
    done = len(removals) - len(failures)
    sys.stdout.write(f"Removed from {done} of {len(removals)} runs.\n")
    if failures:
        raise RunError("; ".join(failures))
