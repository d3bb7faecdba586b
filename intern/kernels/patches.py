"""Attributes replaced on module instances, and how to restore them."""

from typing import Any

import torch

_MISSING = object()


class Patches:
    """Instance attributes (mostly `forward`) that hide those of the module's class until `undo`.

    Patches nest: a later patch of the same attribute must be undone first.
    """

    def __init__(self) -> None:
        self._before: list[tuple[torch.nn.Module, str, Any]] = []

    def set(self, module: torch.nn.Module, name: str, value: Any) -> None:
        """Set `module.name` to `value` and remember what the instance had there."""
        self._before.append((module, name, vars(module).get(name, _MISSING)))
        vars(module)[name] = value

    def undo(self) -> None:
        """Restore every attribute, the last one set first. A second call does nothing."""
        while self._before:
            module, name, before = self._before.pop()
            if before is _MISSING:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = before

    def __len__(self) -> int:
        return len(self._before)
