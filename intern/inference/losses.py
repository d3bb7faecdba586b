"""A model and tokenized rows -> the loss of each answer."""

from collections.abc import Sequence
from typing import Any

import torch

from intern.data.prompt import IGNORED
from intern.kernels.patches import Patches


@torch.inference_mode()
def answer_losses(
    model: Any, rows: Sequence[dict[str, list[int]]], pad_token_id: int, batch_size: int = 16
) -> list[tuple[float, int]]:
    """For each row of input_ids and labels: the sum of its answer's token losses in nats, and how many tokens that is.

    Only the answers' positions go through the output layer, so no tensor of length times vocabulary is made.
    """
    model.eval()
    results = []
    decoder = model.get_decoder()
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        width = max(len(row["input_ids"]) for row in batch)
        pad = [width - len(row["input_ids"]) for row in batch]
        ids = torch.tensor(
            [row["input_ids"] + [pad_token_id] * more for row, more in zip(batch, pad, strict=True)],
            device=model.device,
        )
        labels = torch.tensor(
            [row["labels"] + [IGNORED] * more for row, more in zip(batch, pad, strict=True)], device=model.device
        )
        mask = torch.tensor([[1] * (width - more) + [0] * more for more in pad], device=model.device)
        output = decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        targets = labels[:, 1:]
        where = targets != IGNORED
        logits = _logits(model, decoder, output, output.last_hidden_state[:, :-1][where])
        losses = torch.nn.functional.cross_entropy(logits.float(), targets[where], reduction="none")
        counts = where.sum(dim=1).tolist()
        results += [(part.sum().item(), count) for part, count in zip(losses.split(counts), counts, strict=True)]
    return results


def _logits(model: Any, decoder: Any, output: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The model's own logits (positions, vocabulary) of hidden states (positions, hidden size).

    The model's forward runs with a decoder that returns these states, so scaled and capped logits come out as the model makes them,
    whatever its family calls the numbers.
    """
    output.last_hidden_state = hidden[None]
    patches = Patches()
    patches.set(decoder, "forward", lambda *arguments, **more: output)
    try:
        positions = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        logits: torch.Tensor = model(input_ids=positions, use_cache=False).logits[0]
    finally:
        patches.undo()
    return logits
