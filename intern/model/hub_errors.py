"""Why a model could not be loaded -> one line with the remedy, from the chain of errors that the libraries raised."""

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError


def explain(error: BaseException, revision: str | None) -> str:
    """Return the reason and the remedy.

    Args:
        error: what transformers raised; the hub's own errors are among its causes.
        revision: model.revision.
    """
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__

    def raised(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if any("trust_remote_code" in str(one) for one in chain):
        return "needs code of its own, which is never run here: choose a model that transformers itself supports"
    if raised(GatedRepoError):
        return "gated: accept its licence on its page, then `hf auth login`; model=llama3_8b_nf4 needs no account"
    if raised(RepositoryNotFoundError):
        return "not on the hub, or private: check the name, or `hf auth login`"
    if raised(OfflineModeIsEnabled, ConnectionError, LocalEntryNotFoundError):
        return "not in the local cache, and the hub cannot be reached: check the network, or give a folder"
    if raised(RevisionNotFoundError, EntryNotFoundError):
        return f"a file is missing there (revision {revision}): check the name and model.revision"
    if raised(SafetensorError):
        return f"its weights cannot be read ({one_line(error)}): download the model again"
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json implies: download the model again"
    if "a `model_type` key in its config.json" in str(error):
        return (
            "has no config.json that names a model_type: give the folder or name of a model that transformers supports"
        )
    return one_line(error)


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line, cut to 300 characters."""
    return " ".join(str(error).split())[:300]
