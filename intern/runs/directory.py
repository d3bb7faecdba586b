"""The files of one run: what training writes and everything after reads; the only thing that the two share."""

import contextlib
import errno
import fcntl
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open

from intern.errors import BusyError, RunError, UserError, one_line
from intern.runs.untrusted import json_object, read_text, yaml_mapping

SCHEMA_VERSION = 1
_HISTORY = 2**28  # bytes: a million log steps
_GROUPS = ("model", "quant", "lora", "trainer", "data", "logger")
_DRAFTS = (
    ".config.yaml.",
    ".metrics.json.",
    ".history.jsonl.",
    ".environment.json.",
    ".prompt.json.",
    ".memory.json.",
    ".loss.png",
)
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
RUN_ROOTS = ("outputs", "multirun")  # where Hydra puts runs, in the working directory


@dataclass(frozen=True)
class Run:
    """A run directory. Files appear by rename and metrics.json comes last: a run with metrics.json is whole."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def prompt(self) -> Path:
        return self.path / "prompt.json"

    @property
    def memory(self) -> Path:
        return self.path / "memory.json"

    @property
    def loss_plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def failure(self) -> Path:
        return self.path / "failure.json"

    @property
    def finished(self) -> bool:
        return self.metrics.is_file()

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end; None where there is none."""
        numbered = [path for path in self.checkpoints.glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdigit()]
        whole = (
            path for path in sorted(numbered, key=lambda path: -int(path.name.rsplit("-", 1)[1])) if _is_whole(path)
        )
        return next(whole, None)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time. The system takes the lock back when its process ends, however it ends.

        Raises:
            UserError: another process has it.
        """
        with (self.path / "run.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyError(
                    f"{self.path}: another process trains in it: wait for it, or take another hydra.run.dir"
                ) from error
            yield

    @contextlib.contextmanager
    def told_when_full(self) -> Iterator[None]:
        """Raises RunError, with the remedy, where something inside could not be written: a full disk, or one that is read-only."""
        try:
            yield
        except Exception as error:  # libraries wrap what the system said in errors of their own
            reason = _unwritable(error)
            if reason is None:
                raise
            free = shutil.disk_usage(self.path).free / 2**30
            raise RunError(
                f"{self.path}: {reason} ({free:.1f} GiB are free there): make room or mend that; what was written stays, "
                f"and python -m intern.train {shlex.quote(f'resume={self.path}')} goes on from the last checkpoint"
            ) from error

    def drop_drafts(self) -> None:
        """Removes what a kill left of files that never got their names."""
        for draft in self.path.glob(".*"):
            if draft.name.startswith(".adapter-"):
                shutil.rmtree(draft)
            elif draft.is_file() and draft.name.startswith(_DRAFTS):
                draft.unlink()

    def write_config(self, cfg: DictConfig) -> None:
        """The configuration with every interpolation resolved."""
        _write(self.config, OmegaConf.to_yaml(cfg, resolve=True))

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        """One JSON object, whole or not at all."""
        _write(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def append_history(self, entry: dict[str, Any]) -> None:
        """One line for one log step."""
        with self.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read_config(self) -> DictConfig:
        """Raises UserError where the file is missing or not a configuration. Nothing in it is looked up: "${oc.env:HOME}" is text."""
        values = yaml_mapping(self.config, self.path)
        for group in _GROUPS:
            if not isinstance(values.get(group) or {}, dict):
                raise UserError(f"{self.config}: {group} is no group of keys: is {self.path} a run directory?")
        return OmegaConf.create(values)

    def read_json(self, path: Path) -> dict[str, Any]:
        """Raises UserError where the file is missing or not a JSON object."""
        return json_object(path, self.path)

    def read_history(self) -> list[dict[str, Any]]:
        """The log steps so far; a last line that a crash cut short is left out."""
        entries = []
        if self.history.exists():
            for line in read_text(self.history, self.path, _HISTORY).splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    if isinstance(entry := json.loads(line), dict) and isinstance(entry.get("step"), int):
                        entries.append(entry)
        return entries

    def drop_history_after(self, step: int) -> None:
        """Forgets the log steps behind a checkpoint: they come again when training goes on from it."""
        if not self.history.exists():
            return
        kept = [json.dumps(entry) + "\n" for entry in self.read_history() if entry["step"] <= step]
        _write(self.history, "".join(kept))

    @contextlib.contextmanager
    def new_adapter(self) -> Iterator[Path]:
        """A folder to save the adapter into; it becomes adapter/ when everything is written, and replaces an older one."""
        draft = Path(tempfile.mkdtemp(prefix=".adapter-", dir=self.path))
        try:
            yield draft
        except BaseException:
            shutil.rmtree(draft)
            raise
        (draft / "README.md").unlink(missing_ok=True)  # PEFT's form for a model card, with every field still to fill in
        draft.chmod(0o755)
        for file in draft.iterdir():
            file.chmod(0o644)
        if self.adapter.exists():
            shutil.rmtree(self.adapter)
        draft.rename(self.adapter)

    @contextlib.contextmanager
    def noting_failure(self) -> Iterator[None]:
        """failure.json says why the last attempt in this folder failed; there is none where it did not, or where another process is at work."""
        try:
            yield
        except BusyError:
            raise
        except Exception as error:  # of whatever kind: it goes on to whoever shows it
            told = {
                "exit_code": 2 if isinstance(error, UserError) else 1,
                "error": one_line(error),
                "begins_anew": not isinstance(error, UserError) and _unwritable(error) is None,
            }
            if not self.finished:
                with contextlib.suppress(OSError):  # a full disk may be what went wrong
                    self.write_json(self.failure, told)
            raise
        self.failure.unlink(missing_ok=True)

    def discard_failed_attempt(self) -> None:
        """Takes away what a training that failed by itself would go on from, so that it begins anew: not after bad input or a full disk."""
        if self.finished or not self.failure.is_file() or not self.read_json(self.failure).get("begins_anew"):
            return
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for file in (self.history, self.environment):  # the latter holds the id of the tracker's run, which has failed
            file.unlink(missing_ok=True)

    def score(self) -> float:
        """What "best" compares, lower is better: the loss on the golden answers, or on the training rows where nothing was evaluated."""
        metrics = self.read_json(self.metrics)
        loss = metrics.get("eval_loss", metrics.get("train_loss"))
        return float(loss) if isinstance(loss, int | float) and abs(loss) < sys.float_info.max else math.inf


def resolve(run_dir: str | Path, root: Path | None = None) -> Run:
    """The finished run that a user means.

    Args:
        run_dir: a run's folder; a folder of runs such as a sweep's (its best job); "latest" or "best", among all runs below
            outputs/ and multirun/ of `root`.
        root: the folder of outputs/ and multirun/; the working directory by default.

    Raises:
        UserError: there is no such run, or it is not finished.
    """
    root = root or Path.cwd()
    if str(run_dir) in ("latest", "best"):
        runs = [run for name in RUN_ROOTS for run in runs_below(root / name)]
        if not runs:
            raise UserError(
                f"run_dir={run_dir}: no finished run below {root}/outputs or {root}/multirun: train one, or give its path"
            )
        return (
            max(runs, key=lambda run: run.metrics.stat().st_mtime)
            if str(run_dir) == "latest"
            else min(runs, key=Run.score)
        )
    path = Path(run_dir).expanduser()
    path = path if path.is_absolute() else root / path
    if not path.is_dir():
        raise UserError(f"run_dir={run_dir}: no such folder")
    run = Run(path.resolve())
    if run.finished:
        return run
    if run.config.is_file():
        raise UserError(
            f"run_dir={run_dir}: this run is unfinished (no metrics.json): python -m intern.train {shlex.quote(f'resume={run.path}')} goes on with it"
        )
    runs = list(runs_below(path))
    if not runs:
        raise UserError(f"run_dir={run_dir}: neither a run (no config.yaml) nor a folder of finished runs")
    return min(runs, key=Run.score)


def stopped(run_dir: str | Path, root: Path | None = None) -> Run:
    """The run that resume= means.

    Args:
        run_dir: a run's folder, or "latest": the newest unfinished run below outputs/ and multirun/ of `root`.
        root: the working directory by default.

    Raises:
        UserError: there is no such run.
    """
    root = root or Path.cwd()
    if str(run_dir) == "latest":
        found = [Run(config.parent.resolve()) for name in RUN_ROOTS for config in (root / name).rglob("config.yaml")]
        runs = [run for run in found if run.path.name != ".hydra" and not run.finished]
        if not runs:
            raise UserError(f"resume=latest: no unfinished run below {root}/outputs or {root}/multirun")
        return max(
            runs, key=lambda run: max(file.stat().st_mtime for file in (run.config, run.history) if file.exists())
        )
    path = root / Path(run_dir).expanduser()
    if not (run := Run(path.resolve())).config.is_file():
        raise UserError(f"resume={run_dir}: no run there that could go on (no config.yaml)")
    return run


def _unwritable(error: BaseException) -> str | None:
    """What the system said, from the chain of errors that libraries made of it; None where it was about something else."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.errno in _UNWRITABLE:
            return os.strerror(current.errno or 0)
        for number in _UNWRITABLE:  # safetensors and torch keep no more than the text
            if not isinstance(current, UserError | RunError) and f"(os error {number})" in str(current):
                return os.strerror(number)
        if "PytorchStreamWriter failed writing" in str(current):
            return os.strerror(errno.ENOSPC)
        current = current.__cause__ or current.__context__
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end.

    The library writes trainer_state.json last, so without it a kill came in between. A disk that filled up can also have cut a file:
    safetensors files and torch's (zip archives) show that by their lengths.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / "adapter_model.safetensors", framework="pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(checkpoint / name) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"))


def runs_below(folder: Path) -> Iterator[Run]:
    """The finished runs in a folder and its subfolders."""
    for metrics in sorted(folder.rglob("metrics.json")):
        if (run := Run(metrics.parent.resolve())).config.is_file():
            yield run


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
