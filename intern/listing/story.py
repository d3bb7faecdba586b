"""One run -> its whole story: what was trained on what, how it went, what came of it, and what to do next."""

import contextlib
import shlex
from collections.abc import Iterator
from typing import Any

from intern.comparison.reader import overrides_of
from intern.errors import UserError
from intern.evaluation.metrics import METRICS
from intern.listing.run_list import ListedRun, date, mapping, number, read_json_or_empty
from intern.runs.directory import Run
from intern.runs.removal import size_of
from intern.runs.state import State, why_unfinished
from intern.units import in_words

_SPARKS = "▁▂▃▄▅▆▇█"
_CURVE = 40  # characters of a loss curve
_SHOWN_METRICS = ("token_f1", "rouge_l", "exact_match", "loss")
_ADAPTER_KEYS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
Lines = Iterator[tuple[str, str]]


def story(one: ListedRun, config: dict[str, Any], environment: dict[str, Any], metrics: dict[str, Any]) -> Lines:
    """Yield what a run is, each as a heading and a line of text; a heading that is empty continues the one before.

    Args:
        one: as the list of runs shows it.
        config, environment, metrics: contents of its files, empty if they are missing.
    """
    run = one.run
    yield "run", one.name
    if config.get("notes"):
        yield "notes", str(config["notes"])
    yield "folder", str(run.path)
    yield "state", _state(one)
    yield "last written", date(one.written)
    if config:
        yield from _what(config)
    else:
        yield "configuration", "config.yaml is missing or cannot be read"
    yield from _where(run, environment)
    yield from _how(run, metrics)
    yield from _result(one, metrics)
    yield from _evaluations(run)
    yield from _sizes(run, one.size)
    yield from _next(one, can_resume=bool(config))


def _state(one: ListedRun) -> str:
    if one.state is State.FINISHED:
        return "finished"
    if one.state is State.RUNNING:
        return f"running ({why_unfinished(one.run)})"
    return why_unfinished(one.run)


def _what(config: dict[str, Any]) -> Lines:
    model, quant, lora, trainer, data = (
        mapping(config.get(group)) for group in ("model", "quant", "lora", "trainer", "data")
    )
    yield "model", f"{model.get('pretrained_model_name_or_path')}, {_quantization(quant)}"
    targets = lora.get("target_modules")
    named = ", ".join(f"{word} {lora[key]}" for key, word in _ADAPTER_KEYS.items() if lora.get(key) is not None)
    yield "adapter", f"{named}; on {', '.join(map(str, targets)) if isinstance(targets, list) else targets}"
    yield "data", _names(data.get("train_file"))
    yield (
        "golden rows",
        f"{data['eval_share']} of them held out" if data.get("eval_share") else _names(data.get("eval_file")),
    )
    length = f"rows of up to {trainer.get('max_length')} tokens, context: {data.get('context')}"
    yield "training", f"learning rate {trainer.get('learning_rate')}, seed {config.get('seed')}, {length}"


def _names(files: Any) -> str:
    return ", ".join(str(file) for file in (files if isinstance(files, list) else [files]) if file) or "none"


def _quantization(quant: dict[str, Any]) -> str:
    if quant.get("load_in_4bit"):
        return str(quant.get("bnb_4bit_quant_type"))
    return "int8" if quant.get("load_in_8bit") else "not quantized"


def _where(run: Run, environment: dict[str, Any]) -> Lines:
    gpu, git, packages = (mapping(environment.get(key)) for key in ("gpu", "git", "packages"))
    versions = [f"{name} {packages[name]}" for name in ("torch", "transformers", "peft") if name in packages]
    machine = f"{gpu.get('name')} ({gpu.get('memory_gib')} GiB)" if gpu else "CPU"
    if environment:
        yield "machine", ", ".join([machine, *versions])
    if git:
        yield "code", f"commit {str(git.get('commit'))[:12]}{' with changes' if git.get('changed') else ''}"
    command = environment.get("command")
    words = [str(word) for word in command[1:]] if isinstance(command, list) else []
    is_resumed = any(word.startswith("resume=") for word in words)
    started = overrides_of(run.path) if is_resumed else words
    if environment:
        yield "overrides", shlex.join(started) or "none"
    if is_resumed:
        yield "resumed with", shlex.join(word for word in words if not word.startswith("hydra.run.dir="))


def _how(run: Run, metrics: dict[str, Any]) -> Lines:
    if metrics:
        steps, skipped, epochs, tokens, seconds, speed, rows = (
            number(metrics.get(key)) or 0
            for key in (
                *("optimizer_steps", "skipped_steps", "epochs", "train_tokens", "train_seconds", "tokens_per_second"),
                "train_rows",
            )
        )
        more = [f"{epochs:.2g} epochs"] if epochs else []
        more += [f"{skipped:.0f} more skipped by fp16"] if skipped else []
        yield "steps", f"{steps:,.0f}" + (f" ({', '.join(more)})" if more else "")
        yield "", f"{tokens:,.0f} tokens in {seconds:,.0f} s, {speed:,.0f} tokens/s"
        gpu, host = (number(metrics.get(key)) for key in ("peak_gpu_gib", "peak_host_rss_gib"))
        parts = [(gpu, "GiB of GPU memory"), (host, "GiB of the host's" if gpu else "GiB")]
        yield "peak memory", ", ".join(f"{size} {unit}" for size, unit in parts if size is not None)
        lost = [f"{metrics[f'{what}_rows']} {what}" for what in ("dropped", "shortened") if metrics.get(f"{what}_rows")]
        yield "rows", ", ".join([f"{rows:,.0f} trained on", *lost])
    losses = [(entry["step"], entry["loss"]) for entry in run.read_history() if isinstance(entry.get("loss"), float)]
    if losses:
        low, (first, begun), (last, ended) = min(losses, key=lambda pair: pair[1]), losses[0], losses[-1]
        yield "loss", _curve([loss for _, loss in losses])
        yield "", f"{begun:.3f} at step {first}, {ended:.3f} at step {last}; lowest {low[1]:.3f} at step {low[0]}"


def _curve(values: list[float]) -> str:
    """Return the values as a line of blocks, each the mean of its share of them."""
    width = min(_CURVE, len(values))
    parts = [values[index * len(values) // width : (index + 1) * len(values) // width] for index in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join(_SPARKS[round((mean - low) / max(high - low, 1e-12) * (len(_SPARKS) - 1))] for mean in means)


def _result(one: ListedRun, metrics: dict[str, Any]) -> Lines:
    if one.score is None:
        return
    base = number(metrics.get("base_eval_loss"))
    against = f"; the base's is {base:.3f} ({one.score / base - 1:+.0%})" if one.rows.golden and base else ""
    kind = "golden loss" if one.rows.golden else "training loss"
    yield kind, f"{one.score_in_words.removesuffix(' (training)')} on {one.rows.name or 'its golden rows'}{against}"
    if metrics.get("best_step") is not None:
        yield "", f"the adapter is that of step {metrics['best_step']}, the best one"


def _evaluations(run: Run) -> Lines:
    is_there = run.evaluation.is_dir() and not run.evaluation.is_symlink()
    heading = "evaluations"
    for folder in sorted(run.evaluation.iterdir()) if is_there else []:
        file = folder / "metrics.json"
        found = read_json_or_empty(file, run) if file.exists() else {}
        groups, models = found.get("groups"), found.get("models")
        scores = mapping(mapping(groups[0]).get("scores")) if isinstance(groups, list) and groups else {}
        told = []
        for name in _SHOWN_METRICS:
            before, after = (
                number(mapping(mapping(scores.get(name)).get(side)).get("value")) for side in ("before", "after")
            )
            told += [f"{METRICS[name].short_label} {after:.3f} ({before:.3f})"] if None not in (before, after) else []
        other = mapping(models[0]).get("name") if isinstance(models, list) and models else "base"
        if told:
            yield heading, f"{folder.name}: {found.get('rows')} rows; {', '.join(told)}, in brackets: {other}"
            heading = ""
    if heading and run.finished:
        yield heading, "none yet"


def _sizes(run: Run, total: int) -> Lines:
    parts = {name: size_of(run.path / name) for name in ("adapter", "checkpoints", "evaluation", "wandb")}
    yield (
        "on disk",
        ", ".join([in_words(total), *(f"{name} {in_words(size)}" for name, size in parts.items() if size)]),
    )
    with contextlib.suppress(UserError, OSError):  # a link in its checkpoints
        if (last := run.last_checkpoint()) is not None:
            yield "checkpoint", f"of step {last.name.rsplit('-', 1)[1]}"


def _next(one: ListedRun, can_resume: bool) -> Lines:
    run_dir = shlex.quote(f"run_dir={one.run.path}")
    if one.state is State.FINISHED:
        yield "next", f"python -m intern.query {run_dir} question='...'"
        yield "", f"python -m intern.evaluate {run_dir}"
        yield "", f"python -m intern.runs {shlex.quote(f'pack={one.run.path}')}"
    elif one.state is State.INTERRUPTED and can_resume:
        yield "next", f"python -m intern.train {shlex.quote(f'resume={one.run.path}')}"
