"""What conf/ can compute from other keys: the resolvers of its ${...} expressions.

They are registered when anything of intern.config is imported, which every command does before it reads a value.
"""

from typing import Any

from omegaconf import OmegaConf


def twice(value: Any) -> Any:
    """Return two times a number; anything else unchanged, so that the key it comes from is the one that is reported as wrong."""
    return 2 * value if isinstance(value, int | float) and not isinstance(value, bool) else value


OmegaConf.register_new_resolver("twice", twice, replace=True)
