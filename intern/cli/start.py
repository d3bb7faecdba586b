"""The folder of a run until the run is accepted: nothing in it is changed, and one that Hydra made for a refused run is removed again.

Hydra makes the folder, writes .hydra/ and opens the log file before the task runs, so also for a task that refuses its configuration. Here
.hydra/ and the log file wait until the task says that the run has started (`Start`), and `Folders` notes which folders were not there.
"""

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from intern import processes
from intern.cli import sweep
from intern.runs.directory import Run

# A run that has started, or tells why not, has one of these.
_OF_A_START = ("config.yaml", "run.lock", "train.log", "failure.json")


class RunLog(logging.Handler):
    """A log file that is opened when the run has started; until then its messages are kept.

    Args:
        filename: the file; messages are appended.
    """

    def __init__(self, filename: str) -> None:
        super().__init__()
        self._filename = filename
        self._file: logging.FileHandler | None = None
        self._kept: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if self._file is None:
            self._kept.append(record)
        else:
            self._file.handle(record)

    def open(self) -> None:
        """Write the messages so far, and from now on each one when it comes."""
        if self._file is None:
            self._file = logging.FileHandler(self._filename, encoding="utf-8")
            self._file.setFormatter(self.formatter)
            for record in self._kept:
                self._file.handle(record)
            self._kept = []

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def open_logs() -> None:
    """Open the log files of the present job."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, RunLog):
            handler.open()


class Start:
    """Called when a run has started: writes what Hydra would have written before, and opens the log file.

    Args:
        run: the run directory.
        cfg: the configuration of the job, as composed.
    """

    def __init__(self, run: Run, cfg: DictConfig) -> None:
        self.has_begun = False
        self._run = run
        self._cfg = cfg

    def __call__(self) -> None:
        if self.has_begun:
            return
        self.has_begun = True
        open_logs()
        if (
            self._cfg.resume is None and processes.is_main()
        ):  # a resumed run keeps the command line that it was started with
            overrides = HydraConfig.get().overrides.task
            files = {"config": self._cfg, "hydra": HydraConfig.instance().cfg, "overrides": overrides}
            for name, content in files.items():
                self._run.write_text(self._run.path / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(content))


class Folders(Callback):
    """hydra.callbacks: notes which folders Hydra is about to make, for `remove_unused`."""

    # Of this process: Hydra makes the object itself and gives it to nothing else.
    made: ClassVar[list[Path]] = []  # the deepest first
    sweep_file: ClassVar[tuple[Path, bytes] | None] = (
        None  # what a sweep that is started again has there, which Hydra overwrites
    )

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._note(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._note(config.hydra.sweep.dir)
        if (file := Path(config.hydra.sweep.dir) / "multirun.yaml").is_file():
            Folders.sweep_file = file, file.read_bytes()

    def _note(self, folder: str) -> None:
        path = Path(folder).absolute()
        Folders.made = [one for one in (path, *path.parents) if not one.exists()]


def remove_unused() -> None:
    """Remove the folders that Hydra made in this process for a run that did not start, or for a sweep all of whose jobs were refused.

    The reasons have been shown. Folders around them, such as that of the date, are removed if nothing else is in them.
    """
    made, sweep_file = Folders.made, Folders.sweep_file
    Folders.made, Folders.sweep_file = [], None
    if sweep.record.all_refused and sweep_file is not None:
        path, content = sweep_file
        path.write_bytes(content)
    if not made or not (folder := made[0]).is_dir():
        return
    names = ("config.yaml",) if sweep.record.overrides and sweep.record.all_refused else _OF_A_START
    # At most Hydra's file of the sweep, the reasons of its jobs, and files of a tracker that refused the run.
    is_unused = not any((place / name).exists() for place in (folder, *folder.iterdir()) for name in names)
    with contextlib.suppress(OSError):  # a folder around it with other files stays
        if is_unused:
            shutil.rmtree(folder)
            for path in made[1:]:
                path.rmdir()
