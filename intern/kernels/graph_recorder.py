"""A forward and a backward pass -> CUDA graphs that repeat them."""

import functools
from collections.abc import Callable

import torch

Work = Callable[[], None]
Record = Callable[[Work, Work], tuple[Work, Work]]  # a forward and a backward pass -> functions that repeat them


class CudaGraphRecorder:
    """Records CUDA graphs that share one memory pool: at any time only one of them holds something that is still needed."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._is_warm = False

    def __call__(self, forward: Work, backward: Work) -> tuple[Work, Work]:
        """Record both passes; the first time they run before, since libraries initialize themselves at a first call."""
        torch.clear_autocast_cache()  # its casts would tie the parameters to the stream of before
        if not self._is_warm:  # only the first time: this takes memory in addition to that of the graphs
            _recording_stream().wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(_recording_stream()):
                forward()
                backward()
            torch.cuda.current_stream().wait_stream(_recording_stream())
            self._is_warm = True
        return self._recorded(forward), self._recorded(backward)

    def _recorded(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # If recording fails, torch.cuda.graph itself does not always restore the stream.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, self._pool, _recording_stream(), capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay


@functools.cache
def _recording_stream() -> torch.cuda.Stream:
    """Return the stream of all recordings, one per process: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream()
