"""A stopped run -> the same run, resumed: its own configuration, and what may differ from it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from intern.config.build import plain
from intern.data.settings import with_defaults
from intern.errors import UserError
from intern.runs.directory import Run

log = logging.getLogger(__name__)

# What may change when a run resumes, and its effect. Any other change would make it another run.
MAY_CHANGE = {
    "trainer.max_steps": "higher: the run trains longer; the learning rate follows the longer schedule from there on",
    "trainer.save_steps": "how often checkpoints are written",
    "trainer.save_total_limit": "how many checkpoints are kept",
    "name": "what the run is called",
    "notes": "why it was made",
    "data.num_proc": "how many processes tokenize",
    "logger.mode": "online, offline or disabled",
}


def resumed_config(run: Run, composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the run's own config.yaml, with the overrides that a resumed run may have.

    Args:
        run: a stopped run.
        composed: conf/train.yaml with the overrides, for their values.
        overrides: those of the command line, such as "trainer.max_steps=300".

    Raises:
        UserError: an override that would change what is trained.
    """
    cfg = run.read_config()
    for text in overrides:
        key = text.partition("=")[0].lstrip("+~")
        if key == "resume":
            continue
        value = OmegaConf.select(composed, key)
        is_choice = "." not in key and key != "seed"  # an option of a group changes many keys at once
        if key not in MAY_CHANGE and (is_choice or value != OmegaConf.select(cfg, key)):
            raise UserError(_refusal(key, run))
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def check_same(cfg: DictConfig, run: Run, data: dict[str, str]) -> None:
    """Check that a run with checkpoints is resumed with the configuration and data that it was started with.

    Args:
        cfg: the configuration now.
        run: the run.
        data: SHA-256 of each data file, by its path.

    Raises:
        UserError: something else differs than `MAY_CHANGE`.
    """
    ours, theirs = _flat(cfg), _flat(run.read_config())
    for key in sorted((ours.keys() | theirs.keys()) - MAY_CHANGE.keys()):
        if ours.get(key) != theirs.get(key):
            raise UserError(_refusal(key, run))
    most, before = ours["trainer.max_steps"], theirs["trainer.max_steps"]
    if 0 < most < before or most < 0 < before:
        raise UserError(
            f"trainer.max_steps={most}: {run.path} was started with {before}, and can only be trained longer"
        )
    stored = run.read_json(run.environment)["data"]
    for path, sha256 in data.items():
        if stored.get(path) != sha256:
            raise UserError(f"{path} has changed since {run.path} was started: choose another hydra.run.dir")


def extends_training(cfg: DictConfig, run: Run) -> bool:
    """Whether trainer.max_steps is higher than the one that a finished run ended with."""
    return cfg.trainer.get("max_steps", -1) > max(0, run.read_config().trainer.get("max_steps", -1))


def step_of(checkpoint: Path | None) -> int:
    """Return the step that a checkpoint folder is named after; 0 without a checkpoint."""
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint is not None else 0


def warn_if_environment_changed(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn if a run resumes with other libraries or on another GPU: it is then not the same bit for bit.

    Args:
        before: the run's environment.json.
        now: what it will be.
    """
    changed = [name for name, version in now["packages"].items() if before.get("packages", {}).get(name) != version]
    if before.get("gpu") != now["gpu"]:
        changed.append("the GPU")
    if changed:
        log.warning("%s changed since this run was started: it resumes, but not bit for bit", ", ".join(changed))


def _refusal(key: str, run: Run) -> str:
    return (
        f"{key} differs from what {run.path} was started with: use the same (or only resume={run.path}), "
        f"or choose another hydra.run.dir; only {', '.join(MAY_CHANGE)} may change"
    )


def _flat(cfg: DictConfig) -> dict[str, Any]:
    """Return {"lora.r": 16, ...} for a configuration of groups."""
    groups = plain(cfg)
    groups["data"] = with_defaults(groups["data"])  # a run that is older than a key has its default
    return {
        f"{group}.{key}" if key else group: value
        for group, values in groups.items()
        if group != "resume"
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
