"""The files of a run -> what its model card says: where the model comes from, what it cost, how it scored."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from intern.config.build import plain
from intern.config.secrets import masked
from intern.display.text import in_lines
from intern.errors import UserError
from intern.runs.directory import Run

_HOUR = 3600  # seconds
_SCORES = {
    "loss": "loss on golden answers (nats per token)",
    "token_f1": "token F1",
    "exact_match": "exact matches",
    "rouge_l": "ROUGE-L",
    "numbers": "figures right",
}
# Of the stored configuration: what decides the model, without paths, trackers and caches.
_GROUPS = ("seed", "quant", "lora", "trainer")


@dataclass(frozen=True)
class Score:
    """A score of the base and of the run, with 95 % intervals where they were measured."""

    name: str
    rows: int | None
    before: str
    after: str


@dataclass(frozen=True)
class Facts:
    """What a run says about itself; everything is text to show, masked and on lines of its own."""

    run_id: str
    name: str
    data: list[tuple[str, str]]  # names of files, and their SHA-256
    rows: int | None
    scores: list[Score]
    cost: list[tuple[str, str]]
    configuration: str
    versions: str


def read_facts(run: Run) -> Facts:
    """Read a run for its card; what it does not have is left out."""
    cfg = run.read_config()
    metrics = run.read_json(run.metrics)
    environment = run.read_json(run.environment) if run.has(run.environment) else {}
    data, packages = environment.get("data"), environment.get("packages")
    values = plain(cfg)
    kept = {name: values[name] for name in _GROUPS if values.get(name) is not None}
    return Facts(
        run_id=_text(environment.get("run_id", "")),
        name=_text(values.get("name") or run.path.name),
        data=[(_text(Path(str(file)).name), _text(digest)) for file, digest in data.items()]
        if isinstance(data, dict)
        else [],
        rows=int(rows) if (rows := _number(metrics.get("train_rows"))) is not None else None,
        scores=[*_losses(metrics), *_evaluations(run)],
        cost=_cost(metrics, environment),
        configuration=_text(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)).strip(),
        versions=", ".join(_text(f"{name} {one}") for name, one in packages.items())
        if isinstance(packages, dict)
        else "",
    )


def _losses(metrics: dict[str, Any]) -> list[Score]:
    after, before = _number(metrics.get("eval_loss")), _number(metrics.get("base_eval_loss"))
    if after is None:
        return []
    low, high = _number(metrics.get("eval_loss_low")), _number(metrics.get("eval_loss_high"))
    shown = f"{after:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else "")
    rows = _number(metrics.get("eval_rows"))
    return [
        Score(
            _SCORES["loss"],
            int(rows) if rows is not None else None,
            f"{before:.3f}" if before is not None else "",
            shown,
        )
    ]


def _evaluations(run: Run) -> list[Score]:
    """The scores of all rows in each evaluation of base and adapter."""
    found = []
    try:
        folders = sorted(folder for folder in run.evaluation.iterdir() if folder.is_dir() and not folder.is_symlink())
    except OSError:
        return []
    for folder in folders:
        try:
            content = run.read_json(folder / "metrics.json")
            models = [model["adapter"] for model in content["models"]]
            group = next(one for one in content["groups"] if one["name"] == "all")
            if models != [False, True]:
                continue
            for name, score in group["scores"].items():
                shown = [_interval(score[side]) for side in ("before", "after")]
                found.append(Score(_text(f"{_SCORES.get(name, name)}, {folder.name}"), int(score["rows"]), *shown))
        except (UserError, KeyError, TypeError, ValueError, StopIteration, AttributeError):
            continue  # an evaluation that was interrupted, or of another version
    return found


def _interval(score: dict[str, Any]) -> str:
    return f"{float(score['value']):.3f} ({float(score['low']):.3f} to {float(score['high']):.3f})"


def _cost(metrics: dict[str, Any], environment: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    seconds, gpu = _number(metrics.get("train_seconds")), environment.get("gpu")
    if seconds is not None:
        device = f"GPU hours ({_text(gpu)})" if gpu else "CPU hours (no GPU)"
        found.append((device, f"{seconds / _HOUR:.2f}"))
    for key, name, form in (
        ("train_tokens", "tokens", ",.0f"),
        ("optimizer_steps", "optimizer steps", ",.0f"),
        ("peak_gpu_gib", "peak GPU memory in GiB", ".2f"),
        ("peak_host_rss_gib", "peak host memory in GiB", ".2f"),
        ("trainable_parameters", "trained parameters", ",.0f"),
    ):
        if (value := _number(metrics.get(key))) is not None:
            found.append((name, format(value, form)))
    return found


def _number(value: Any) -> float | None:
    return (
        float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


def _text(value: Any) -> str:
    return masked(in_lines(str(value))).replace("|", "\\|")
