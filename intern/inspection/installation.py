"""What is installed and what can be reached: supported versions, model files, network addresses."""

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

_TIMEOUT = 5  # seconds for one network request
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


def requirements() -> tuple[str, list[Requirement]]:
    """Return what the project supports: its requires-python, and its requirements, with markers for those of extras.

    In a checkout pyproject.toml is read, since the metadata may be those of another installed copy; a wheel has only metadata.
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
    """Return the bytes of safetensors files that must still be downloaded; 0 if all are here.

    Args:
        name: a folder, or a model on the hub.
        revision: a branch, tag or commit; None for the main branch.

    Raises:
        UserError: they are neither here nor on the hub.
    """
    key = f"model.pretrained_model_name_or_path={short_path(name)}"
    folder = Path(name)
    if folder.is_dir():
        if missing := list(_missing(lambda file: str(folder / file) if (folder / file).is_file() else None)):
            raise UserError(
                f"{key}: {', '.join(missing[:3])} missing or truncated in this folder: copy or download the model again"
            )
        return 0
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    def cached(file: str) -> str | None:
        path = try_to_load_from_cache(name, file, revision=revision)
        return path if isinstance(path, str) else None

    if not list(_missing(cached)):
        return 0
    absent = "its weights are not in the cache, and the hub cannot be reached: check the network, or use a local folder"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{key}: {absent}")
    api = HfApi()
    try:
        api.auth_check(name)
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except GatedRepoError as error:
        raise UserError(f"{key}: gated: accept its license on its page, then run `hf auth login`") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{key}: {absent}") from error
    files = [file for file in info.siblings or [] if _WEIGHTS.fullmatch(file.rfilename)]
    if not files:
        raise UserError(f"{key}: has no safetensors weights: use another copy of the model")
    return sum(file.size or 0 for file in files if cached(file.rfilename) is None)


def _missing(find: Callable[[str], str | None]) -> Iterator[str]:
    """Yield the names of weight files that `find` does not find, or that are truncated."""
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
    """Return whether a safetensors file has the length that its header states; the weights are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            return True
    except SafetensorError:
        return False


def is_installed(name: str) -> bool:
    """Return whether a package is installed, in any version."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def answers(url: str) -> bool:
    """Return whether anything answers at a URL, with whatever status."""
    try:
        urllib.request.urlopen(url, timeout=_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def existing(path: Path) -> Path:
    """Return the path, or the nearest parent folder that exists."""
    path = path.expanduser().absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def short_path(path: str) -> str:
    """Return a path inside the working directory or the project relative to it; any other path unchanged."""
    for root in (Path.cwd(), PROJECT):
        if Path(path).is_relative_to(root):
            return str(Path(path).relative_to(root))
    return path
