"""The batches of an epoch, shared among the processes of a run so that no row is lost and none is seen twice.

accelerate gives each process every n-th batch, and fills up the last ones with rows from the beginning of the epoch, which would then be
trained twice. Here the last batch stays as short as it is, and a process that has no batch left gets one without rows: the collator makes
it of a stand-in row whose tokens carry no loss, so it adds nothing to loss, gradients and counts. A process must compute something, since
gradients are summed over all of them.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler

from intern.data.prompt import IGNORED


class EvenBatches:
    """The batches of all processes, followed by so many without rows that every process has the same number.

    Args:
        batch_sampler: of all processes.
        processes: how many there are.
    """

    def __init__(self, batch_sampler: BatchSampler, processes: int) -> None:
        self.batch_sampler = batch_sampler
        self.processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batch_sampler
        yield from ([] for _ in range(len(self) - len(self.batch_sampler)))

    def __len__(self) -> int:
        return -(-len(self.batch_sampler) // self.processes) * self.processes


def share_batches(loader: Any, processes: int) -> Any:
    """Return a data loader that accelerate has prepared for one of several processes, with its batches shared evenly.

    Args:
        loader: of training or golden rows.
        processes: how many there are.
    """
    if processes == 1:
        return loader
    shard = loader.batch_sampler
    shard.batch_sampler = EvenBatches(shard.batch_sampler, processes)
    shard.batch_size = None  # batches of any size are passed on
    return loader


def stand_in(pad_token_id: int) -> dict[str, list[int]]:
    """Return the row of a batch without rows: two tokens of padding, which carry no loss."""
    return {"input_ids": [pad_token_id] * 2, "labels": [IGNORED] * 2}


class RowLosses:
    """Collects the losses of golden batches from all processes, in the order of the rows.

    Args:
        gather: returns a tensor of each process, concatenated.
        rows: how many golden rows there are; what comes after them belongs to no row.
    """

    def __init__(self, gather: Any, rows: int) -> None:
        self._gather = gather
        self._left = rows

    def __call__(self, losses: Any) -> Any:
        """Return the losses of the batches that all processes have just computed, each repeated for the rows of a full batch."""
        gathered = self._gather(losses)[: self._left]
        self._left -= len(gathered)
        return gathered
