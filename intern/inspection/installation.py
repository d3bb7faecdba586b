"""What is installed and can be reached: supported versions, model files, network addresses."""

import importlib.metadata
import json
import re
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

from intern.errors import UserError
from intern.paths import PROJECT

_TIMEOUT = 5  # seconds for one question to the network
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


def requirements() -> tuple[str, list[Requirement]]:
    """What the project supports: its requires-python, and its requirements with those of extras marked.

    A checkout's pyproject.toml speaks for the code beside it, which an installed copy's metadata may not; a wheel has the metadata alone.
    """
    project = PROJECT / "pyproject.toml"
    if not project.is_file():
        metadata = importlib.metadata.metadata("intern")
        lines = importlib.metadata.requires("intern") or []
        return str(metadata["Requires-Python"]), [Requirement(line) for line in lines]
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = [
        f"{line} {'and' if ';' in line else ';'} extra == '{extra}'"
        for extra, lines in table.get("optional-dependencies", {}).items()
        for line in lines
    ]
    return table["requires-python"], [Requirement(line) for line in [*table["dependencies"], *extras]]


def missing_weights(name: str, revision: str | None) -> int:
    """Bytes of safetensors files that a model lacks here and the hub has; 0 where all are here.

    Raises:
        UserError: they are neither here nor to be had.
    """
    key = f"model.pretrained_model_name_or_path={short_path(name)}"
    folder = Path(name)
    if folder.is_dir():
        if missing := list(_missing(lambda file: str(folder / file) if (folder / file).is_file() else None)):
            raise UserError(
                f"{key}: {', '.join(missing[:3])} missing or cut short in this folder: copy or download the model again"
            )
        return 0
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    def cached(file: str) -> str | None:
        path = try_to_load_from_cache(name, file, revision=revision)
        return path if isinstance(path, str) else None

    if not list(_missing(cached)):
        return 0
    absent = "its weights are not in the cache, and the hub cannot be reached: check the network, or give a folder"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{key}: {absent}")
    api = HfApi()
    try:
        api.auth_check(name)
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except GatedRepoError as error:
        raise UserError(f"{key}: gated: accept its licence on its page, then `hf auth login`") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{key}: {absent}") from error
    files = [file for file in info.siblings or [] if _WEIGHTS.fullmatch(file.rfilename)]
    if not files:
        raise UserError(f"{key}: has no safetensors weights: take another copy of the model")
    return sum(file.size or 0 for file in files if cached(file.rfilename) is None)


def _missing(find: Callable[[str], str | None]) -> Iterator[str]:
    """The names of weight files that `find` does not find, or that are not whole."""
    if (single := find("model.safetensors")) is not None:
        yield from [] if _whole(single) else ["model.safetensors"]
        return
    index = find("model.safetensors.index.json")
    if index is None:
        yield "model.safetensors"
        return
    for file in sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())):
        path = find(file)
        if path is None or not _whole(path):
            yield file


def _whole(path: str) -> bool:
    """Whether a safetensors file has the length that its header tells of; the weights themselves are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            return True
    except SafetensorError:
        return False


def is_installed(name: str) -> bool:
    """Whether a package is there, in any version."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def answers(url: str) -> bool:
    """Whether anything answers at an address, whatever it says."""
    try:
        urllib.request.urlopen(url, timeout=_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.expanduser().absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def short_path(path: str) -> str:
    """A path inside the project or the working directory without what lies above."""
    for root in (Path.cwd(), PROJECT):
        if Path(path).is_relative_to(root):
            return str(Path(path).relative_to(root))
    return path
