"""Weights & Biases: an online run, or an offline one that `wandb sync` uploads later."""

import functools
import logging
import os
from dataclasses import dataclass
from typing import Any

from intern.errors import UserError
from intern.training.trackers import TrackedRun

log = logging.getLogger(__name__)

_OWN = ("log_adapter", "sample_answers")
KEYS = ("project", "entity", "group", "tags", "mode", "notes", "job_type", *_OWN)  # of wandb.init, and our own
_MODES = ("online", "offline", "disabled")
# Seconds to wait for the server at the start, and for uploads at the end.
_START_TIMEOUT, _FINISH_TIMEOUT = 20, 600


@dataclass(frozen=True)
class Settings:
    """Checked values of conf/logger/wandb.yaml.

    Args:
        init: keyword arguments of wandb.init.
        log_adapter: whether the adapter becomes an artifact.
        sample_answers: golden questions that are answered for a table.
    """

    init: dict[str, Any]
    log_adapter: bool = False
    sample_answers: int = 0

    @property
    def mode(self) -> str | None:
        """online, offline or disabled; None: online with an API key, otherwise offline."""
        return self.init.get("mode")


def check(values: dict[str, Any], group: str) -> Settings:
    """Raises UserError for a bad value; names of keys are checked already."""
    if values.get("mode") not in (None, *_MODES):
        raise UserError(f"{group}.mode={values['mode']}: must be online, offline, disabled or null")
    if not isinstance(values.get("sample_answers", 0), int):
        raise UserError(f"{group}.sample_answers={values['sample_answers']}: must be a number of rows")
    own = {name: values[name] for name in _OWN if name in values}
    return Settings({name: value for name, value in values.items() if name not in _OWN}, **own)


class WandbTracker:
    """A W&B run."""

    def __init__(self, wandb_run: Any, settings: Settings, tracked: TrackedRun) -> None:
        self._run = wandb_run
        self._settings = settings
        self._tracked = tracked
        # Plots have our steps on their axis; W&B's own count one for every call, also after a resume.
        self._run.define_metric("*", step_metric="step")

    def log(self, entry: dict[str, Any]) -> None:
        """Log one entry of training."""
        self._run.log(entry)

    def report(self, metrics: dict[str, Any], samples: list[dict[str, str]]) -> None:
        """Log the final metrics as the summary, the sample answers as a table, the adapter as an artifact."""
        import wandb

        if samples:
            columns: list[str | int] = list(samples[0])
            table = wandb.Table(columns=columns, data=[list(sample.values()) for sample in samples])
            self._run.log({"answers": table})
        if self._settings.log_adapter:
            artifact = wandb.Artifact(f"adapter-{self._run.id}", type="model", metadata=metrics)
            for file in sorted(self._tracked.run.adapter.iterdir()):
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)
        self._run.summary.update(metrics)

    def finish(self, succeeded: bool) -> None:
        """End the W&B run as finished or failed."""
        self._run.finish(exit_code=0 if succeeded else 1)


def open_tracker(settings: Settings, tracked: TrackedRun) -> WandbTracker:
    """Begin a W&B run, or continue that of a run that resumes. An unreachable server makes it an offline run, with a warning.

    Raises:
        UserError: the server refuses the run.
    """
    import wandb

    # Its messages are in its own files; what a user can act on is logged below.
    logging.getLogger("wandb").propagate = False
    mode: Any = settings.mode
    is_chosen_here = mode is None and "WANDB_MODE" not in os.environ
    if is_chosen_here:
        mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
    init = {name: value for name, value in settings.init.items() if name != "mode"}
    folder = tracked.run.path
    init = {"notes": tracked.config.get("notes")} | {key: value for key, value in init.items() if value is not None}
    start = functools.partial(
        wandb.init,
        **init | {"group": init.get("group") or tracked.sweep},
        name=tracked.config.get("name") or f"{folder.parent.name}/{folder.name}",
        id=tracked.run_id,
        dir=str(folder),
        config=tracked.config,
        resume="allow",
        reinit="finish_previous",
        settings=wandb.Settings(
            console="off", silent=True, init_timeout=_START_TIMEOUT, finish_timeout=_FINISH_TIMEOUT
        ),
    )
    try:
        wandb_run = start(mode=mode)
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        is_unreachable = isinstance(error, wandb.errors.CommError)
        is_refused = not is_unreachable or isinstance(error, wandb.errors.AuthenticationError)
        if is_refused and not is_chosen_here:
            raise UserError(
                f"logger: W&B refuses the run ({reason}): check API key and entity, or set logger.mode=offline"
            ) from error
        log.warning("W&B cannot be reached (%s): this run is logged offline, and `wandb sync` uploads it later", reason)
        wandb.teardown()  # its helper process still holds the id of the run that did not start
        wandb_run = start(mode="offline")
    if wandb_run.settings.mode == "online":
        log.info("W&B: %s", wandb_run.url)
    else:
        log.info("W&B: %s, in %s", wandb_run.settings.mode, folder / "wandb")
    return WandbTracker(wandb_run, settings, tracked)
