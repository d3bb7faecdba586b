"""QLoRA fine-tuning composed with Hydra, and answers from the result: `from intern import query_intern`."""

import logging
from typing import TYPE_CHECKING, Any

# bitsandbytes recommends an optional kernel download at import; the project does not use that kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from intern.inference.answer import query_intern

__all__ = ["query_intern"]


def __getattr__(name: str) -> Any:
    if name == "query_intern":
        from intern.inference.answer import query_intern  # heavy: `--help` of the commands must not wait for it

        return query_intern
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
