"""Is a resume exact? A short run with and without a stop, and everything in which the two run directories differ."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from intern.runs.directory import Run
from intern.training.checkpoint_state import find_state
from intern.training.plan import PlanPieces

OWN_KEYS = ("steps", "resume")  # of conf/verify.yaml, and what a short run does not have
FEWEST_STEPS = 6  # then the stop falls between two log lines
_TIMES = ("train_runtime", "eval_runtime")  # with speeds, the numbers in which all runs differ


@dataclass(frozen=True)
class Part:
    """One thing that must be equal: how many values it has, how many differ, and the largest difference (0 for text)."""

    name: str
    values: int
    differ: int
    largest: float = 0.0


def short_config(cfg: DictConfig, steps: int, half: int) -> DictConfig:
    """Return the configuration of the short run: only training, with a checkpoint after half of the steps.

    Log lines do not coincide with the checkpoint, and deterministic kernels are chosen: others sum in the order in which threads finish.

    Args:
        cfg: the composed conf/verify.yaml.
        steps: optimizer steps.
        half: the step of the checkpoint.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    for key in OWN_KEYS:
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
    """Make `copy` the run as a kill right after the checkpoint of `step` would have left it."""
    for file in (run.config, run.environment, run.prompt, run.memory, run.history):
        if file.is_file():
            copy.path.mkdir(exist_ok=True)
            shutil.copy(file, copy.path)
    shutil.copytree(run.checkpoints / f"checkpoint-{step}", copy.checkpoints / f"checkpoint-{step}")


def diff_runs(one: Run, other: Run, step: int) -> Iterator[Part]:
    """Compare everything that two runs of `step` steps must share: adapter, each part of the last checkpoint, history."""
    import torch
    from safetensors.torch import load_file

    yield _part("adapter", *(load_file(run.adapter / "adapter_model.safetensors") for run in (one, other)))
    names = {"optimizer.pt": "optimizer", "scheduler.pt": "learning rate schedule", "scaler.pt": "loss scale"}
    last = one.checkpoints / f"checkpoint-{step}"
    generators = [path.name for path in sorted(last.glob("rng_state*.pth"))]  # of each process
    for file, name in (names | dict.fromkeys(generators, "random states")).items():
        folders = [run.checkpoints / f"checkpoint-{step}" / file for run in (one, other)]
        if folders[0].is_file():
            from transformers.trainer_pt_utils import safe_globals

            with safe_globals():
                yield _part(name, *(torch.load(path, map_location="cpu", weights_only=True) for path in folders))
    states = [run.read_json(run.checkpoints / f"checkpoint-{step}" / "trainer_state.json") for run in (one, other)]
    for state in states:  # durations and paths
        steps = find_state(state["stateful_callbacks"], "optimizer_steps")
        if steps is not None:
            steps["attributes"].pop("seconds")
        state.pop("best_model_checkpoint")
        state["log_history"] = [_timeless(entry) for entry in state["log_history"]]
    yield _part("position in the data, counts", *states)
    yield _part("history", *([_timeless(entry) for entry in run.read_history()] for run in (one, other)))


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
    """Yield every tensor, number and text of nested dictionaries and lists, with its place."""
    if type(value).__module__ == "numpy":  # the state of numpy's generator is an array
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
    """Return how many values there are, how many differ, and the largest difference between numbers."""
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


def check_plan(cfg: DictConfig, run: Run) -> None:
    """Check the configuration as training will, except for this machine's GPU, which the training process itself asks.

    Raises:
        UserError: bad input.
    """
    PlanPieces(cfg, run, asks_gpu=False).take_all()
