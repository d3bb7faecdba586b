"""The files of one run: what training writes and everything else reads. All of them are opened by intern.runs.files."""

import contextlib
import json
import math
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

from intern.errors import UserError
from intern.paths import CONF_DIR
from intern.runs.files import (
    append_text,
    check_folder,
    exists,
    make_folder,
    remove_file,
    replace_file,
    write_text,
)
from intern.runs.untrusted import json_object, read_text, yaml_mapping

SCHEMA_VERSION = 1
_LONGEST_HISTORY = 2**28  # bytes: a million log steps
_GROUPS = ("model", "quant", "lora", "trainer", "data", "logger")
PARTIAL_FILES = (
    ".config.yaml.",
    ".metrics.json.",
    ".history.jsonl.",
    ".environment.json.",
    ".prompt.json.",
    ".memory.json.",
    ".failure.json.",
    ".loss.png",
)


@dataclass(frozen=True)
class Run:
    """A run directory. Files appear by rename and metrics.json comes last: a run with metrics.json is complete."""

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
        """Return the newest complete checkpoint, None if there is none.

        Raises:
            UserError: checkpoints/ or something in it is a link, through which training would write.
        """
        if not self.checkpoints.is_symlink() and not self.checkpoints.exists():
            return None
        names = [name for name in check_folder(self.checkpoints, self.path) if name.startswith("checkpoint-")]
        steps = sorted(
            (int(name.rsplit("-", 1)[1]) for name in names if name.rsplit("-", 1)[1].isdecimal()), reverse=True
        )
        folders = (self.checkpoints / f"checkpoint-{step}" for step in steps)
        return next((folder for folder in folders if _is_complete(folder, self.path)), None)

    def remove_partial_files(self) -> None:
        """Remove what a killed process left of files that never got their names."""
        for draft in self.path.glob(".*"):
            if draft.name.startswith(".adapter-") and not draft.is_symlink():
                shutil.rmtree(draft)
            elif draft.is_file() and draft.name.startswith(PARTIAL_FILES):
                draft.unlink()

    def write_config(self, cfg: DictConfig) -> None:
        """Write the configuration with every interpolation resolved."""
        self.write_text(self.config, OmegaConf.to_yaml(cfg, resolve=True))

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        """Write one JSON object, complete or not at all."""
        self.write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file of the run, complete or not at all, and never through a link. Folders around it are created.

        Raises:
            UserError: it or a folder around it is a link or of another kind.
        """
        make_folder(path.parent, self.path)
        write_text(path, self.path, text)

    def append_text(self, path: Path, text: str) -> None:
        """Append to a text file of the run, never through a link."""
        append_text(path, self.path, text)

    @contextlib.contextmanager
    def new_file(self, path: Path) -> Iterator[Path]:
        """Give a library a path to write to; the file then takes the place of `path`, never through a link.

        Raises:
            UserError: `path` or a folder around it is a link or of another kind.
        """
        make_folder(path.parent, self.path)
        with tempfile.TemporaryDirectory() as folder, replace_file(path, self.path) as target:
            written = Path(folder) / path.name
            yield written
            with written.open("rb") as source:
                shutil.copyfileobj(source, target)

    def prepare_evaluation(self, name: str) -> Path:
        """Create RUN/evaluation/NAME and check that an evaluation can write to it by path: nothing in it leads to a file elsewhere.

        Raises:
            UserError: the folder, evaluation/ or something in it is a link, a hard link or a special file.
        """
        folder = self.evaluation / name
        make_folder(folder, self.path)
        check_folder(folder, self.path, is_written=True)
        return folder

    def has(self, path: Path) -> bool:
        """Return whether the run has this file; raise UserError if it is a link, or no regular file."""
        return exists(path, self.path)

    def remove(self, path: Path) -> None:
        """Remove a file of the run if there is one; raise UserError if a folder around it is a link."""
        remove_file(path, self.path)

    def append_history(self, entry: dict[str, Any]) -> None:
        """Append the line of one log step."""
        self.append_text(self.history, json.dumps(entry) + "\n")

    def read_config(self) -> DictConfig:
        """Return the configuration. Nothing in it is looked up: "${oc.env:HOME}" is text.

        Raises:
            UserError: the file is missing or not a configuration.
        """
        values = yaml_mapping(self.config, self.path)
        for group in _GROUPS:
            if not isinstance(values.get(group) or {}, dict):
                raise UserError(f"{self.config}: {group} is not a group of keys: is {self.path} a run directory?")
        return OmegaConf.create(values)

    def read_config_to_load(self) -> DictConfig:
        """Return the configuration to load the run's model with: where quantized bases are cached is the user's choice, not the run's.

        Raises:
            UserError: the file is missing or not a configuration.
        """
        cfg = self.read_config()
        if OmegaConf.select(cfg, "model.quantized_cache") is not None:
            shipped = OmegaConf.load(CONF_DIR / "model" / "llama3_8b.yaml")
            OmegaConf.update(cfg, "model.quantized_cache", shipped.quantized_cache)
            OmegaConf.update(cfg, "model.quantized_cache_gib", shipped.quantized_cache_gib)
        return cfg

    def read_json(self, path: Path) -> dict[str, Any]:
        """Return a JSON object; raise UserError if the file is missing or something else."""
        return json_object(path, self.path)

    def read_history(self) -> list[dict[str, Any]]:
        """Return the log steps so far; a last line that a crash cut short is left out."""
        entries = []
        if self.has(self.history):
            for line in read_text(self.history, self.path, _LONGEST_HISTORY).splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    if isinstance(entry := json.loads(line), dict) and isinstance(entry.get("step"), int):
                        entries.append(entry)
        return entries

    def drop_history_after(self, step: int) -> None:
        """Remove the log steps after a checkpoint: training logs them again when it resumes from there."""
        if not self.has(self.history):
            return
        kept = [json.dumps(entry) + "\n" for entry in self.read_history() if entry["step"] <= step]
        self.write_text(self.history, "".join(kept))

    @contextlib.contextmanager
    def new_adapter(self) -> Iterator[Path]:
        """Give a folder to save the adapter into. It becomes adapter/ once everything is written, in place of an older one."""
        if self.adapter.is_symlink():
            raise UserError(f"{self.adapter}: is a link: links of a run directory are not followed")
        draft = Path(tempfile.mkdtemp(prefix=".adapter-", dir=self.path))
        try:
            yield draft
        except BaseException:
            shutil.rmtree(draft)
            raise
        (draft / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card, with every field still empty
        draft.chmod(0o755)
        for file in draft.iterdir():
            file.chmod(0o644)
        if self.adapter.exists():
            shutil.rmtree(self.adapter)
        draft.rename(self.adapter)

    def score(self) -> float:
        """Return what "best" compares, lower is better: the loss on the golden answers, or on the training rows if none was measured.

        A run whose metrics cannot be read has an infinite score: it must not keep others from being found.
        """
        try:
            metrics = self.read_json(self.metrics)
        except UserError:
            return math.inf
        loss = metrics.get("eval_loss", metrics.get("train_loss"))
        if isinstance(loss, bool) or not isinstance(loss, int | float):
            return math.inf
        return float(loss) if abs(loss) < sys.float_info.max else math.inf


def _is_complete(checkpoint: Path, root: Path) -> bool:
    """Return whether a checkpoint was written completely.

    transformers writes trainer_state.json last, so a checkpoint without it was cut short by a kill. A full disk can also have cut a
    file: safetensors files and torch's (zip archives) show that by their lengths. Files that are not regular are never opened.
    """
    try:
        check_folder(checkpoint, root)
        json.loads(read_text(checkpoint / "trainer_state.json", root, _LONGEST_HISTORY))
        with safe_open(checkpoint / "adapter_model.safetensors", framework="pt"):
            pass
    except (OSError, ValueError, RecursionError, SafetensorError):  # a UserError is a ValueError
        return False
    return all(zipfile.is_zipfile(checkpoint / name) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"))
