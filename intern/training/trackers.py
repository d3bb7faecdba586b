"""conf/logger -> a W&B run for the time of a training run; nothing for logger=none."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig

from intern.config.build import check_names, plain
from intern.errors import UserError
from intern.runs.directory import Run

log = logging.getLogger(__name__)

_KEYS = ["project", "entity", "group", "tags", "mode", "notes", "job_type", "log_adapter", "sample_answers"]


_START, _END = 20, 600  # seconds that a run waits for a W&B server at its start, and for its uploads at its end


class Tracker:
    """What a training run reports beside its own files. Without a W&B run every call does nothing."""

    def __init__(self, wandb_run: Any = None, log_adapter: bool = False, sample_answers: int = 0) -> None:
        self._run = wandb_run
        self._log_adapter = log_adapter
        self.sample_answers = sample_answers

    def log(self, entry: dict[str, Any]) -> None:
        """One log step of training: the same figures as the line in history.jsonl."""
        if self._run is not None:
            self._run.log(entry)

    def report(self, run: Run, metrics: dict[str, Any], samples: list[dict[str, str]]) -> None:
        """The final figures, the sample answers as a table, the adapter as an artifact."""
        if self._run is None:
            return
        import wandb

        if samples:
            columns: list[str | int] = list(samples[0])
            self._run.log({"answers": wandb.Table(columns=columns, data=[list(sample.values()) for sample in samples])})
        if self._log_adapter:
            artifact = wandb.Artifact(f"adapter-{self._run.id}", type="model", metadata=metrics)
            for file in sorted(run.adapter.iterdir()):
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)
        self._run.summary.update(metrics)


def check_logger(node: DictConfig | None) -> dict[str, Any]:
    """The logger group's values; empty for logger=none. Raises UserError for an unknown key or mode."""
    values = plain(node)
    if values:
        check_names(values, _KEYS, "logger")
        if values.get("mode") not in (None, "online", "offline", "disabled"):
            raise UserError(f"logger.mode={values['mode']}: must be online, offline, disabled or null")
        if not isinstance(values.get("sample_answers", 0), int):
            raise UserError(f"logger.sample_answers={values['sample_answers']}: must be a number of rows")
    return values


@contextlib.contextmanager
def tracking(values: dict[str, Any], cfg: DictConfig, run: Run, run_id: str, sweep: str | None) -> Iterator[Tracker]:
    """A tracker that ends with the right state whatever happens inside.

    Args:
        values: what check_logger returned.
        cfg: the whole configuration, for W&B's overview.
        run_id: names the W&B run, so that a resumed run goes on in it.
        sweep: names the sweep that this run is a job of, None for a single run.
    """
    if not values:
        yield Tracker()
        return
    import wandb

    logging.getLogger(
        "wandb"
    ).propagate = False  # what it logs is in its own files; what a user can act on is said below
    own = {name: values.pop(name) for name in ("log_adapter", "sample_answers") if name in values}
    values["group"] = values.get("group") or sweep
    chosen = values.get("mode") is None and "WANDB_MODE" not in os.environ
    if chosen:
        values["mode"] = "online" if wandb.login(prompt=False, verify=False) else "offline"
    start = functools.partial(
        wandb.init,
        **{name: value for name, value in values.items() if name != "mode"},
        name=f"{run.path.parent.name}/{run.path.name}",
        id=run_id,
        dir=str(run.path),
        config=plain(cfg),
        resume="allow",
        reinit="finish_previous",
        settings=wandb.Settings(console="off", silent=True, init_timeout=_START, finish_timeout=_END),
    )
    try:
        wandb_run = start(mode=values.get("mode"))
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        unreachable = isinstance(error, wandb.errors.CommError) and not isinstance(
            error, wandb.errors.AuthenticationError
        )
        if not chosen and not unreachable:
            raise UserError(
                f"logger: W&B refuses ({reason}): check key and entity, or take logger.mode=offline"
            ) from error
        log.warning("W&B cannot be reached (%s): this run is logged offline, and `wandb sync` uploads it later", reason)
        wandb.teardown()  # its helper process holds on to the id of the run that did not start
        wandb_run = start(mode="offline")
    if wandb_run.settings.mode == "online":
        log.info("W&B: %s", wandb_run.url)
    else:
        log.info("W&B: %s, in %s", wandb_run.settings.mode, run.path / "wandb")
    wandb_run.define_metric("*", step_metric="step")
    exit_code = 1
    try:
        yield Tracker(wandb_run, **own)
        exit_code = 0
    finally:
        wandb_run.finish(exit_code=exit_code)
