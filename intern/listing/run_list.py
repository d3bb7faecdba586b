"""Folders of runs -> all runs below them, finished or not, with what a list shows of each."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intern.comparison.groups import run_folders
from intern.config.build import plain
from intern.config.suggestions import unknown
from intern.errors import UserError
from intern.evaluation.bootstrap import FEW, FEW_MARK
from intern.runs.directory import Run
from intern.runs.names import given_name
from intern.runs.ranking import ScoredRows, scored_rows
from intern.runs.removal import size_of
from intern.runs.state import State, state_of
from intern.units import in_words

HEADINGS = ("run", "state", "last written", "model", "data", "rank", "score", "size")
TEXTS = 5  # columns of text
LEAVING = ("size", "data", "model", "rank", "last written")  # columns that go first where the table does not fit
SORTS = ("date", "name", "state", "model", "data", "rank", "score", "size")


@dataclass(frozen=True)
class ListedRun:
    """What a list shows of a run; None for what its files do not tell.

    Args:
        run: the run.
        name: the one it was given, or its folder.
        state: as `state_of` returns it.
        written: when one of its main files was written last, in seconds since 1970.
        model, data: names of the base model and of the training data.
        rank: lora.r.
        score: nats per token; on golden rows if it has any, otherwise on training rows.
        bounds: of its 95 % interval.
        few: whether it comes from too few rows to rely on.
        rows: what the score was measured on.
        size: bytes on disk.
    """

    run: Run
    name: str
    state: State
    written: float
    model: str
    data: str
    rank: int | None
    score: float | None
    bounds: tuple[float, float] | None
    few: bool
    rows: ScoredRows
    size: int

    @property
    def folder(self) -> str:
        """Its folder, below the working directory without this part."""
        return _folder(self.run)

    def cells(self) -> list[str]:
        """Return a row of the table whose headings are HEADINGS."""
        return [
            self.name,
            self.state,
            date(self.written),
            self.model,
            self.data,
            "" if self.rank is None else str(self.rank),
            self.score_in_words,
            in_words(self.size),
        ]

    @property
    def score_in_words(self) -> str:
        """The score with its interval and what is doubtful about it."""
        if self.score is None:
            return ""
        bounds = f" [{self.bounds[0]:.3f}, {self.bounds[1]:.3f}]" if self.bounds is not None else ""
        return (
            f"{self.score:.3f}{bounds}{f' {FEW_MARK}' if self.few else ''}{'' if self.rows.golden else ' (training)'}"
        )


def date(seconds: float) -> str:
    """Return a time as a person reads it."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def list_runs(paths: Sequence[str]) -> list[ListedRun]:
    """Return all runs below `paths`.

    Args:
        paths: folders or globs.

    Raises:
        UserError: a path that does not exist.
    """
    folders = dict.fromkeys(folder for path in paths for folder in run_folders(path))
    return [listed(Run(folder)) for folder in folders]


def listed(run: Run) -> ListedRun:
    """Return what a list shows of a run; files that cannot be read leave gaps."""
    config, environment, metrics = (
        read_json_or_empty(file, run) for file in (run.config, run.environment, run.metrics)
    )
    state, score = state_of(run), run.score()
    low, high = (number(metrics.get(f"eval_loss_{end}")) for end in ("low", "high"))
    rows = number(metrics.get("eval_rows"))
    files = (run.metrics, run.failure, run.history, run.config, run.path / "train.log", run.path)
    return ListedRun(
        run=run,
        name=given_name(run) or _folder(run),
        state=state,
        written=next(file.lstat().st_mtime for file in files if file.exists() and not file.is_symlink()),
        model=Path(str(_key(config, "model", "pretrained_model_name_or_path") or "")).name,
        data=_data_name(_key(config, "data", "train_file")),
        rank=int(rank) if (rank := number(_key(config, "lora", "r"))) is not None else None,
        score=score if math.isfinite(score) and state is not State.RUNNING else None,
        bounds=(low, high) if low is not None and high is not None else None,
        few=rows is not None and rows < FEW,
        rows=scored_rows(config, environment, "eval_loss" in metrics),
        size=size_of(run.path),
    )


def select(runs: Sequence[ListedRun], states: Sequence[str], match: str | None) -> list[ListedRun]:
    """Return the runs of some states whose name, folder, model or data has a text.

    Args:
        runs: all runs.
        states: names of states; empty for all.
        match: the text, whose capitals do not matter; None for all.

    Raises:
        UserError: no such state.
    """
    for state in states:
        if state not in list(State):
            raise UserError(f"state={unknown(state, list(State)).replace('key', 'state').replace('keys', 'states')}")
    wanted = str(match).casefold() if match is not None else ""
    return [
        one
        for one in runs
        if (not states or one.state in states)
        and any(wanted in text.casefold() for text in (one.name, str(one.run.path), one.model, one.data))
    ]


def in_order(runs: Sequence[ListedRun], sort_by: str) -> list[ListedRun]:
    """Return the runs sorted: the newest, the largest or the best first, and names from A to Z; those without the value come last.

    Args:
        runs: the runs.
        sort_by: one of SORTS.

    Raises:
        UserError: another one.
    """
    if sort_by not in SORTS:
        raise UserError(f"sort_by={sort_by}: must be one of {', '.join(SORTS)}")
    keys: dict[str, Any] = {
        "date": lambda one: -one.written,
        "size": lambda one: -one.size,
        "score": lambda one: (one.score is None, not one.rows.golden, one.score or 0.0),
        "rank": lambda one: (one.rank is None, one.rank or 0),
    }
    return sorted(runs, key=keys.get(sort_by, lambda one: str(getattr(one, sort_by)).casefold()))


def read_json_or_empty(file: Path, run: Run) -> dict[str, Any]:
    """Return the content of a run's config.yaml or JSON file, empty if it cannot be read."""
    try:
        if file == run.config:
            content: dict[str, Any] = plain(run.read_config())
            return content
        return run.read_json(file)
    except (UserError, OSError):
        return {}


def _folder(run: Run) -> str:
    here = Path.cwd()
    return str(run.path.relative_to(here)) if run.path.is_relative_to(here) and run.path != here else str(run.path)


def _key(config: dict[str, Any], group: str, key: str) -> Any:
    return mapping(config.get(group)).get(key)


def _data_name(files: Any) -> str:
    names = [Path(str(name)).name for name in (files if isinstance(files, list) else [files]) if name]
    return names[0] if len(names) == 1 else f"{len(names)} files" if names else ""


def mapping(value: Any) -> dict[str, Any]:
    """Return a value of a file if it is a mapping, otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """Return a value of a file if it is a number that training could have written, otherwise None."""
    return (
        float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15 else None
    )
