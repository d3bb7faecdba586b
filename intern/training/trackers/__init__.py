"""conf/logger -> experiment trackers, for the time of a training run.

Every module of this package is a tracker, named like its option of conf/logger. To add one, write its module and its YAML file. The module
has two functions:

- `check(values, group)` checks the option's keys and returns settings, an object with `sample_answers`: how many golden questions the
  trained model answers for this tracker.
- `open_tracker(settings, tracked)` begins tracking and returns a `Tracker`.

The YAML file puts the option's keys under the tracker's name, so that several options can be combined: `logger=[wandb,tensorboard]`. Only
W&B's keys are directly in `logger`, where run directories and command lines have always had them.

transformers has integrations of its own (`report_to`). They are not used because they end with training: a run's final metrics, its sample
answers and its adapter come after that, a run that fails is left open, and they log transformers' names and not those of history.jsonl.
"""

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from omegaconf import DictConfig

from intern.config.build import check_names, plain
from intern.errors import UserError
from intern.runs.directory import Run

_WITHOUT_NAME = "wandb"  # the tracker whose keys are directly in `logger`


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker may show of a run when it begins.

    Args:
        run: the run directory; a tracker writes to a folder of its own in it.
        config: the whole configuration, as built-in types.
        run_id: 12 characters; a run that resumes has the same again.
        sweep: name of the sweep that the run belongs to; None for a single run.
        step: that of the checkpoint from which training resumes; 0 for a run from the beginning.
    """

    run: Run
    config: dict[str, Any]
    run_id: str
    sweep: str | None = None
    step: int = 0


class Tracker(Protocol):
    """One experiment tracker during one run."""

    def log(self, entry: dict[str, Any]) -> None:
        """Log one entry of training: the same as the line in history.jsonl, except that NaN and infinity are numbers."""

    def report(self, metrics: dict[str, Any], samples: list[dict[str, str]]) -> None:
        """Log the end of a run, whose adapter is saved by now.

        Args:
            metrics: those of metrics.json.
            samples: golden questions with `question`, `reference` and `answer`.
        """

    def finish(self, succeeded: bool) -> None:
        """End tracking; False if the run failed or was interrupted. Called once, whatever happened before."""


class Trackers:
    """All trackers of a run, as one; possibly none.

    Args:
        opened: trackers with their settings.
    """

    def __init__(self, opened: list[tuple[Tracker, Any]]) -> None:
        self._opened = opened

    @property
    def sample_answers(self) -> int:
        """How many golden questions are to be answered."""
        return max((settings.sample_answers for _, settings in self._opened), default=0)

    def log(self, entry: dict[str, Any]) -> None:
        """Log one entry of training."""
        for tracker, _ in self._opened:
            tracker.log(entry)

    def report(self, metrics: dict[str, Any], samples: list[dict[str, str]]) -> None:
        """Log the end of a run; each tracker gets no more samples than its settings say."""
        for tracker, settings in self._opened:
            tracker.report(metrics, samples[: settings.sample_answers])


def check_logger(node: DictConfig | None) -> dict[str, Any]:
    """Return the settings of each tracker, by its name; none for logger=none.

    Args:
        node: conf/logger.

    Raises:
        UserError: an unknown key, a bad value, or a tracker whose library is not installed.
    """
    values = plain(node)
    named = [name for name in _names() if name != _WITHOUT_NAME]
    settings = {}
    if direct := {key: value for key, value in values.items() if key not in named}:
        tracker = _module(_WITHOUT_NAME)
        check_names(direct, [*tracker.KEYS, *named], "logger")
        settings[_WITHOUT_NAME] = tracker.check(direct, "logger")
    for name in named:
        given = values.get(name)
        if given is None:
            continue
        if not isinstance(given, dict):
            raise UserError(f"logger.{name}={given}: must be a group of keys, as in conf/logger/{name}.yaml")
        settings[name] = _module(name).check(given, f"logger.{name}")
    return settings


@contextlib.contextmanager
def track(settings: dict[str, Any], tracked: TrackedRun) -> Iterator[Trackers]:
    """Track a run inside the block; every tracker is finished when the block ends, also if it fails.

    Args:
        settings: returned by check_logger.
        tracked: the run.

    Raises:
        UserError: a tracker's server refuses the run.
    """
    with contextlib.ExitStack() as stack:
        opened = []
        for name, one in settings.items():
            tracker: Tracker = _module(name).open_tracker(one, tracked)
            stack.push(lambda failure, *_, tracker=tracker: tracker.finish(failure is None))
            opened.append((tracker, one))
        yield Trackers(opened)


def _names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
