"""A model's sizes, a batch and a card's peak rates -> how long the batch will take, from shares of the peaks that were measured.

A batch takes the sum of four parts: matrix products at a share of the card's peak rate (never faster than its memory can bring the
weights), attention at a share that grows with the length of rows, what reads and writes memory (elementwise layers, dequantization), and
a constant time per layer in which the GPU is not filled. The constants are fitted to docs/benchmarks.md; how far the model is from every
row there is in docs/planning.md, which `scripts/plan_table.py` writes.
"""

from dataclasses import dataclass

from intern.memory.plan import MemoryPlan

# Of the measured time by the estimate, over all rows of docs/planning.md: a run took from 0.9 to 1.55 times as long as estimated.
FASTEST, SLOWEST = 0.9, 1.55
# A step of 16,384 tokens on an H200 spends 676 ms in matrix products of 467 TFLOP (docs/benchmarks.md: profile), 0.70 of 989 TFLOP/s.
_MATMUL_SHARE = 0.70
# Attention: 0.25 and 0.31 of the peak for rows of 2,048 and 8,192 tokens with flash attention, 0.42 and 0.50 with cuDNN's (the same page).
_FLASH_SHARE, _CUDNN_SHARE, _HALF_LENGTH = 0.31, 0.52, 500
# SwiGLU, norms, additions, rotation: 61 ms of the same step at 4.8 TB/s, as often as a layer's saved elements are read or written.
_ELEMENTWISE_PASSES = 5.0
_IDLE_S = 0.0016  # per layer and batch (from rows of 512 to 2,048 tokens on an H200): kernels too small to fill the GPU, launches
_DEQUANTIZED_BYTES = 2.5  # per 4-bit weight: half a byte is read, two are written
_ELEMENT_BYTES = 2  # in 16-bit precision


@dataclass(frozen=True)
class Rates:
    """What a card can do at most: floating-point operations and bytes per second, and whether cuDNN's attention runs on it."""

    flops: float
    bandwidth: float
    cudnn: bool


@dataclass(frozen=True)
class Weights:
    """What a token is multiplied with.

    Args:
        layers: decoder layers.
        matrices: parameters of all layers' matrices.
        quantized: of these, the ones in 4 bits.
        head: parameters of the LM head.
        trainable: parameters of the adapter.
        queries: elements of all queries of a token in one layer.
        elements: elements that a layer saves per token.
    """

    layers: int
    matrices: float
    quantized: float
    head: float
    trainable: float
    queries: float
    elements: float


@dataclass(frozen=True)
class Batch:
    """An average batch: its tokens, the tokens that an average token's row has, and the share of tokens that carry loss."""

    tokens: float
    row: float
    scored: float


def batch_seconds(weights: Weights, batch: Batch, plan: MemoryPlan, rates: Rates) -> float:
    """Return the seconds of forward and backward of one batch; multiply with FASTEST and SLOWEST for the range of what was measured.

    Frozen matrices cost 4 floating-point operations per parameter and token (forward, and the gradient of the input), adapters 6, a
    recomputed layer 2 more. Causal attention in rows of `row` tokens costs 7 times row x queries per token and layer, its second
    computation 2 more.

    Args:
        weights: of the model.
        batch: the run's average one.
        plan: which layers recompute, and how many bytes of weights are kept dequantized.
        rates: of the card.
    """
    tokens, kept = batch.tokens, plan.kept(max(1, round(batch.tokens)))
    again = (weights.layers - kept) / weights.layers  # share of layers that are computed a second time
    matmul = (4 + 2 * again) * weights.matrices + 4 * weights.head * batch.scored + 6 * weights.trainable
    passes = (2 + again) * weights.matrices * _ELEMENT_BYTES
    products = max(matmul * tokens / (_MATMUL_SHARE * rates.flops), passes / rates.bandwidth)
    share = (_CUDNN_SHARE if rates.cudnn else _FLASH_SHARE) * batch.row / (batch.row + _HALF_LENGTH)
    attended = 7 + 2 * (0 if plan.attends_once else again)
    attention = attended * batch.row * weights.queries * weights.layers * tokens / (share * rates.flops)
    elementwise = _ELEMENTWISE_PASSES * (1 + again / 2) * weights.elements * weights.layers * tokens * _ELEMENT_BYTES
    packed = max(0.0, weights.quantized - plan.unpacked / _ELEMENT_BYTES)
    dequantized = (2 + again) * packed * _DEQUANTIZED_BYTES
    idle = _IDLE_S * weights.layers * (1 + again / 2)
    return products + attention + (elementwise + dequantized) / rates.bandwidth + idle
