"""conf/export.yaml -> checked values, before a model is loaded."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import Field

from intern.config.build import build
from intern.errors import UserError
from intern.runs.directory import Run

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{1,40}")


@dataclass(frozen=True)
class Settings:
    """The keys of conf/export.yaml, without the run."""

    format: str
    out: Path | None
    weights: Literal["trained", "original"]
    dtype: Literal["bfloat16", "float16"]
    gguf: Literal["f16", "q8_0", "q4_k_m"]
    content: Literal["adapter", "merged", "gguf"]
    repo: str | None
    upload: bool
    private: bool
    base_model: str | None
    base_name: str | None
    license: str | None
    eval_file: str | None
    prompts: Annotated[int, Field(ge=1, le=1000)]
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)]
    max_mean_kl: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    prove: Path | None
    server: str | None
    served_name: str


def read_settings(values: dict[str, Any], run: Run) -> Settings:
    """Return the settings of an export.

    Args:
        values: the composed conf/export.yaml as built-in types, without run_dir.
        run: the run to export.

    Raises:
        UserError: a value of the wrong type or out of range, or keys that do not fit together.
    """
    values = dict(values)
    for key in ("out", "prove"):
        if isinstance(values.get(key), str):
            values[key] = Path(values[key]).expanduser()
    values = {
        key: str(value) if key in ("repo", "served_name", "license") and value is not None else value
        for key, value in values.items()
    }
    try:
        settings = build(Settings, values, "export")
    except UserError as error:  # the keys stand at the top of the command's configuration
        raise UserError(str(error).removeprefix("export.")) from error
    if settings.license is not None and not _LICENSE.fullmatch(settings.license):
        raise UserError(f"license={settings.license}: give a name of the hub's list, such as apache-2.0, mit or llama3")
    for name, value in (("repo", settings.repo), ("base_name", settings.base_name)):
        if value is not None:
            _check_repo(name, value)
    if settings.prove is not None:
        if settings.server is None:
            raise UserError("prove: give server=http://HOST:PORT/v1 too")
        return settings
    if settings.format == "hub" and settings.repo is None:
        raise UserError("format=hub: give repo=OWNER/NAME")
    if settings.out is None:
        raise UserError("out: give the folder to write, such as out=exports/mine")
    _check_out(settings.out, run)
    return settings


def _check_repo(key: str, name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{key}={name}: {' '.join(str(error).split())[:160]}") from error
    if key == "repo" and name.count("/") != 1:
        raise UserError(f"repo={name}: must be OWNER/NAME")


def _check_out(out: Path, run: Run) -> None:
    whole = out.resolve()
    if whole.is_relative_to(run.path.resolve()):
        raise UserError(
            f"out={out}: lies in the run {run.path}, which an export leaves as it is: choose another folder"
        )
    if out.is_symlink():
        raise UserError(f"out={out}: is a link: name the folder itself")
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out}: is a file: choose another name")


def check_empty(out: Path) -> None:
    """Raise UserError if something is in the way of an export."""
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"out={out}: is not empty: choose another folder, or remove what is in it")
