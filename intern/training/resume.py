"""A run that stopped -> the same run, gone on with: its own configuration, and what the library forgets at a checkpoint."""

import logging
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from intern.config.build import plain
from intern.data.settings import with_defaults
from intern.errors import UserError
from intern.runs.directory import Run

log = logging.getLogger(__name__)

# What may differ when a run goes on, and what that does. Everything else would make it another run.
MAY_CHANGE = {
    "trainer.max_steps": "higher: the run goes on longer; the learning rate follows the longer schedule from there on",
    "trainer.save_steps": "how often checkpoints are written",
    "trainer.save_total_limit": "how many checkpoints are kept",
    "data.num_proc": "how many processes tokenize",
    "logger.mode": "online, offline or disabled",
}


def own_config(run: Run, composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The run's own config.yaml, with those overrides that a run may go on with.

    Args:
        composed: conf/train.yaml with the overrides, for their values.
        overrides: what stands on the command line, such as "trainer.max_steps=300".

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
    """Raises UserError where a run with checkpoints was begun with another configuration or other data.

    Args:
        data: SHA-256 of each data file, by its path.
    """
    ours, theirs = _flat(cfg), _flat(run.read_config())
    for key in sorted((ours.keys() | theirs.keys()) - MAY_CHANGE.keys()):
        if ours.get(key) != theirs.get(key):
            raise UserError(_refusal(key, run))
    most, before = ours["trainer.max_steps"], theirs["trainer.max_steps"]
    if 0 < most < before or most < 0 < before:
        raise UserError(f"trainer.max_steps={most}: {run.path} was begun with {before}, and can only go on longer")
    stored = run.read_json(run.environment)["data"]
    for path, sha256 in data.items():
        if stored.get(path) != sha256:
            raise UserError(f"{path} has changed since {run.path} was begun: take another hydra.run.dir")


def goes_on_longer(cfg: DictConfig, run: Run) -> bool:
    """Whether more steps are asked of a finished run than it was finished with."""
    return cfg.trainer.get("max_steps", -1) > max(0, run.read_config().trainer.get("max_steps", -1))


def tell_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warns where a run goes on with other libraries or on another GPU: figures stay right, but not bit for bit."""
    changed = [name for name, version in now["packages"].items() if before.get("packages", {}).get(name) != version]
    if before.get("gpu") != now["gpu"]:
        changed.append("the GPU")
    if changed:
        log.warning("%s changed since this run was begun: it goes on, but not bit for bit", ", ".join(changed))


def _refusal(key: str, run: Run) -> str:
    return (
        f"{key} is not what {run.path} was begun with: give the same (or resume={run.path} alone), "
        f"or take another hydra.run.dir; only {', '.join(MAY_CHANGE)} may change"
    )


def _flat(cfg: DictConfig) -> dict[str, Any]:
    """{"lora.r": 16, ...} of a configuration of groups."""
    groups = plain(cfg)
    groups["data"] = with_defaults(groups["data"])  # a run from before a key was there has its default
    return {
        f"{group}.{key}" if key else group: value
        for group, values in groups.items()
        if group != "resume"
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


class Carried(TrainerCallback, ExportableState):
    """Carries over a stop what the library does not: the running means of the next log line."""

    def __init__(self) -> None:
        self.trainer: Any = None  # set when it is built: it is built with its callbacks

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the sum of losses since the last log line, that line's step, TRL's figures since then."""
        begun = hasattr(self.trainer, "_tr_loss")
        return {
            "args": {},
            "attributes": {
                "loss_sum": self.trainer._tr_loss.item() if begun else 0.0,
                "last_logged": self.trainer._globalstep_last_logged if begun else 0,
                "tokens": self.trainer._total_train_tokens if begun else 0,
                "figures": {name: list(values) for name, values in self.trainer._metrics["train"].items()}
                if begun
                else {},
            },
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stored: Any = state.stateful_callbacks
        if not state.global_step:
            return
        window = stored[type(self).__name__]["attributes"]
        self.trainer._tr_loss.fill_(window["loss_sum"])
        self.trainer._globalstep_last_logged = window["last_logged"]
        self.trainer._total_train_tokens = window["tokens"]
        self.trainer._metrics["train"].clear()
        self.trainer._metrics["train"].update({name: list(values) for name, values in window["figures"].items()})
