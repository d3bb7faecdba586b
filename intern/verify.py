"""python -m intern.verify experiment=tiny_cpu"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from intern.cli.command import command, quoted
from intern.errors import RunError, UserError
from intern.runs.directory import Run

_OWN = ("check", "steps", "resume")
_TIMES = ("train_runtime", "eval_runtime")  # with speeds, the figures that no two runs share
_FEWEST = 6  # steps: then the stop falls between two log lines


@dataclass(frozen=True)
class Part:
    """One thing that must be equal: how many values it has, how many differ, and by how much at most (0 for text)."""

    name: str
    values: int
    differ: int
    most: float = 0.0


@command("verify")
def main(cfg: DictConfig) -> None:
    """Trains once straight and once with a stop, each in a process of its own, and compares everything that is left."""
    from intern.display.table import show

    if cfg.check != "resume":
        raise UserError(f"check={cfg.check}: must be resume")
    if not isinstance(cfg.steps, int) or cfg.steps < _FEWEST:
        raise UserError(f"steps={cfg.steps}: must be a whole number, at least {_FEWEST}")
    folder = Path(HydraConfig.get().runtime.output_dir)
    half = cfg.steps // 2
    straight, stopped = Run(folder / "straight"), Run(folder / "resumed")
    straight.path.mkdir()
    straight.write_config(short(cfg, cfg.steps, half))
    _train(straight)
    stop_after(straight, half, stopped)
    _train(stopped)
    parts = list(compare(straight, stopped, cfg.steps))
    show(
        ["after the last step", "values", "that differ", "by at most"],
        [[part.name, str(part.values), str(part.differ), f"{part.most:.3g}"] for part in parts],
    )
    if not any(part.differ for part in parts):
        sys.stdout.write(
            f"A run that stops after step {half} and goes on ends bit for bit like one that never stopped.\n"
        )
        return
    # Does the machine repeat itself at all? The same half once more.
    again = Run(folder / "again")
    stop_after(straight, half, again)
    _train(again)
    repeats = not any(part.differ for part in compare(stopped, again, cfg.steps))
    reason = (
        "two resumes from the same checkpoint agree, so something is lost at a stop"
        if repeats
        else "two resumes from the same checkpoint differ too, so computing here does not repeat itself"
    )
    raise RunError(f"a resumed run differs from a straight one ({reason}): see {folder}")


def short(cfg: DictConfig, steps: int, half: int) -> DictConfig:
    """The configuration of the short run: `steps` steps with a checkpoint after `half` of them, and nothing beside training.

    Log lines come at intervals that do not end at the checkpoint, and deterministic kernels are chosen: some of a GPU's sum in
    whatever order its threads arrive.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    for key in _OWN:
        cfg.pop(key, None)
    cfg.logger = {}
    cfg.data.eval_file = None
    cfg.trainer.update(
        {
            "max_steps": steps,
            "min_steps": steps,
            "save_strategy": "steps",
            "save_steps": half,
            "save_total_limit": None,
            "logging_steps": half - 1,
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "early_stopping_patience": None,
            "full_determinism": cfg.trainer.get("full_determinism", not cfg.trainer.get("use_cpu", False)),
        }
    )
    return cfg


def stop_after(run: Run, step: int, copy: Run) -> None:
    """Makes `copy` the run as a kill right after the checkpoint of `step` would have left it."""
    for file in (run.config, run.environment, run.prompt, run.memory, run.history):
        if file.is_file():
            copy.path.mkdir(exist_ok=True)
            shutil.copy(file, copy.path)
    shutil.copytree(run.checkpoints / f"checkpoint-{step}", copy.checkpoints / f"checkpoint-{step}")


def compare(one: Run, other: Run, step: int) -> Iterator[Part]:
    """Everything that two runs of `step` steps must share: adapter, each part of the last checkpoint, the history."""
    import torch
    from safetensors.torch import load_file

    from intern.training.checkpoint_state import find_state

    yield _part("adapter", *(load_file(run.adapter / "adapter_model.safetensors") for run in (one, other)))
    names = {"optimizer.pt": "optimizer", "scheduler.pt": "learning rate schedule", "scaler.pt": "loss scale"}
    for file, name in (names | {"rng_state.pth": "random states"}).items():
        folders = [run.checkpoints / f"checkpoint-{step}" / file for run in (one, other)]
        if folders[0].is_file():
            from transformers.trainer_pt_utils import safe_globals

            with safe_globals():
                yield _part(name, *(torch.load(path, map_location="cpu", weights_only=True) for path in folders))
    states = [run.read_json(run.checkpoints / f"checkpoint-{step}" / "trainer_state.json") for run in (one, other)]
    for state in states:  # how long it took, and paths
        steps = find_state(state["stateful_callbacks"], "optimizer_steps")
        if steps is not None:
            steps["attributes"].pop("seconds")
        state.pop("best_model_checkpoint")
        state["log_history"] = [_timeless(entry) for entry in state["log_history"]]
    yield _part("position in the data, counts", *states)
    yield _part("history", *([_timeless(entry) for entry in run.read_history()] for run in (one, other)))


def _train(run: Run) -> None:
    """One training process; its messages go to standard error, which leaves standard output to the table."""
    line = [sys.executable, "-m", "intern.train", quoted("resume", str(run.path))]
    if (code := subprocess.run(line, check=False, stdout=sys.stderr).returncode) != 0:
        raise RunError(f"training in {run.path} ended with exit code {code}: its messages stand above")


def _timeless(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in _TIMES and not name.endswith("_per_second")}


def _part(name: str, one: Any, other: Any) -> Part:
    ours, theirs = dict(_leaves(one)), dict(_leaves(other))
    gaps = [_gap(ours.get(place), theirs.get(place)) for place in ours.keys() | theirs.keys()]
    return Part(
        name,
        sum(count for count, _, _ in gaps),
        sum(differ for _, differ, _ in gaps),
        max((gap for *_, gap in gaps), default=0.0),
    )


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor, number and text of nested dictionaries and lists, by its place."""
    if type(value).__module__ == "numpy":  # numpy's generator keeps an array
        value = value.tolist()
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}/{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{place}/{index}")
    else:
        yield place, value


def _gap(one: Any, other: Any) -> tuple[int, int, float]:
    """How many values there are, how many of them differ, and the largest difference of two numbers."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape and one.numel():
        apart = one.view(torch.uint8) != other.view(torch.uint8) if one.dim() else one != other
        if not bool(apart.any()):
            return one.numel(), 0, 0.0
        gaps = (one.double() - other.double()).abs().flatten()
        return one.numel(), int((gaps != 0).sum()) or 1, float(gaps.max())
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        same = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape
        return 1, int(not same), 0.0
    number = isinstance(one, int | float) and isinstance(other, int | float)
    return 1, int(one != other), float(abs(one - other)) if number else 0.0


if __name__ == "__main__":
    main()
