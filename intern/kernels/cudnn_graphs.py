"""cuDNN's attention kernels for packed rows, built through its Python frontend (Hopper only).

A kernel is built for sizes, not for a batch: the numbers of rows and tokens and the longest row are rounded up, and the true boundaries
of the rows are read on the GPU. So nothing waits for the GPU, and all batches of a run share a few builds.
"""

import functools
import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from intern.hardware import is_hopper

log = logging.getLogger(__name__)

_BACKWARD_WORKSPACE_BYTES = 2**30  # of a backward pass in addition to its gradients; above, heads are computed in turns
_MOST_PADDING = 16  # times the tokens: up to here the statistics of each row are padded to the longest row's, which is faster to read
_FLOAT32_BYTES = 4
_BUILDS = 128  # kernels of each kind that a process keeps; the least recently used is dropped


def has_cudnn_frontend() -> bool:
    """Whether this is a Hopper GPU with cuDNN's Python frontend installed, and cuDNN's attention is not disabled."""
    return is_hopper() and torch.backends.cuda.cudnn_sdp_enabled() and _library() is not None


@dataclass(frozen=True)
class AttentionSizes:
    """What a kernel is built for: tensors of (tokens, heads, head size), tokens of all rows one after the other."""

    rows: int
    tokens: int
    longest: int  # tokens of the longest row
    heads: int
    key_heads: int
    head_size: int
    dtype: torch.dtype
    scaling: float  # of query-key products
    deterministic: bool
    device: int

    @classmethod
    def of(
        cls, query: torch.Tensor, key: torch.Tensor, rows: int, longest: int, scaling: float | None
    ) -> "AttentionSizes":
        """Round the sizes of a batch up: query (tokens, heads, head size), key (tokens, key/value heads, head size)."""
        tokens, heads, head_size = query.shape
        return cls(
            rows=_rounded(rows, 8),
            tokens=_rounded(tokens, 2, steps=8),
            longest=_rounded(longest, 2),
            heads=heads,
            key_heads=key.shape[1],
            head_size=head_size,
            dtype=query.dtype,
            scaling=scaling or 1 / math.sqrt(head_size),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            device=query.get_device(),
        )

    @property
    def is_padded(self) -> bool:
        """Whether the softmax statistics are (rows, heads, longest) instead of (tokens, heads)."""
        return self.rows * self.longest <= _MOST_PADDING * self.tokens

    def statistics(self, tokens: int) -> tuple[int, ...]:
        """Return the shape of the softmax statistics, the logarithms of the sums that the weights are divided by."""
        return (self.rows, self.heads, self.longest) if self.is_padded else (tokens, self.heads)

    def backward_turn(self) -> "AttentionSizes":
        """Return the sizes with as many heads as a backward pass computes at once.

        It accumulates all three gradients in float32, for every query head.
        """
        each = 3 * self.tokens * self.head_size * _FLOAT32_BYTES * self.heads // self.key_heads
        most = max(1, _BACKWARD_WORKSPACE_BYTES // each)
        count = max(count for count in range(1, self.key_heads + 1) if self.key_heads % count == 0 and count <= most)
        return replace(self, heads=self.heads // self.key_heads * count, key_heads=count)


def _rounded(count: int, base: int, steps: int = 1) -> int:
    """Round up to a power of `base`, or with `steps` to one of that many values between two powers."""
    power = 1
    while power < count:
        power *= base
    if steps == 1:
        return power
    step = max(1, power // base // steps)
    return math.ceil(count / step) * step


class AttentionGraph:
    """One of cuDNN's kernels, with names for its inputs and outputs."""

    def __init__(self, sizes: AttentionSizes) -> None:
        self._cudnn: Any = _library()
        self._sizes = sizes
        self._handle = _handle(sizes.device)
        kinds = self._cudnn.data_type
        self._dtype = kinds.BFLOAT16 if sizes.dtype == torch.bfloat16 else kinds.HALF
        self.graph = self._cudnn.pygraph(
            io_data_type=self._dtype,
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            handle=self._handle,
        )
        lengths = self._list("lengths", sizes.rows, kinds.INT32)
        self.tensors = {"lengths": lengths} | {
            name: self._list(name, sizes.rows + 1, kinds.INT64)
            for name in ("query_begins", "key_begins", "sum_begins")
            if name != "sum_begins" or not sizes.is_padded
        }
        self.common = {
            "attn_scale": sizes.scaling,
            "use_padding_mask": True,
            "seq_len_q": lengths,
            "seq_len_kv": lengths,
            "diagonal_alignment": self._cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
        }

    def _list(self, name: str, size: int, kind: Any) -> Any:
        return self.graph.tensor(name=name, dim=[size, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind)

    def _layout(self, name: str) -> tuple[list[int], list[int]]:
        """Return sizes and strides of (rows, heads, longest, head size); where a row begins is in its list of offsets."""
        sizes = self._sizes
        heads = sizes.key_heads if name.endswith(("key", "value")) else sizes.heads
        dim = [sizes.rows, heads, sizes.longest, sizes.head_size]
        if name != "sums":
            return dim, [sizes.longest * heads * sizes.head_size, sizes.head_size, heads * sizes.head_size, 1]
        strides = [sizes.longest, 1] if sizes.is_padded else [1, heads]
        return [*dim[:3], 1], [sizes.longest * heads, *strides, 1]

    def _begins(self, name: str) -> Any:
        if name == "sums":
            return self.tensors.get("sum_begins")
        return self.tensors["key_begins" if name.endswith(("key", "value")) else "query_begins"]

    def read(self, name: str) -> Any:
        """Declare an input of the kernel."""
        dim, stride = self._layout(name)
        kind = self._cudnn.data_type.FLOAT if name == "sums" else self._dtype
        tensor = self.tensors[name] = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=kind)
        if (begins := self._begins(name)) is not None:
            tensor.set_ragged_offset(begins)
        return tensor

    def write(self, name: str, tensor: Any) -> None:
        """Declare an output of the kernel."""
        dim, stride = self._layout(name)
        tensor.set_output(True).set_dim(dim).set_stride(stride)
        if name == "sums":
            tensor.set_data_type(self._cudnn.data_type.FLOAT)
        if (begins := self._begins(name)) is not None:
            tensor.set_ragged_offset(begins)
        self.tensors[name] = tensor

    def build(self) -> "AttentionGraph":
        """Compile the kernel. Raises RuntimeError if cuDNN has none for these sizes."""
        modes = self._cudnn.heur_mode
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([modes.A, modes.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        self._workspace = max(1, self.graph.get_workspace_size())
        return self

    def run(self, tensors: dict[str, torch.Tensor]) -> None:
        """Launch the kernel on the current stream; tensors that it does not know are ignored."""
        stream = torch.cuda.current_stream(self._sizes.device)
        self._cudnn.set_stream(handle=self._handle, stream=stream.cuda_stream)
        workspace = torch.empty(self._workspace, dtype=torch.uint8, device=stream.device)
        given = {self.tensors[name]: tensor for name, tensor in tensors.items() if name in self.tensors}
        self.graph.execute(given, workspace, handle=self._handle)


@functools.lru_cache(maxsize=_BUILDS)
def forward_graph(sizes: AttentionSizes) -> AttentionGraph:
    """Build the forward kernel: reads query, key and value, writes out and sums (the softmax statistics)."""
    made = AttentionGraph(sizes)
    query, key, value = map(made.read, ("query", "key", "value"))
    out, sums = made.graph.sdpa(q=query, k=key, v=value, generate_stats=True, name="attention", **made.common)
    made.write("out", out)
    made.write("sums", sums)
    return made.build()


@functools.lru_cache(maxsize=_BUILDS)
def backward_graph(sizes: AttentionSizes) -> AttentionGraph:
    """Build the backward kernel: also reads out, grad and sums, writes grad_query, grad_key and grad_value."""
    made = AttentionGraph(sizes)
    query, key, value, out, grad, sums = map(made.read, ("query", "key", "value", "out", "grad", "sums"))
    found = made.graph.sdpa_backward(
        q=query,
        k=key,
        v=value,
        o=out,
        dO=grad,
        stats=sums,
        max_total_seq_len_q=sizes.tokens,
        max_total_seq_len_kv=sizes.tokens,
        use_deterministic_algorithm=sizes.deterministic,
        name="gradients",
        **made.common,
    )
    for name, tensor in zip(("grad_query", "grad_key", "grad_value"), found, strict=True):
        made.write(name, tensor)
    return made.build()


@functools.lru_cache(maxsize=_BUILDS)
def is_built(sizes: AttentionSizes) -> bool:
    """Build both kernels if they are new; False if cuDNN has none for these sizes."""
    try:
        forward_graph(sizes)
        backward_graph(sizes.backward_turn())
    except RuntimeError as error:
        log.debug("cuDNN has no kernel for %s: %s", sizes, " ".join(str(error).split())[:200])
        return False
    return True


@functools.cache
def _handle(device: int) -> Any:
    cudnn: Any = _library()
    with torch.cuda.device(device):
        return cudnn.create_handle()


@functools.cache
def _library() -> Any:
    """Return the frontend, or None if it is not installed or does not find cuDNN."""
    try:
        import cudnn
    except (ImportError, OSError, RuntimeError):
        return None
    return cudnn
