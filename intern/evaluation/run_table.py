"""Run directories -> rows of one table, and a reason for each that has none."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from intern.config.suggestions import unknown
from intern.display.table import Column
from intern.errors import UserError
from intern.evaluation.bootstrap import FEW
from intern.runs.directory import RUN_ROOTS, Run

# A thousand configurations in a second instead of ten, where PyYAML was built with libyaml.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_ALWAYS_SHOWN = ("lora.r", "trainer.learning_rate")
_LOG_END = 65_536  # bytes of train.log in which the last error is looked for


FIGURES = {
    "trainable_parameters": Column("trainable", None, ",.0f"),
    "train_loss": Column("train loss", False, ".3f"),
    "eval_loss": Column("eval loss", False, ".3f"),
    "token_f1": Column("token F1", True, ".3f"),
    "rouge_l": Column("ROUGE-L", True, ".3f"),
    "figures_right": Column("figures right", True, ".1%"),
    "judged": Column("judged right", True, ".1%"),
    "tokens_per_second": Column("tokens/s", True, ",.0f"),
    "peak_memory_gib": Column("peak GiB", False, ".2f"),
    "train_seconds": Column("seconds", False, ",.0f"),
    "score": Column("score", False, ".3f"),
}
EVALUATED = ("token_f1", "rouge_l", "figures_right", "judged")  # figures that intern.evaluate makes
Bounds = tuple[float | None, float | None]


@dataclass(frozen=True, eq=False)  # each is itself: runs may have the same figures
class FinishedRun:
    """A run that can be compared."""

    run: Run
    name: str  # its path below the folder that all runs share
    config: dict[str, str]  # every key, flat, as text
    figures: dict[str, float]  # FIGURES that it has
    bounds: dict[str, Bounds]  # 95 % intervals of EVALUATED
    few: frozenset[str]  # figures from too few rows to rely on
    trained_rows: int  # golden rows of the evaluation that the run was trained on
    gpu: str | None
    eval_data: str | None  # what eval_loss was measured on, by SHA-256
    evaluated_data: str | None  # what EVALUATED was measured on


@dataclass(frozen=True)
class OtherRun:
    """A run that cannot be compared, and why."""

    path: Path
    name: str
    reason: str
    overrides: str


@dataclass(frozen=True)
class Runs:
    """All runs below some folders, the finished ones in order."""

    finished: list[FinishedRun]
    others: list[OtherRun]
    best: FinishedRun | None
    best_by: str
    evaluation: str | None  # the folder that EVALUATED is from
    differing: list[str]  # config keys whose values are not the same in all finished runs


def given_paths(runs: str | Sequence[str] | None) -> list[str]:
    """The paths of `runs=a,b`, `runs=[a,b]` or a list; a path with a comma in it stands as it is where it exists."""
    if runs is None:
        return [name for name in RUN_ROOTS if Path(name).is_dir()]
    if not isinstance(runs, str):
        return [str(one) for one in runs]
    if Path(runs).expanduser().exists() or _matches(runs):
        return [runs]
    return [part for one in runs.strip("[]").split(",") if (part := one.strip().strip("'\""))]


def read_runs(paths: Sequence[str], sort_by: str, evaluation: str | None) -> Runs:
    """Reads every run below `paths`.

    Args:
        paths: folders or globs.
        sort_by: a name in FIGURES or a config key such as lora.r.
        evaluation: the folder in RUN/evaluation to read; None for the one that most runs have.

    Raises:
        UserError: a path that does not exist, no run at all, or nothing called `sort_by`.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _find(path)))
    if not folders:
        raise UserError(
            f"runs={','.join(paths) or 'null'}: no run there: train one, or give the folder of a run or a sweep"
        )
    shared = Path(os.path.commonpath([folder.parent for folder in folders]))
    evaluation = evaluation or _most_common_evaluation(folders)
    finished: list[FinishedRun] = []
    others: list[OtherRun] = []
    for folder in folders:
        name = str(folder.relative_to(shared))
        try:
            finished.append(_read(Run(folder), name, evaluation))
        except UserError as error:
            others.append(OtherRun(folder, name, str(error), _overrides(folder)))
    keys = sorted({key for one in finished for key in one.config})
    if finished and sort_by not in FIGURES and sort_by not in keys:
        raise UserError(f"sort_by={unknown(sort_by, [*FIGURES, *keys])}")
    judged_by = sort_by if sort_by in FIGURES and FIGURES[sort_by].higher_is_better is not None else "score"
    best = min(
        (one for one in finished if judged_by in one.figures), key=lambda one: _place(one, judged_by), default=None
    )
    return Runs(
        finished=sorted(finished, key=lambda one: _place(one, sort_by)),
        others=others,
        best=best,
        best_by=judged_by,
        evaluation=evaluation,
        differing=[
            key for key in keys if key not in _ALWAYS_SHOWN and len({one.config.get(key) for one in finished}) > 1
        ],
    )


def shown_keys(runs: Runs) -> list[str]:
    """The config keys of the table: rank and rate where there are any, then whatever differs."""
    return [key for key in _ALWAYS_SHOWN if any(key in one.config for one in runs.finished)] + runs.differing


def _place(one: FinishedRun, sort_by: str) -> tuple[bool, float, str]:
    """Sorts the best first, runs without the value last."""
    if sort_by in FIGURES:
        value = one.figures.get(sort_by)
        sign = -1 if FIGURES[sort_by].higher_is_better else 1
        return value is None, sign * (value or 0.0), ""
    text = one.config.get(sort_by)
    try:
        return text is None, float(text or 0), ""
    except ValueError:
        return text is None, 0.0, text or ""


def _find(path: str) -> Iterator[Path]:
    """The run directories at or below a path or glob; nothing below a run is looked at."""
    given = Path(path).expanduser()
    starts = [given] if given.is_dir() else _matches(path)
    starts = [start for start in starts if start.is_dir()]
    if not starts:
        raise UserError(f"runs={path}: no such folder")
    for start in starts:
        for here, folders, files in os.walk(start.resolve()):
            begun = ".hydra" in folders or "train.log" in files
            if "config.yaml" in files or (begun and "multirun.yaml" not in files):
                folders.clear()
                yield Path(here)
            folders[:] = sorted(name for name in folders if not name.startswith("."))


def _matches(pattern: str) -> list[Path]:
    given = Path(pattern).expanduser()
    return sorted(Path(given.anchor).glob(str(given.relative_to(given.anchor))))


def _most_common_evaluation(folders: list[Path]) -> str | None:
    """Of folders that equally many runs have, the first by name."""
    names: Counter[str] = Counter()
    for folder in folders:
        below = folder / "evaluation"
        if below.is_dir():
            names.update(one.name for one in sorted(below.iterdir()) if (one / "metrics.json").is_file())
    return min(names, key=lambda name: (-names[name], name)) if names else None


def _read(run: Run, name: str, evaluation: str | None) -> FinishedRun:
    """Raises UserError, with the reason alone, where the run cannot be compared."""
    if not run.finished:
        raise UserError(_why_unfinished(run))
    config = _config(run)
    metrics = _object(run.metrics)
    score = run.score()
    environment = _object(run.environment) if run.environment.is_file() else {}
    memory = metrics.get("peak_gpu_gib", metrics.get("peak_host_rss_gib"))
    values = metrics | {"score": score, "peak_memory_gib": memory}
    figures = {key: float(values[key]) for key in FIGURES if key not in EVALUATED and _is_number(values.get(key))}
    if "score" not in figures:
        raise UserError("metrics.json has no loss that is a number")
    bounds: dict[str, Bounds] = {}
    few = {"eval_loss", "score"} if _is_number(metrics.get("eval_rows")) and metrics["eval_rows"] < FEW else set()
    evaluated_data, trained_rows = None, 0
    chosen = run.evaluation / evaluation / "metrics.json" if evaluation else None
    if chosen is not None and chosen.is_file():
        evaluated = _object(chosen)
        evaluated_data = str(evaluated.get("file_sha256"))
        group = _all_rows(evaluated)
        trained_rows = group["trained_rows"] if isinstance(group.get("trained_rows"), int) else 0
        for key, (value, interval, rows) in _evaluated(group).items():
            figures[key], bounds[key] = value, interval
            few |= {key} if rows < FEW else set()
    data, gpu = environment.get("data"), environment.get("gpu")
    return FinishedRun(
        run=run,
        name=name,
        config=config,
        figures=figures,
        bounds=bounds,
        few=frozenset(few),
        trained_rows=trained_rows,
        gpu=str(gpu.get("name")) if isinstance(gpu, dict) else None,
        eval_data=str(data.get(str(config.get("data.eval_file"))))
        if isinstance(data, dict) and "eval_loss" in figures
        else None,
        evaluated_data=evaluated_data,
    )


def _all_rows(evaluated: dict[str, Any]) -> dict[str, Any]:
    """The group of all golden rows in an evaluation's metrics.json; empty where that is not as intern.evaluate writes it."""
    groups = evaluated.get("groups")
    return groups[0] if isinstance(groups, list) and groups and isinstance(groups[0], dict) else {}


def _evaluated(group: dict[str, Any]) -> dict[str, tuple[float, Bounds, float]]:
    """The adapter's scores: value, interval, number of rows; what is not as intern.evaluate writes it is left out."""
    found: dict[str, tuple[float, Bounds, float]] = {}
    scores = group.get("scores")
    for key in EVALUATED:
        score = scores.get(key) if isinstance(scores, dict) else None
        after = score.get("after") if isinstance(score, dict) else None
        if isinstance(score, dict) and isinstance(after, dict) and _is_number(after.get("value")):
            low, high = (float(after[name]) if _is_number(after.get(name)) else None for name in ("low", "high"))
            found[key] = float(after["value"]), (low, high), score["rows"] if _is_number(score.get("rows")) else 0
    return found


def _config(run: Run) -> dict[str, str]:
    try:
        content = yaml.load(run.config.read_text(encoding="utf-8"), Loader=_LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config.yaml cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise UserError("config.yaml holds no configuration")
    return dict(_flat(content, ""))


def _flat(node: dict[Any, Any], before: str) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} holds no JSON object")
    return content


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _why_unfinished(run: Run) -> str:
    """The last error in train.log, or how far training came."""
    log = run.path / "train.log"
    if log.is_file():
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_END))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        errors = [number for number, line in enumerate(lines) if "[ERROR] " in line]
        if errors:
            said = lines[errors[-1] :]
            traceback = any(line.startswith("Traceback") for line in said)
            last = (
                next((line for line in reversed(said) if line.strip()), "")
                if traceback
                else said[0].split("[ERROR] ", 1)[1]
            )
            return f"failed: {last.strip()}"
    steps = [entry["step"] for entry in run.read_history() if isinstance(entry, dict) and "step" in entry]
    return f"unfinished: no metrics.json, last step {steps[-1]}" if steps else "unfinished: no metrics.json"


def _overrides(folder: Path) -> str:
    """What Hydra was told for this job, where a failed one has not written its configuration."""
    try:
        content = yaml.load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"), Loader=_LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return ""
    return " ".join(map(str, content)) if isinstance(content, list) else ""
