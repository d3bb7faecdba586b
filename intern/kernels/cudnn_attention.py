"""cuDNN's attention for packed rows on Hopper, through its Python frontend: what flash attention computes, in up to six tenths of the time.

A kernel is built for sizes, not for a batch: the numbers of rows and tokens and the longest row are rounded up, and the rows' true
boundaries are read on the GPU. Nothing waits for the GPU, and all batches of a run share a few builds. torch's own operator for these
kernels is no way to them: it is slow and wrong for packed rows with shared key/value heads (docs/benchmarks.md).
"""

import collections
import functools
import logging
import math
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch

from intern.hardware import is_hopper
from intern.kernels.recompute import remembered

log = logging.getLogger(__name__)

_HEAD_SIZE = 128  # the largest for which the backward kernel was tried
_WORKSPACE = 2**30  # bytes that a backward pass may take beside its gradients; above, heads are taken in turns
_PADDED = 16  # times the tokens: up to here each row's sums are filled up to the longest row's, which is faster to read
_FLOAT = 4  # bytes
_BUILD = 3.0  # seconds that the first builds take in a process (docs/benchmarks.md)
# Seconds less than flash attention's, forward and backward: for a token, and for a token and each token of its row, of 4,096 numbers a layer.
_LESS, _LESS_BY_LENGTH, _WIDTH = 25e-9, 32e-12, 4096


def is_possible(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether there is a kernel for these heads, (..., head size), on this card, with what is installed and allowed."""
    size = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype
        and size <= _HEAD_SIZE
        and size % 8 == 0
        and not torch.cuda.is_current_stream_capturing()  # builds and their sizes belong to these rows
        and has_kernels()
    )


def has_kernels() -> bool:
    """Whether this is a Hopper card with cuDNN's frontend, and cuDNN is not switched off."""
    return is_hopper() and torch.backends.cuda.cudnn_sdp_enabled() and _library() is not None


def pays(tokens: int, rows: int, layers: int, width: int) -> bool:
    """Whether so many tokens in so many rows, through layers with queries of so many numbers, save more time than the builds take."""
    return tokens * layers * width / _WIDTH * (_LESS + _LESS_BY_LENGTH * tokens / rows) > _BUILD


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor | None:
    """Causal attention inside each row; a layer that recomputes finds the result of its first run (intern/kernels/recompute.py).

    Args:
        query: (tokens, heads, head size), all rows one after the other.
        key, value: (tokens, key/value heads, head size).
        boundaries: (rows + 1) offsets of the rows, int32, on the GPU.
        longest: tokens of the longest row.
        scaling: of the products of queries and keys; 1 / sqrt(head size) where there is none.

    Returns:
        (tokens, heads, head size); None where cuDNN has no kernel for these sizes.
    """
    sizes = _Sizes.of(query, key, len(boundaries) - 1, longest, scaling)
    if not _is_built(sizes):
        return None
    out: torch.Tensor = _Attention.apply(query.contiguous(), key.contiguous(), value.contiguous(), boundaries, sizes)
    return out


@dataclass(frozen=True)
class _Sizes:
    """What a kernel is built for."""

    rows: int
    tokens: int
    longest: int
    heads: int
    key_heads: int
    head_size: int
    dtype: torch.dtype
    scaling: float
    deterministic: bool
    device: int

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, rows: int, longest: int, scaling: float | None) -> "_Sizes":
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
        """Whether the sums are (rows, heads, longest), and not (tokens, heads)."""
        return self.rows * self.longest <= _PADDED * self.tokens

    def sums(self, tokens: int) -> tuple[int, ...]:
        """The shape of the logarithms of the sums that the weights are divided by."""
        return (self.rows, self.heads, self.longest) if self.is_padded else (tokens, self.heads)

    def at_a_time(self) -> "_Sizes":
        """With as many heads as a backward pass takes at once: it adds up all three gradients in float32, for every query head."""
        each = 3 * self.tokens * self.head_size * _FLOAT * self.heads // self.key_heads
        most = max(1, _WORKSPACE // each)
        count = max(count for count in range(1, self.key_heads + 1) if self.key_heads % count == 0 and count <= most)
        return replace(self, heads=self.heads // self.key_heads * count, key_heads=count)


def _rounded(count: int, base: int, steps: int = 1) -> int:
    """Up to the next power of `base`; with steps to the next of as many between that and the power before."""
    power = 1
    while power < count:
        power *= base
    if steps == 1:
        return power
    step = max(1, power // base // steps)
    return math.ceil(count / step) * step


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        boundaries: torch.Tensor,
        sizes: _Sizes,
    ) -> torch.Tensor:
        out, sums = remembered(lambda: _forward(query, key, value, boundaries, sizes))
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.boundaries, ctx.sizes = boundaries, sizes
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        given = {"query": query, "key": key, "value": value, "out": out, "grad": grads[0].contiguous(), "sums": sums}
        results = dict(zip(("grad_query", "grad_key", "grad_value"), found, strict=True))
        part = ctx.sizes.at_a_time()
        graph, rows = _backward_graph(part), _rows(ctx.boundaries, part)
        for turn in range(ctx.sizes.key_heads // part.key_heads):
            # cuDNN takes room for all that strides span, so a part of the heads must lie by itself.
            parts = {name: _heads(name, tensor, turn, part).contiguous() for name, tensor in (given | results).items()}
            graph.run(parts | rows)
            for name, tensor in results.items():
                if (whole := _heads(name, tensor, turn, part)).data_ptr() != parts[name].data_ptr():
                    whole.copy_(parts[name])
        return *found, None, None


def _heads(name: str, tensor: torch.Tensor, turn: int, part: _Sizes) -> torch.Tensor:
    """Those that a turn takes."""
    count = part.key_heads if name.endswith(("key", "value")) else part.heads
    return tensor.narrow(1, turn * count, count)


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, sizes: _Sizes
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(query)
    sums = torch.empty(sizes.sums(len(query)), dtype=torch.float32, device=query.device)
    _forward_graph(sizes).run(
        {"query": query, "key": key, "value": value, "out": out, "sums": sums} | _rows(boundaries, sizes)
    )
    return out, sums


_Kept = tuple["weakref.ref[torch.Tensor]", _Sizes, dict[str, torch.Tensor]]
_kept_rows: collections.deque[_Kept] = collections.deque(maxlen=2)


def _rows(boundaries: torch.Tensor, sizes: _Sizes) -> dict[str, torch.Tensor]:
    """Lengths of the rows, and where each begins in queries, keys and sums; rows that only fill up have no tokens.

    All layers of a pass are given the same boundaries, so they are worked out once for its forward and its backward kernels.
    """
    for kept, kept_sizes, rows in _kept_rows:
        if kept() is boundaries and kept_sizes == sizes:
            return rows
    ends = boundaries[-1:].expand(sizes.rows + 1 - len(boundaries))
    filled = torch.cat([boundaries, ends])
    begins = filled.long()
    rows = {
        "lengths": filled.diff(),
        "query_begins": begins * sizes.heads * sizes.head_size,
        "key_begins": begins * sizes.key_heads * sizes.head_size,
        "sum_begins": begins * sizes.heads,
    }
    _kept_rows.append((weakref.ref(boundaries), sizes, rows))
    return rows


class _Graph:
    """One of cuDNN's kernels with names for what it reads and writes."""

    def __init__(self, sizes: _Sizes) -> None:
        self._cudnn: Any = _library()
        self._sizes = sizes
        self._handle = _handle(sizes.device)
        kinds = self._cudnn.data_type
        self._number = kinds.BFLOAT16 if sizes.dtype == torch.bfloat16 else kinds.HALF
        self.graph = self._cudnn.pygraph(
            io_data_type=self._number,
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
        """Sizes and strides of (rows, heads, longest, head size); where a row begins stands in its list."""
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
        """A tensor that the kernel reads."""
        dim, stride = self._layout(name)
        kind = self._cudnn.data_type.FLOAT if name == "sums" else self._number
        tensor = self.tensors[name] = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=kind)
        if (begins := self._begins(name)) is not None:
            tensor.set_ragged_offset(begins)
        return tensor

    def write(self, name: str, tensor: Any) -> None:
        """A tensor that the kernel writes."""
        dim, stride = self._layout(name)
        tensor.set_output(True).set_dim(dim).set_stride(stride)
        if name == "sums":
            tensor.set_data_type(self._cudnn.data_type.FLOAT)
        if (begins := self._begins(name)) is not None:
            tensor.set_ragged_offset(begins)
        self.tensors[name] = tensor

    def build(self) -> "_Graph":
        """Raises RuntimeError where cuDNN has no such kernel."""
        modes = self._cudnn.heur_mode
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([modes.A, modes.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        self._workspace = max(1, self.graph.get_workspace_size())
        return self

    def run(self, tensors: dict[str, torch.Tensor]) -> None:
        """On the current stream."""
        stream = torch.cuda.current_stream(self._sizes.device)
        self._cudnn.set_stream(handle=self._handle, stream=stream.cuda_stream)
        workspace = torch.empty(self._workspace, dtype=torch.uint8, device=stream.device)
        given = {self.tensors[name]: tensor for name, tensor in tensors.items() if name in self.tensors}
        self.graph.execute(given, workspace, handle=self._handle)


@functools.cache
def _forward_graph(sizes: _Sizes) -> _Graph:
    made = _Graph(sizes)
    query, key, value = map(made.read, ("query", "key", "value"))
    out, sums = made.graph.sdpa(q=query, k=key, v=value, generate_stats=True, name="attention", **made.common)
    made.write("out", out)
    made.write("sums", sums)
    return made.build()


@functools.cache
def _backward_graph(sizes: _Sizes) -> _Graph:
    made = _Graph(sizes)
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


@functools.cache
def _is_built(sizes: _Sizes) -> bool:
    """Builds both kernels; False where there is none."""
    try:
        _forward_graph(sizes)
        _backward_graph(sizes.at_a_time())
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
    """The frontend; None where it is not installed or does not find cuDNN."""
    try:
        import cudnn
    except (ImportError, OSError, RuntimeError):
        return None
    return cudnn
