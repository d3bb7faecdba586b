"""A model's shape and a run's settings -> how much memory and disk the run will take, before anything is loaded."""

from dataclasses import dataclass

from intern.units import GIB

_LIBRARIES = (
    1.6 * GIB
)  # anonymous host memory of a run on a GPU, loading an 8 B model included (docs/benchmarks.md: 1.55)
_WORKSPACE = 0.3 * GIB  # matrix multiplication's, and the loss in chunks: fitted to the peaks named below
_TOKENIZER = 20 * 2**20  # what a checkpoint holds beside weights and states, mostly Llama 3's tokenizer.json of 17 MB
_CACHES_PER_BYTE = (
    8  # rows, their tokens and their packs: bytes in the datasets cache for each byte of the file (measured: 6 to 8)
)
_UNLIMITED = 20  # checkpoints to expect where trainer.save_total_limit is null


@dataclass(frozen=True)
class Shape:
    """What an estimate needs of a model and its adapter."""

    layers: int
    hidden: int
    intermediate: int
    key_value: int  # key/value heads times head size
    weights: float  # bytes, as they are computed with
    trainable: int  # parameters of the adapter
    adapted_inputs: float  # sum of the input sizes of one layer's adapted modules


@dataclass(frozen=True)
class TrainingPeak:
    """Bytes at the peak of a training step, with every layer's activations recomputed and with all of them kept."""

    recomputed: float
    kept: float


def training_peak(shape: Shape, tokens: int, element: int, fused: bool, state_bytes: int) -> TrainingPeak:
    """The peak of one step on a batch of `tokens` tokens, within about 15 %.

    Weights + adapter (4-byte weights, 4-byte gradients, optimizer states) + activations + workspace. What a layer keeps for its
    backward pass, in numbers a token: 2 hidden sizes (queries, attention's output), keys and values, gate and up projection, and the
    input of every adapted module, which PEFT casts for itself; without fused kernels also one hidden size and one intermediate size
    that Liger recomputes. Where layers recompute, each keeps its input alone, and one at a time has all of it. No term grows with the
    square of the length, since isolated attention makes no mask; none with the vocabulary, since TRL computes the loss in chunks.
    The terms follow Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), written anew for gated MLPs and shared key/value heads.

    Calibrated on Llama-3-8B, NF4, r=16 on q, k, v, o (docs/benchmarks.md): fused, 2,048 tokens 6.4 GiB recomputed and 12.7 kept, 1,024
    tokens 9.2 kept, 16,384 tokens 12.0 and 56.3; not fused, 16,384 tokens 78.8 kept.

    Args:
        tokens: positions of a batch, padding included.
        element: bytes of an activation: 2 in 16-bit precision, 4 in float32.
        fused: whether Liger's kernels are used.
        state_bytes: optimizer states for each trainable parameter: 8 for AdamW, 2 for 8-bit AdamW.
    """
    fixed = shape.weights + shape.trainable * (8 + state_bytes) + _WORKSPACE
    numbers = 2 * shape.hidden + 2 * shape.key_value + 2 * shape.intermediate + shape.adapted_inputs
    numbers += 0 if fused else shape.hidden + shape.intermediate
    layer = numbers * element * tokens
    inputs = shape.layers * shape.hidden * element * tokens
    return TrainingPeak(fixed + inputs + layer, fixed + shape.layers * layer)


def host_memory(on_cpu: bool, peak: TrainingPeak | None) -> float:
    """Bytes of host memory that nothing can take back: libraries and loading, and on a CPU the training step as well.

    Weights arrive tensor by tensor from mapped files and are quantized on their device, so the model's size does not appear here.
    """
    return _LIBRARIES + (peak.kept if on_cpu and peak is not None else 0)


def run_directory(trainable: int, state_bytes: int, save_total_limit: int | None) -> float:
    """Bytes of the adapter and of the checkpoints beside it; one more than the limit stands while the newest is being written."""
    checkpoints = (save_total_limit if save_total_limit is not None else _UNLIMITED) + 1
    return checkpoints * (trainable * (4 + state_bytes) + _TOKENIZER) + trainable * 4 + _TOKENIZER


def datasets_cache(file_bytes: int) -> float:
    """Bytes of the cached rows, tokens and packs of files of this size."""
    return _CACHES_PER_BYTE * file_bytes
