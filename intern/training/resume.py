"""A stopped run -> the same run, resumed: its own configuration, and what may differ from it."""

import logging
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from intern.config.build import plain
from intern.config.secrets import from_environment, storable
from intern.data.settings import with_defaults
from intern.errors import UserError
from intern.runs.checkpoints import Checkpoint, Kind, examine_all
from intern.runs.directory import Run
from intern.runs.files import rename

log = logging.getLogger(__name__)

# What may change when a run resumes, and its effect. Any other change would make it another run.
MAY_CHANGE = {
    "trainer.max_steps": "higher: the run trains longer; the learning rate follows the longer schedule from there on",
    "trainer.save_steps": "how often checkpoints are written",
    "trainer.save_total_limit": "how many checkpoints are kept",
    "num_processes": "how many processes train, with trainer.gradient_accumulation_steps such that a step has the same rows",
    "name": "what the run is called",
    "notes": "why it was made",
    "data.num_proc": "how many processes tokenize",
    "logger.mode": "online, offline or disabled",
}
_ACCUMULATION = "trainer.gradient_accumulation_steps"  # changes with num_processes


def resumed_config(run: Run, composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the run's own config.yaml, with the overrides that a resumed run may have.

    Args:
        run: a stopped run.
        composed: conf/train.yaml with the overrides, for their values.
        overrides: those of the command line, such as "trainer.max_steps=300".

    Raises:
        UserError: an override that would change what is trained, or one that is missing: a value from the environment is not stored.
    """
    cfg = run.read_config()
    expressions = from_environment(composed)
    environment = run.read_json(run.environment) if run.has(run.environment) else {}
    missing = [key for key in map(str, environment.get("from_environment") or []) if key not in expressions]
    for text in overrides:
        key = text.partition("=")[0].lstrip("+~")
        if key == "resume":
            continue
        if key in expressions and expressions[key] == OmegaConf.select(cfg, key):
            OmegaConf.update(cfg, key, expressions[key])  # an expression again, which is stored as such again
            continue
        value = OmegaConf.select(composed, key)
        is_choice = "." not in key and key != "seed"  # an option of a group changes many keys at once
        if key not in MAY_CHANGE and key != _ACCUMULATION and (is_choice or value != OmegaConf.select(cfg, key)):
            raise UserError(_refusal(key, run))
        OmegaConf.update(cfg, key, value, force_add=True)
    if missing:
        key, value = missing[0], OmegaConf.select(cfg, missing[0])
        raise UserError(
            f"{key}: was read from the environment, so its value is not stored: give {shlex.quote(f'{key}={value}')} again"
        )
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
    ours, theirs = _flat(plain(cfg)), _flat(plain(run.read_config()))
    stored = _flat(storable(cfg))
    keys = (ours.keys() | theirs.keys()) - MAY_CHANGE.keys() - {_ACCUMULATION}
    # A value that follows another key (lora_alpha = 2 r) differs only because that one does: the other key is the one to name.
    for key in sorted(keys, key=lambda key: (_is_derived(cfg, key), key)):
        if theirs.get(key) not in (ours.get(key), stored.get(key)):
            raise UserError(_refusal(key, run))
    batches, batches_before = ((flat.get("num_processes") or 1) * flat[_ACCUMULATION] for flat in (ours, theirs))
    if batches != batches_before:
        count = ours.get("num_processes") or 1
        remedy = (
            f"give {_ACCUMULATION}={batches_before // count}"
            if batches_before % count == 0
            else f"choose num_processes so that it divides {batches_before}"
        )
        raise UserError(
            f"num_processes={count} {_ACCUMULATION}={ours[_ACCUMULATION]}: a step would have {batches} batches, and {run.path} was started "
            f"with {batches_before}: {remedy}"
        )
    most, before = ours["trainer.max_steps"], theirs["trainer.max_steps"]
    if 0 < most < before or most < 0 < before:
        raise UserError(
            f"trainer.max_steps={most}: {run.path} was started with {before}, and can only be trained longer"
        )
    known = run.read_json(run.environment)["data"]
    for path, sha256 in data.items():
        if known.get(path) != sha256:
            raise UserError(f"{path} has changed since {run.path} was started: choose another hydra.run.dir")


def choose_checkpoint(run: Run, needs_best: bool) -> tuple[Path | None, list[Checkpoint]]:
    """Return the newest checkpoint that is as it was written, None if there is none yet, and the newer ones, which cannot be used.

    Args:
        run: the run.
        needs_best: whether the run ends with the best checkpoint (trainer.load_best_model_at_end).

    Raises:
        UserError: every checkpoint is damaged.
    """
    seen = examine_all(run.checkpoints, run.path, needs_best)
    chosen = seen.pop() if seen and seen[-1].is_usable else None
    faults = "; ".join(one.fault for one in seen if one.kind is Kind.DAMAGED)
    if faults and chosen is None:
        raise UserError(
            f"{run.checkpoints}: no checkpoint is as it was written ({faults}): put that file back from a copy, or start again in another "
            f"hydra.run.dir, or in this one after removing {run.checkpoints}"
        )
    if chosen is None:
        if seen:
            log.warning("%s: was not written completely, and is the only one: training starts at step 1", seen[0].path)
        return None, seen
    if faults:
        log.warning("%s: %s; resuming from %s instead", run.checkpoints, faults, chosen.path.name)
    if chosen.kind is Kind.UNVERIFIED:
        log.warning("%s: an earlier version wrote no manifest, so its files cannot be verified", chosen.path)
    return chosen.path, seen


def set_aside(checkpoints: Sequence[Checkpoint], run: Run) -> None:
    """Make room for the checkpoints of steps that a resumed run trains again.

    One that a kill has cut short is removed. A damaged one is renamed to damaged-checkpoint-STEP: it may still be of use.

    Args:
        checkpoints: those that cannot be used.
        run: the run, which is locked.
    """
    for one in checkpoints:
        if one.kind is Kind.UNFINISHED:
            shutil.rmtree(one.path)
        else:
            aside = one.path.with_name(f"damaged-{one.path.name}")
            if aside.is_dir() and not aside.is_symlink():  # of an earlier resume
                shutil.rmtree(aside)
            rename(one.path, run.path, aside.name)


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
    if before.get("processes", 1) != now["processes"]:
        changed.append("the number of processes")
    if changed:
        log.warning("%s changed since this run was started: it resumes, but not bit for bit", ", ".join(changed))


def _is_derived(cfg: DictConfig, key: str) -> bool:
    group, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, group) if group else cfg
    return isinstance(node, DictConfig) and name in node and OmegaConf.is_interpolation(node, name)


def _refusal(key: str, run: Run) -> str:
    return (
        f"{key} differs from what {run.path} was started with: use the same (or only resume={run.path}), "
        f"or choose another hydra.run.dir; only {', '.join(MAY_CHANGE)} may change"
    )


def _flat(groups: dict[str, Any]) -> dict[str, Any]:
    """Return {"lora.r": 16, ...} for a configuration of groups."""
    groups["data"] = with_defaults(groups["data"])  # a run that is older than a key has its default
    return {
        f"{group}.{key}" if key else group: value
        for group, values in groups.items()
        if group != "resume"
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
