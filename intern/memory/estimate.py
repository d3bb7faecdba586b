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
TILE_TOKENS = 4096  # that a tiled MLP computes at a time
_CUDNN_BYTES_PER_ELEMENT = 12  # of workspace, per element of a token's queries
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
        adapted_in_mlp: the part of `adapted_inputs` that belongs to the MLP.
    """

    layers: int
    hidden: int
    intermediate: int
    key_value: int
    weights: float
    trainable: int
    adapted_inputs: float
    adapted_in_mlp: float = 0


@dataclass(frozen=True)
class TrainingPeak:
    """Bytes at the peak of a training step, in the forms that a memory plan can have.

    Args:
        fixed: weights, adapter, gradients, optimizer states and workspace.
        layers: decoder layers of the model.
        layer: what a layer saves for its backward pass.
        tiled_layer: the same with the MLP computed in chunks.
        layer_input: the input of a layer, which is all that a checkpointed one saves.
        recomputing: workspace of the backward pass of attention, which counts where activations leave room for nothing else.
    """

    fixed: float
    layers: int
    layer: float
    tiled_layer: float
    layer_input: float
    recomputing: float = 0

    def with_kept(self, kept: int) -> float:
        """Return the peak with `kept` layers that keep their activations; one layer always has all of them at a time."""
        if kept >= self.layers:
            return self.kept
        inputs = (self.layers - kept) * self.layer_input
        return self.fixed + inputs + max(kept, 1) * self.layer + self.recomputing

    @property
    def recomputed(self) -> float:
        """With every layer's activations recomputed."""
        return self.with_kept(0)

    @property
    def kept(self) -> float:
        """With all activations kept."""
        return self.fixed + self.layers * self.layer

    @property
    def offloaded(self) -> float:
        """With every layer's activations recomputed, and their inputs in host memory."""
        return self.fixed + self.layer + self.recomputing

    @property
    def tiled(self) -> float:
        """As `offloaded`, with MLPs computed in chunks as well."""
        return self.fixed + self.tiled_layer + self.recomputing


def training_peak(
    sizes: ModelSizes, tokens: int, element: int, fused: bool, state_bytes: int, cudnn: bool = False
) -> TrainingPeak:
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
        cudnn: whether attention is cuDNN's, whose backward pass has a workspace of its own (docs/benchmarks.md: 48 KB per token for
            4,096 elements of queries, at most 1 GiB).
    """
    fixed = sizes.weights + sizes.trainable * (8 + state_bytes) + _WORKSPACE_BYTES
    elements = saved_elements(sizes, fused)
    layer_input = sizes.hidden * element * tokens
    in_mlp = 2 * sizes.intermediate + sizes.adapted_in_mlp + (0 if fused else sizes.intermediate)
    # A tiled MLP keeps its input and the gradient of its output for all tokens, everything else for one tile.
    tiled = (elements - in_mlp) * tokens + in_mlp * min(tokens, TILE_TOKENS) + 2 * sizes.hidden * tokens
    workspace = min(tokens * sizes.hidden * _CUDNN_BYTES_PER_ELEMENT, GIB) if cudnn else 0
    return TrainingPeak(
        fixed, sizes.layers, elements * element * tokens, tiled * element, layer_input, recomputing=workspace
    )


def saved_elements(sizes: ModelSizes, fused: bool) -> float:
    """Return the elements that a layer saves per token for its backward pass, as `training_peak` explains them."""
    elements = 2 * sizes.hidden + 2 * sizes.key_value + 2 * sizes.intermediate + sizes.adapted_inputs
    return elements + (0 if fused else sizes.hidden + sizes.intermediate)


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
