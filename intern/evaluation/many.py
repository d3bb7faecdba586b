"""Several runs and a golden file -> an evaluation of each, and one table of all. A base that they share answers once."""

import logging
import shlex
import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from intern.display.table import show
from intern.display.text import visible
from intern.errors import RunError, UserError
from intern.evaluation.evaluate import Evaluation, as_json, evaluate
from intern.evaluation.metrics import MAIN_METRIC, METRICS, Place, metrics_at
from intern.evaluation.report import write_report
from intern.runs.directory import Run
from intern.runs.disk import explain_disk_errors
from intern.runs.names import given_name

log = logging.getLogger(__name__)

_REMEDY = "make it writable or free some space, then run the same command again: finished answers are kept"


def evaluate_and_store(cfg: DictConfig, run: Run, against: Run | None, earlier: Sequence[Run] = ()) -> Evaluation:
    """Evaluate a run and write the reports and metrics.json into its folder.

    Args:
        cfg: the composed conf/evaluate.yaml.
        run: the run to evaluate.
        against: another run to compare with, None for the run's own base.
        earlier: runs that were evaluated before with the same `cfg`; answers of a base or run that they share are used again.

    Raises:
        UserError: bad input, or a run that cannot be loaded.
        RunError: a model whose loss is NaN or infinite, or a full disk.
    """
    with explain_disk_errors(run.evaluation, _REMEDY):
        evaluation = evaluate(cfg, run, against, earlier)
        write_report(evaluation)
        run.write_json(Run(evaluation.folder).metrics, as_json(evaluation))
    return evaluation


def evaluate_all(cfg: DictConfig, runs: Sequence[Run], against: Run | None, asked: str) -> None:
    """Evaluate several runs and print one table of them; one that cannot be evaluated does not end the others.

    Args:
        cfg, against: as for `evaluate_and_store`.
        runs: those to evaluate.
        asked: run_dir= as it was given.

    Raises:
        RunError: some runs could not be evaluated; UserError if none could.
    """
    made: list[tuple[Run, Evaluation]] = []
    failures = []
    for number, run in enumerate(runs, start=1):
        sys.stderr.write(f"{number} of {len(runs)}: {visible(_name(run))}\n")
        if run == against:
            sys.stderr.write("  left out: it is the run that the others are compared with\n")
            continue
        try:
            made.append((run, evaluate_and_store(cfg, run, against, [done for done, _ in made])))
        except (UserError, RunError) as error:
            sys.stderr.write(f"  {visible(str(error))}\n")
            failures.append(f"{run.path.name}: {error}")
    if not made:
        raise UserError(
            f"run_dir={asked}: no run could be evaluated: {failures[0] if failures else 'there is no other'}"
        )
    _show(made, asked)
    if failures:
        raise RunError(f"{len(failures)} of {len(runs)} runs could not be evaluated: {'; '.join(failures)}")


def _show(made: list[tuple[Run, Evaluation]], asked: str) -> None:
    """Print the scores of all runs on all golden rows, the best first, and the model that they were compared with at the end."""
    metrics = metrics_at(Place.TERMINAL)
    first = made[0][1]

    def cells(evaluation: Evaluation, side: str) -> list[str]:
        found = []
        for name, metric in metrics.items():
            score = getattr(evaluation.groups[0].scores[name], side)
            bounds = f" [{score.low:{metric.format}}, {score.high:{metric.format}}]" if score.low is not None else ""
            found.append("-" if score.value is None else f"{score.value:{metric.format}}{bounds}")
        return found

    def quality(pair: tuple[Run, Evaluation]) -> float:
        value = pair[1].groups[0].scores[MAIN_METRIC].after.value
        return -value if value is not None else 1.0

    ranked = sorted(made, key=quality)
    rows = [[_name(run), *cells(evaluation, "after")] for run, evaluation in ranked]
    rows.append([first.sides[0].name, *cells(first, "before")])
    show(
        [
            f"{first.groups[0].label} golden rows of {first.file.path.name}",
            *(metric.short_label for metric in metrics.values()),
        ],
        rows,
    )
    best = ranked[0][0]
    sys.stdout.write(
        f"\nbest by {METRICS[MAIN_METRIC].short_label}: {visible(_name(best))}\n"
        f"its report: {visible(str(ranked[0][1].folder / 'report.html'))}\n"
        f"ask it: python -m intern.query {shlex.quote(f'run_dir={best.path}')} question='...'\n"
        f"with every key that differs: python -m intern.compare {shlex.quote(f'runs={asked}')} sort_by={MAIN_METRIC}\n"
    )


def _name(run: Run) -> str:
    return given_name(run) or f"{run.path.parent.name}/{run.path.name}"
