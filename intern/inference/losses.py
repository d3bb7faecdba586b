"""A model and tokenized rows -> the loss of each answer."""

from collections.abc import Sequence
from typing import Any

import torch

from intern.data.prompt import IGNORED


@torch.inference_mode()
def answer_losses(
    model: Any, rows: Sequence[dict[str, list[int]]], pad_token_id: int, batch_size: int = 16
) -> list[tuple[float, int]]:
    """For each row of input_ids and labels: the sum of its answer's token losses in nats, and how many tokens that is.

    Only the answers' positions go through the output layer, so no tensor of length times vocabulary is made.
    """
    model.eval()
    results = []
    decoder, head = model.get_decoder(), model.get_output_embeddings()
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
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        where = targets != IGNORED
        losses = torch.nn.functional.cross_entropy(head(hidden[where]).float(), targets[where], reduction="none")
        counts = where.sum(dim=1).tolist()
        results += [(part.sum().item(), count) for part, count in zip(losses.split(counts), counts, strict=True)]
    return results
