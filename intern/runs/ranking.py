"""Finished runs -> groups that were scored on the same rows: only within such a group is there a best run."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intern.errors import UserError
from intern.runs.directory import Run


@dataclass(frozen=True)
class ScoredRows:
    """The rows that a run's score was measured on.

    Args:
        name: for messages, such as "golden.jsonl".
        identity: equal for the same rows: the SHA-256 of their file, or its path if the run did not store that; None if nothing is known.
        golden: whether they are golden rows; False: training rows, whose loss says less.
    """

    name: str
    identity: str | None
    golden: bool


@dataclass(frozen=True)
class Ranked:
    """Runs that were scored on the same rows, the best first.

    Args:
        rows: what they were scored on.
        runs: with their scores, lower is better.
    """

    rows: ScoredRows
    runs: list[tuple[float, Run]]

    @property
    def best(self) -> Run:
        """The run with the lowest score."""
        return self.runs[0][1]

    @property
    def score(self) -> str:
        """What the best run's score is, in words."""
        kind = "golden loss" if self.rows.golden else "training loss"
        return f"{kind} {self.runs[0][0]:.4f}" + (f" on {self.rows.name}" if self.rows.name else "")


def scored_rows(config: Mapping[str, Any], environment: Mapping[str, Any], has_golden_loss: bool) -> ScoredRows:
    """Return what a run's score was measured on.

    Args:
        config: its config.yaml.
        environment: its environment.json, empty if it has none.
        has_golden_loss: whether its metrics have `eval_loss`.
    """
    given, found = config.get("data"), environment.get("data")
    data: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    digests: Mapping[str, Any] = found if isinstance(found, Mapping) else {}

    def read(key: str) -> tuple[str, str | None]:
        value = data.get(key)
        names = [str(one) for one in (value if isinstance(value, list) else [value])] if value else []
        known = [digest if isinstance(digest := digests.get(name), str) else name for name in names]
        shown = Path(names[0]).name if len(names) == 1 else f"{len(names)} files" if names else ""
        return shown, " ".join(known) or None

    if not has_golden_loss:
        name, identity = read("train_file")
        return ScoredRows(f"the training rows of {name}" if name else "training rows", identity, golden=False)
    if data.get("eval_share"):
        name, identity = read("train_file")
        part = f"{data['eval_share']} of {identity} with seed {data.get('seed')}"
        return ScoredRows(f"the held-out rows of {name}", part, golden=True)
    return ScoredRows(*read("eval_file"), golden=True)


def rank(runs: Iterable[Run]) -> list[Ranked]:
    """Return finished runs by what their scores were measured on, the largest group first; those without a readable score are left out."""
    groups: dict[tuple[bool, str | None], tuple[ScoredRows, list[tuple[float, Run]]]] = {}
    for run in runs:
        score = run.score()
        if math.isfinite(score):
            rows = _rows_of(run)
            groups.setdefault((rows.golden, rows.identity), (rows, []))[1].append((score, run))
    ranked = [Ranked(rows, sorted(scored, key=lambda pair: pair[0])) for rows, scored in groups.values()]
    return sorted(ranked, key=lambda group: (not group.rows.golden, -len(group.runs)))


def _rows_of(run: Run) -> ScoredRows:
    """Return what a run was scored on, as far as its files can be read."""
    contents: list[Mapping[str, Any]] = []
    for read in (run.read_config, lambda: run.read_json(run.environment), lambda: run.read_json(run.metrics)):
        try:
            contents.append(read())
        except (UserError, OSError):
            contents.append({})
    config, environment, metrics = contents
    return scored_rows(config, environment, "eval_loss" in metrics)
