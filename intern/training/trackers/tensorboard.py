"""TensorBoard: event files in RUN_DIR/tensorboard, shown by `tensorboard --logdir outputs`."""

import importlib.util
import logging
import re
from dataclasses import dataclass
from typing import Any

import yaml

from intern.config.build import build
from intern.display.text import markdown_text
from intern.errors import UserError
from intern.training.trackers import TrackedRun

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Checked values of conf/logger/tensorboard.yaml.

    Args:
        flush_secs: seconds after which logged values are written to the file.
        sample_answers: golden questions that are answered, shown as text.
    """

    flush_secs: int = 30
    sample_answers: int = 0


def check(values: dict[str, Any], group: str) -> Settings:
    """Raises UserError for an unknown key or a bad value, or if TensorBoard is not installed."""
    settings = build(Settings, values, group)
    if settings.flush_secs < 1:
        raise UserError(f"{group}.flush_secs={settings.flush_secs}: must be at least 1 second")
    if settings.sample_answers < 0:
        raise UserError(f"{group}.sample_answers={settings.sample_answers}: must be at least 0; 0 logs none")
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("logger=tensorboard needs TensorBoard: pip install 'intern[tensorboard]'")
    return settings


class TensorBoardTracker:
    """Event files of one run."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, entry: dict[str, Any]) -> None:
        """Log the numbers of one entry under the names of history.jsonl."""
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, entry["step"])

    def report(self, metrics: dict[str, Any], samples: list[dict[str, str]]) -> None:
        """Log the final metrics as final/NAME, and the sample answers as a table of text."""
        step = metrics["optimizer_steps"] + metrics["skipped_steps"]
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"final/{name}", value, step)
        if samples:
            rows = [list(samples[0]), ["---"] * len(samples[0]), *(list(sample.values()) for sample in samples)]
            table = "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)
            self._writer.add_text("answers", table, step)

    def finish(self, succeeded: bool) -> None:
        """Write what is not written yet; TensorBoard has no state of a run."""
        self._writer.close()


def open_tracker(settings: Settings, tracked: TrackedRun) -> TensorBoardTracker:
    """Begin event files; those of a run that resumes continue after the checkpoint's step."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tracked.run.path / "tensorboard"
    # TensorBoard hides what was logged from this step on before the run stopped: it is logged again.
    purged = tracked.step + 1 if tracked.step else None
    writer = SummaryWriter(log_dir=str(folder), purge_step=purged, flush_secs=settings.flush_secs)
    writer.add_text("configuration", _code(yaml.safe_dump(tracked.config, sort_keys=False)), tracked.step)
    log.info("TensorBoard: tensorboard --logdir %s", folder)
    return TensorBoardTracker(writer)


def _cell(text: str) -> str:
    """Return text as it can be in a cell of a Markdown table."""
    return markdown_text(" ".join(text.split())).replace("|", "\\|")


def _code(text: str) -> str:
    """Return YAML as a block of Markdown that nothing in it ends."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{fence}yaml\n{text}{fence}"
