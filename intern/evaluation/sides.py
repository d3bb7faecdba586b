"""The two models of an evaluation: which run and base each one is, how it is asked, and what its answers depend on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intern.config.build import plain
from intern.data.prompt import Prompt
from intern.errors import UserError
from intern.paths import find
from intern.runs.directory import Run
from intern.runs.files import open_file


@dataclass(frozen=True)
class Side:
    """One of the two models that are compared: a run with its adapter, or its base alone."""

    name: str
    run: Run
    adapted: bool
    with_context: bool
    base_model: str | None  # another place of the run's base model


def build_sides(run: Run, against: Run | None, context: str | None, base_model: str | None) -> tuple[Side, Side]:
    """Return the model to compare with and the model to evaluate.

    Args:
        run: the run to evaluate.
        against: another run to compare with, None for the run's own base.
        context: "always" and "never" show chunk_text to both models or to neither, None does as each run was trained.
        base_model: another place of the base model, for every run that was trained from the same base as `run`.

    Raises:
        UserError: `against` is the run itself, or a file of a run cannot be read.
    """

    def side(name: str, of: Run, adapted: bool) -> Side:
        trained = Prompt.from_json(of.read_json(of.prompt)).scores_with_material
        same_base = base_model is not None and _base_of(of) == _base_of(run)
        with_context = trained if context is None else context == "always"
        return Side(name, of, adapted, with_context, str(base_model) if same_base else None)

    if against is None:
        return side("base", run, False), side("adapter", run, True)
    if against == run:
        raise UserError(f"against={against.path}: this is the run itself: name another run, or leave against out")
    return side("other run", against, True), side("this run", run, True)


def fingerprint(side: Side) -> dict[str, Any]:
    """Return everything that decides a model's answers, as JSON.

    A local base model counts with the sizes and times of its files: hashing gigabytes takes too long. The keys are those of inputs.json
    files that exist already: renaming one would discard their answers.
    """
    cfg = side.run.read_config()
    model = plain(cfg.model)
    if side.base_model is not None:
        model["pretrained_model_name_or_path"] = side.base_model
    folder = find(model["pretrained_model_name_or_path"])
    weights = sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else []
    adapter = [side.run.adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    return {
        "name": side.name,
        "model": model,
        "model_files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights],
        "quant": plain(cfg.quant),
        "max_length": cfg.trainer.max_length,
        "prompt": side.run.read_json(side.run.prompt),
        "with_material": side.with_context,
        "adapter": [_sha256(file, side.run.path) for file in adapter] if side.adapted else None,
    }


def _base_of(run: Run) -> str:
    return str(run.read_config().model.pretrained_model_name_or_path)


def _sha256(path: Path, root: Path) -> str | None:
    if not path.is_file():
        return None  # loading the adapter reports what is missing
    with open_file(path, root) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
