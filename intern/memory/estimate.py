"""A model's sizes and a run's settings -> how much memory and disk the run will need, before anything is loaded."""

from dataclasses import dataclass

from intern.units import GIB, MIB

# Anonymous host memory of a run on a GPU, loading an 8B model included (docs/benchmarks.md: 1.55 GiB).
_LIBRARIES_BYTES = 1.6 * GIB
_WORKSPACE_BYTES = (
    0.3 * GIB
)  # of matrix products, and of the loss in chunks: fitted to the peaks named in `training_peak`
_TOKENIZER_BYTES = 20 * MIB  # of a checkpoint besides weights and states, mostly Llama 3's tokenizer.json of 17 MB
_CACHE_BYTES_PER_FILE_BYTE = 8  # rows, their tokens and their packs in the datasets cache (measured: 6 to 8)
_UNLIMITED_CHECKPOINTS = 20  # to expect if trainer.save_total_limit is null


@dataclass(frozen=True)
class ModelSizes:
    """What an estimate needs to know about a model and its adapter.

    Args:
        layers: decoder layers.
        hidden: elements of a hidden state.
        intermediate: elements of the MLP's intermediate activation.
        key_value: key/value heads times head size.
        weights: bytes, in the form in which they are stored.
        trainable: parameters of the adapter.
        adapted_inputs: sum of the input sizes of one layer's adapted modules.
    """

    layers: int
    hidden: int
    intermediate: int
    key_value: int
    weights: float
    trainable: int
    adapted_inputs: float


@dataclass(frozen=True)
class TrainingPeak:
    """Bytes at the peak of a training step, with every layer's activations recomputed and with all of them kept."""

    recomputed: float
    kept: float


def training_peak(sizes: ModelSizes, tokens: int, element: int, fused: bool, state_bytes: int) -> TrainingPeak:
    """Estimate the peak of one step on a batch of `tokens` tokens, within about 15 %.

    Weights + adapter (4-byte weights, 4-byte gradients, optimizer states) + activations + workspace. A layer saves for its backward
    pass, in elements per token: 2 hidden sizes (queries, attention's output), keys and values, gate and up projection, and the input
    of every adapted module, which PEFT casts separately; without fused kernels also one hidden size and one intermediate size that
    Liger recomputes. If layers recompute, each saves only its input, and one at a time has everything. No term grows with the square
    of the length, since isolated attention needs no mask; none with the vocabulary, since TRL computes the loss in chunks. The terms
    follow Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), adapted to gated MLPs and shared key/value heads.

    Calibrated on Llama-3-8B, NF4, r=16 on q, k, v, o (docs/benchmarks.md): fused, 2,048 tokens 6.4 GiB recomputed and 12.7 kept, 1,024
    tokens 9.2 kept, 16,384 tokens 12.0 and 56.3; not fused, 16,384 tokens 78.8 kept.

    Args:
        sizes: of the model.
        tokens: positions of a batch, padding included.
        element: bytes of an activation: 2 in 16-bit precision, 4 in float32.
        fused: whether Liger's kernels are used.
        state_bytes: optimizer states per trainable parameter: 8 for AdamW, 2 for 8-bit AdamW.
    """
    fixed = sizes.weights + sizes.trainable * (8 + state_bytes) + _WORKSPACE_BYTES
    elements = 2 * sizes.hidden + 2 * sizes.key_value + 2 * sizes.intermediate + sizes.adapted_inputs
    elements += 0 if fused else sizes.hidden + sizes.intermediate
    layer = elements * element * tokens
    inputs = sizes.layers * sizes.hidden * element * tokens
    return TrainingPeak(fixed + inputs + layer, fixed + sizes.layers * layer)


def host_memory(on_cpu: bool, peak: TrainingPeak | None) -> float:
    """Return the bytes of host memory that a run cannot give back: libraries and loading, and on a CPU the training step as well.

    Weights arrive tensor by tensor from mapped files and are quantized on their device, so the model's size does not appear here.
    """
    return _LIBRARIES_BYTES + (peak.kept if on_cpu and peak is not None else 0)


def run_directory(trainable: int, state_bytes: int, save_total_limit: int | None) -> float:
    """Return the bytes of the adapter and its checkpoints; one more than the limit exists while the newest is being written.

    Args:
        trainable: parameters of the adapter.
        state_bytes: optimizer states per trainable parameter.
        save_total_limit: checkpoints that are kept; None for all of them.
    """
    checkpoints = (save_total_limit if save_total_limit is not None else _UNLIMITED_CHECKPOINTS) + 1
    return checkpoints * (trainable * (4 + state_bytes) + _TOKENIZER_BYTES) + trainable * 4 + _TOKENIZER_BYTES


def datasets_cache(file_bytes: int) -> float:
    """Return the bytes of the cached rows, tokens and packs of files of this size."""
    return _CACHE_BYTES_PER_FILE_BYTE * file_bytes
