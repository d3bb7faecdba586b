"""The base model's card -> its licence, and what that licence asks of whoever passes a derivative on."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache

from intern.units import MIB

UNKNOWN = "other"
_LLAMA = (
    "Meta's community licence: pass the licence on with the model, show “Built with Llama”, begin the name of a derived model with "
    "“Llama”, keep to the acceptable use policy; above 700 million monthly users ask Meta."
)
# What these licences ask of derivatives, in short; the licence's own text decides.
_DEMANDS = {
    "apache-2.0": "Keep the licence and its notices, and say that the weights were changed.",
    "mit": "Keep the copyright notice and the licence.",
    "llama2": "Meta's community licence: pass the licence on with the model; above 700 million monthly users ask Meta.",
    "llama3": _LLAMA,
    "llama3.1": _LLAMA,
    "llama3.2": _LLAMA,
    "llama3.3": _LLAMA,
    "gemma": "Google's Gemma terms: pass them on with the model, say that it was changed, keep to the prohibited use policy.",
}


def license_of(base: str, revision: str | None) -> tuple[str, str | None]:
    """Return a base model's licence as its card names it, and the name of one that is not on the hub's list.

    Args:
        base: a folder, or a name on the hub whose card may be in the hub's cache.
        revision: of the hub's.

    Returns:
        ("other", None) if there is no card or it says nothing.
    """
    folder = Path(base)
    found: Any = (
        folder / "README.md" if folder.is_dir() else try_to_load_from_cache(base, "README.md", revision=revision)
    )
    if not isinstance(found, str | Path) or not Path(found).is_file() or Path(found).stat().st_size > MIB:
        return UNKNOWN, None
    try:
        data = ModelCard.load(Path(found)).data
    except (ValueError, OSError):  # a card without valid metadata
        return UNKNOWN, None
    name = data.license
    return (name, data.license_name) if isinstance(name, str) else (UNKNOWN, None)


def demands(name: str) -> str:
    """Return what a licence asks of whoever passes a derivative on, in one or two sentences."""
    return _DEMANDS.get(name, "What it asks of derivatives is not known here: read it before you pass the model on.")
