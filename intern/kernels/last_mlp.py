"""The last decoder layer's MLP where it matters: at positions whose next token carries loss.

What the other positions would get from it goes nowhere: no later layer attends to them, and the LM head reads scored positions only. With
loss on a quarter of the tokens that is 2 % of an 8B model's arithmetic.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from intern.data.prompt import IGNORED
from intern.kernels.decoder_layers import decoder_layers, mlp_is_by_position

POSITIONS = "scored_positions"  # of a batch, beside its labels


@dataclass
class WithPositions:
    """A collator whose batches say which positions are scored: found before they are on the GPU, it is not waited for."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        return {**batch, POSITIONS: positions(batch["labels"])}


def positions(labels: torch.Tensor) -> torch.Tensor:
    """Of labels (batch, length), each at its own token's position: the flat positions before those that carry loss."""
    scored = torch.zeros_like(labels, dtype=torch.bool)
    scored[:, :-1] = labels[:, 1:] != IGNORED
    return scored.flatten().nonzero().squeeze(1)


class ScoredOnly:
    """Bound to a model's last MLP; `look_at` tells it what is scored in the batch that comes next."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._size: torch.Size | None = None
        self._positions = torch.empty(0)
        layers = decoder_layers(model)
        mlp: Any = getattr(layers[-1], "mlp", None) if layers else None
        if mlp is not None and mlp_is_by_position(layers[-1]):
            mlp.forward = self._where_scored(mlp, mlp.forward)

    def look_at(self, size: torch.Size, scored: torch.Tensor) -> None:
        """The next training batch's size, batch x length, and its scored `positions`."""
        self._size, self._positions = size, scored

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
