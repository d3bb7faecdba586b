"""The processes that train one run together: which of them this is, and what they tell each other.

torchrun starts them and sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Process 0 writes the run directory. A process without
these variables is alone, and every function here does nothing or returns what it was given.
"""

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from intern.errors import LostProcess, UserError

T = TypeVar("T")
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_START_S = 3600  # seconds that the others wait for what process 0 announces: its configuration is checked before


@dataclass(frozen=True)
class Place:
    """The place of this process among those of its run.

    Args:
        rank: 0 for the process that writes the run directory.
        size: how many processes there are.
        local_rank: its number on this machine, and that of its GPU.
        local_size: how many there are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place() -> Place:
    """Return the place that torchrun has given this process."""
    if not is_started_by_torchrun():
        return Place()
    try:
        return Place(*(int(os.environ[name]) for name in _VARIABLES))
    except ValueError as error:
        raise UserError(
            f"{', '.join(_VARIABLES)} in the environment: must be whole numbers, as torchrun sets them"
        ) from error


def is_started_by_torchrun() -> bool:
    """Whether torchrun, or something that sets the same variables, has started this process."""
    return all(os.environ.get(name) for name in _VARIABLES)


def is_main() -> bool:
    """Whether this process writes the run directory."""
    return place().rank == 0


def announce(name: str, value: Any) -> None:
    """Tell the other processes something before they are joined; `value` is what JSON can hold."""
    if place().size > 1:
        _store().set(f"intern/{name}", json.dumps(value))


def announced(name: str) -> Any:
    """Wait for what process 0 announces under a name, and return it. torchrun ends this process if process 0 ends before."""
    store = _store()
    store.wait([f"intern/{name}"], datetime.timedelta(seconds=_START_S))
    return json.loads(store.get(f"intern/{name}"))


_rendezvous: list[Any] = []  # of this process: the store through which torchrun's processes find each other


def _store() -> Any:
    from torch.distributed import rendezvous  # heavy

    if not _rendezvous:
        store, _, _ = next(rendezvous("env://"))
        _rendezvous.append(store)
    return _rendezvous[0]


def join(use_cpu: bool, timeout_s: int) -> None:
    """Join the processes, so that they can compute together.

    Args:
        use_cpu: whether they train on the CPU; otherwise each takes the GPU of its number on this machine.
        timeout_s: seconds after which a process that waits for another one gives up.

    Raises:
        UserError: there are more processes on this machine than GPUs.
    """
    import torch

    here = place()
    if not use_cpu and here.local_size > 1:
        if here.local_size > torch.cuda.device_count():
            raise UserError(
                f"{here.local_size} processes on this machine, but it has {torch.cuda.device_count()} GPUs: start as many as it has GPUs"
            )
        torch.cuda.set_device(here.local_rank)
    if here.size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend="gloo" if use_cpu else "cpu:gloo,cuda:nccl",
            store=_store(),
            rank=here.rank,
            world_size=here.size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )


def leave() -> None:
    """Wait for all processes, then part."""
    if place().size > 1:
        import torch

        wait()
        torch.distributed.destroy_process_group()
        _rendezvous.clear()


def share(make: Callable[[], T]) -> T:
    """Call `make` in process 0 alone, and return its result in all of them."""
    if place().size == 1:
        return make()
    import torch

    values = [make() if is_main() else None]
    with _losing():
        torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    result: Any = values[0]
    return result


def gather(value: T) -> list[T]:
    """Return the values of all processes, in the order of their ranks, in each of them."""
    if place().size == 1:
        return [value]
    import torch

    values: list[Any] = [None] * place().size
    with _losing():
        torch.distributed.all_gather_object(values, value)
    return values


def largest(number: int) -> int:
    """Return the largest number of all processes; cheap enough for every step, and nothing waits for a GPU."""
    if place().size == 1:
        return number
    import torch

    numbers = torch.tensor([number], dtype=torch.int64)
    with _losing():
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return int(numbers[0])


def wait() -> None:
    """Wait until all processes are here."""
    largest(0)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Process 0 runs the block alone, then the others do: what it has written to a cache is there for them."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


@contextlib.contextmanager
def _losing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if (lost := lost_process(error)) is not None:
            raise lost from error
        raise


def lost_process(error: BaseException) -> LostProcess | None:
    """Return what an error means if it is that another process of the run has ended; None for any other error."""
    if place().size == 1 or not isinstance(error, RuntimeError) or isinstance(error, LostProcess):
        return None
    import torch

    text = str(error)
    if (
        isinstance(error, torch.distributed.DistError)
        or "gloo/transport" in text
        or "Connection closed by peer" in text
    ):
        return LostProcess("another process of this run has ended: its own message says why")
    return None
