"""A proven export -> a repository of the model hub: what would be uploaded is listed and checked first."""

import fnmatch
import logging
from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from intern.config.secrets import masked
from intern.errors import RunError, UserError
from intern.exporting.export import CARD, RECORD, Export
from intern.exporting.licenses import UNKNOWN
from intern.runs.adapter import FILES
from intern.units import MIB

log = logging.getLogger(__name__)

# What an export writes; everything else in its folder was put there later.
_NAMES = (
    *(CARD, RECORD, "prompt.json", "config.json", "generation_config.json", "Modelfile", "model.gguf", *FILES),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
)
_WEIGHTS = (".safetensors", ".gguf")
_LARGEST_TEXT = 128 * MIB  # bytes


def check_files(export: Export) -> Mapping[str, int]:
    """Return the files to upload with their bytes.

    Raises:
        UserError: the export is not proven, a file is none of an export (such as data or a key), or one holds a credential.
    """
    if export.record["figures"] is None and export.record["served"] is None:
        raise UserError(f"{export.folder}: is not proven, and what is not is not uploaded: {export.record['prove']}")
    for name, size in export.sizes.items():
        file = export.folder / name
        if file.is_symlink() or not any(fnmatch.fnmatchcase(name, pattern) for pattern in _NAMES):
            raise UserError(f"{file}: is not a file that an export writes: remove it, then run the same command again")
        if file.suffix in _WEIGHTS:
            continue
        if size > _LARGEST_TEXT:
            raise UserError(f"{file}: is larger than any such file of a tokenizer: refused")
        text = file.read_text(encoding="utf-8", errors="replace")
        if file.name != "tokenizer.json" and masked(text) != text:
            raise UserError(f"{file}: holds a credential: remove it from the run, and export again")
    return export.sizes


def upload(export: Export, repo: str, private: bool, api: Any = None) -> str:
    """Upload an export.

    Args:
        export: checked with `check_files`.
        repo: OWNER/NAME.
        private: whether a new repository is private; one that exists keeps its visibility.
        api: a huggingface_hub.HfApi.

    Returns:
        The address of the commit.

    Raises:
        UserError: the base's licence is not known, the card is not valid, or nobody is logged in.
        RunError: the hub cannot be reached or refuses.
    """
    card = ModelCard.load(export.folder / CARD)
    if card.data.license == UNKNOWN:
        raise UserError("license: the base's own files name no licence: give it with license=..., and export again")
    api = api if api is not None else HfApi()
    try:
        card.validate()
        api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        done = api.upload_folder(
            repo_id=repo,
            folder_path=str(export.folder),
            allow_patterns=list(export.sizes),
            commit_message=f"Upload {export.record['format']}",
        )
    except LocalTokenNotFoundError as error:
        raise UserError(f"repo={repo}: nobody is logged in: `hf auth login` first") from error
    except HfHubHTTPError as error:
        raise RunError(f"repo={repo}: the hub refuses: {' '.join(str(error).split())[:200]}") from error
    except ValueError as error:  # of validate()
        raise UserError(f"{export.folder / CARD}: {' '.join(str(error).split())[:200]}") from error
    except OSError as error:
        raise RunError(f"repo={repo}: the hub cannot be reached ({type(error).__name__})") from error
    return str(getattr(done, "commit_url", done))
