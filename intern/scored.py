"""The last decoder layer's MLP where it matters: at positions whose next token carries loss.

What the other positions would get from it goes nowhere: no later layer attends to them, and the LM head reads scored positions only. With
loss on a quarter of the tokens that is 2 % of an 8B model's arithmetic.
"""

from collections.abc import Callable
from typing import Any

import torch

from intern.layers import decoder_layers, mlp_is_by_position
from intern.prompt import IGNORED


class ScoredOnly:
    """Bound to a model's last MLP; `look_at` tells it the labels of the batch that comes next."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._size: torch.Size | None = None  # batch x length of the labels
        self._positions = torch.empty(0)
        layers = decoder_layers(model)
        mlp: Any = getattr(layers[-1], "mlp", None) if layers else None
        if mlp is not None and mlp_is_by_position(layers[-1]):
            mlp.forward = self._where_scored(mlp, mlp.forward)

    def look_at(self, labels: torch.Tensor) -> None:
        """Labels of the next training batch, (batch, length), each at its own token's position."""
        scored = torch.zeros_like(labels, dtype=torch.bool)
        scored[:, :-1] = labels[:, 1:] != IGNORED
        self._positions = scored.flatten().nonzero().squeeze(1)
        self._size = labels.shape

    def _where_scored(self, mlp: torch.nn.Module, whole: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor, *more: Any, **given: Any) -> Any:
            if not mlp.training or hidden.shape[:-1] != self._size or not len(self._positions) or more or given:
                return whole(hidden, *more, **given)
            flat = hidden.flatten(0, 1)
            out = whole(flat[self._positions].unsqueeze(0))
            if not isinstance(out, torch.Tensor):  # with a router's scores, of all positions
                return whole(hidden)
            return torch.zeros_like(flat).index_copy(0, self._positions, out.squeeze(0)).view_as(hidden)

        return forward
