"""One run directory -> what a comparison needs of it, or the reason why it cannot be compared.

Run directories are untrusted: files are read through intern.runs.untrusted, which bounds their size and follows no link,
and values that training would never write are refused before anything computes with them.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intern.comparison.columns import columns
from intern.config.secrets import MASK, is_secret_name, masked
from intern.errors import UserError
from intern.evaluation.bootstrap import FEW
from intern.evaluation.metrics import Metric, Place, metrics_at
from intern.runs.directory import Run
from intern.runs.ranking import ScoredRows, scored_rows
from intern.runs.state import why_unfinished
from intern.runs.untrusted import json_object, read_text, yaml_mapping

_LARGEST = 1e15  # nothing that training measures is larger
_MOST_KEYS = 1_000  # of a configuration; a run has about 100
_OVERRIDES = 65_536  # bytes
_UNTRAINED = ("name", "notes", "logger")  # keys and groups that change nothing in what is trained
_DERIVED_SCALE = "lora.scale"
Bounds = tuple[float | None, float | None]


@dataclass(frozen=True, eq=False)  # compared by identity: two runs may have equal values
class FinishedRun:
    """A run that can be compared."""

    run: Run
    name: str  # the one it was given, or its path below the folder that all runs share
    config: dict[str, str]  # every key, flat, as text; lora.scale is derived
    values: dict[str, float]  # by column: those that the run has
    bounds: dict[str, Bounds]  # 95 % intervals of the metrics of its evaluation
    few: frozenset[str]  # columns computed from too few rows to rely on
    trained_rows: int  # golden rows of the evaluation that the run was trained on
    gpu: str | None
    train_rows: ScoredRows  # what train_loss was measured on
    eval_rows: ScoredRows | None  # what eval_loss was measured on
    evaluated_data: str | None  # SHA-256 of what the evaluation's metrics were measured on
    evaluated_file: str  # its name


@dataclass(frozen=True)
class OtherRun:
    """A run that cannot be compared, and why."""

    path: Path
    name: str
    reason: str
    arguments: list[str]  # of the job's command line

    @property
    def overrides(self) -> str:
        return " ".join(self.arguments)


def read_run(folder: Path, name: str, evaluation: str | None) -> FinishedRun | OtherRun:
    """Read one run; whatever is wrong with it becomes the reason of an OtherRun.

    Args:
        folder: the run directory.
        name: how tables call it.
        evaluation: the folder in RUN/evaluation to read, None for none.
    """
    try:
        return _read(Run(folder), name, evaluation)
    except (UserError, OSError) as error:
        reason = str(error) if isinstance(error, UserError) else f"cannot be read ({error.strerror})"
        reason = re.sub(r"(?s): is .* (?:run|run directory)\?$", "", reason.replace(f"{folder}/", ""))
        return OtherRun(folder, name, reason, overrides_of(folder))


def _read(run: Run, name: str, evaluation: str | None) -> FinishedRun:
    if not run.finished:
        raise UserError(why_unfinished(run))
    nested = yaml_mapping(run.config, run.path)
    config = _config(nested)
    metrics = json_object(run.metrics, run.path)
    environment = json_object(run.environment, run.path) if run.environment.exists() else {}
    memory = metrics.get("peak_gpu_gib", metrics.get("peak_host_rss_gib"))
    found = {key: _number(metrics.get(key), key) for key in columns() if key not in metrics_at(Place.COMPARE)}
    found["peak_memory_gib"] = _number(memory, "peak memory")
    score = run.score()
    found["score"] = score if math.isfinite(score) else None
    values = {key: value for key, value in found.items() if value is not None}
    if "score" not in values:
        raise UserError("metrics.json has no loss that is a number")
    rows = _number(metrics.get("eval_rows"), "eval_rows")
    few = {"eval_loss", "score"} if rows is not None and rows < FEW else set()
    bounds: dict[str, Bounds] = {}
    if "eval_loss" in values:
        ends = (_number(metrics.get(f"eval_loss_{end}"), f"eval_loss_{end}") for end in ("low", "high"))
        bounds["eval_loss"] = bounds["score"] = (next(ends), next(ends))
    evaluated = _evaluation(run, evaluation)
    group = _all_rows(evaluated)
    for key, metric in metrics_at(Place.COMPARE).items():
        if (measured := _measured(group, key, metric)) is not None:
            values[key], bounds[key], counted = measured
            few |= {key} if counted < FEW else set()
    gpu = environment.get("gpu")
    trained_rows = group.get("trained_rows")
    return FinishedRun(
        run=run,
        name=nested["name"] if isinstance(nested.get("name"), str) else name,
        config=config,
        values=values,
        bounds=bounds,
        few=frozenset(few),
        trained_rows=trained_rows if isinstance(trained_rows, int) else 0,
        gpu=str(gpu.get("name")) if isinstance(gpu, dict) else None,
        train_rows=scored_rows(nested, environment, has_golden_loss=False),
        eval_rows=scored_rows(nested, environment, has_golden_loss=True) if "eval_loss" in values else None,
        evaluated_data=str(evaluated["file_sha256"]) if "file_sha256" in evaluated else None,
        evaluated_file=Path(str(evaluated.get("file", ""))).name,
    )


def _number(value: Any, name: str) -> float | None:
    """Return a value of a file as a float, None if it is not a number; refuse what training never measures."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not abs(value) <= _LARGEST:
        raise UserError(f"metrics.json: {name} is larger than {_LARGEST:g}: not a value that training writes")
    return float(value)


def _evaluation(run: Run, evaluation: str | None) -> dict[str, Any]:
    """Return the content of an evaluation's metrics.json, empty if the run has none of this name."""
    chosen = run.evaluation / evaluation / "metrics.json" if evaluation else None
    return json_object(chosen, run.path) if chosen is not None and chosen.exists() else {}


def _all_rows(evaluated: dict[str, Any]) -> dict[str, Any]:
    """Return the group of all golden rows, empty if the file is not as intern.evaluate writes it."""
    groups = evaluated.get("groups")
    return groups[0] if isinstance(groups, list) and groups and isinstance(groups[0], dict) else {}


def _measured(group: dict[str, Any], key: str, metric: Metric) -> tuple[float, Bounds, float] | None:
    """Return the adapter's value, its interval and the number of rows; None if the evaluation lacks the metric."""
    scores = group.get("scores")
    if not isinstance(scores, dict):
        return None
    score = scores.get(key, scores.get(metric.former_name))
    after = score.get("after") if isinstance(score, dict) else None
    if not isinstance(score, dict) or not isinstance(after, dict):
        return None
    value, low, high = (_number(after.get(part), key) for part in ("value", "low", "high"))
    return None if value is None else (value, (low, high), _number(score.get("rows"), "rows") or 0)


def _config(nested: dict[str, Any]) -> dict[str, str]:
    """Return every key but those that say what a run is called as text, with the effective lora_alpha and the scale of the update."""
    config = dict(_flat({key: value for key, value in nested.items() if key not in _UNTRAINED}, ""))
    if len(config) > _MOST_KEYS:
        raise UserError(f"config.yaml has {len(config):,} keys: not a configuration that training writes")
    rank, alpha = (as_number(config.get(key)) for key in ("lora.r", "lora.lora_alpha"))
    if rank and alpha is None and config.get("lora.lora_alpha") == "None":
        alpha = 2 * rank  # as intern.model.lora builds it
    if rank and alpha is not None and rank > 0:
        config["lora.lora_alpha"] = f"{alpha:.10g}"
        root = config.get("lora.use_rslora") == "True"
        config[_DERIVED_SCALE] = f"{alpha / (math.sqrt(rank) if root else rank):.4g}"
    return config


def _flat(node: dict[Any, Any], before: str) -> Iterator[tuple[str, str]]:
    """Yield group.key and its value as text; a mapping such as data.columns is a value, not a group."""
    for key, value in node.items():
        if isinstance(value, dict) and not before:
            yield from _flat(value, f"{key}.")
        else:
            yield f"{before}{key}", _as_text(str(key), value)


def _as_text(key: str, value: Any) -> str:
    if is_secret_name(key) and value is not None:
        return MASK  # runs of earlier versions may hold credentials
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_as_text(str(name), one)}" for name, one in value.items())
    return masked(" ".join(map(str, value)) if isinstance(value, list) else str(value))


def as_number(text: str | None) -> float | None:
    """Return a config value as a number; None if it is none, or beyond what a run can have."""
    try:
        number = float(text) if text is not None else None
    except ValueError:
        return None
    return number if number is not None and abs(number) <= _LARGEST else None


def overrides_of(folder: Path) -> list[str]:
    """Return the settings that a run was started with, from Hydra's list of strings; empty if there is none."""
    try:
        text = read_text(folder / ".hydra" / "overrides.yaml", folder, _OVERRIDES)
    except UserError:
        return []
    items = (line[2:].strip() for line in text.splitlines() if line.startswith("- "))
    texts = (item[1:-1].replace("''", "'") if item[:1] == item[-1:] == "'" else item for item in items)
    return [_masked_override(text) for text in texts]


def _masked_override(text: str) -> str:
    key, sign, _ = text.partition("=")
    return f"{key}{sign}{MASK}" if is_secret_name(key) else masked(text)
