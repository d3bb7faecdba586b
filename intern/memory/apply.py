"""A memory plan -> the model: which layers recompute, in which form, and what holds memory besides."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from intern.kernels import isolated_attention
from intern.kernels.cuda_graphs import LayerGraphs
from intern.kernels.decoder_layers import decoder_layers, draws_at_random
from intern.kernels.lora_linear import pack_weights, unpack_weights
from intern.kernels.recompute import offload_inputs, recompute
from intern.kernels.tiled_mlp import tile_mlps
from intern.memory.estimate import TILE_TOKENS
from intern.memory.plan import MemoryPlan


class PlanApplier:
    """Brings a model into the state that a memory plan describes, from whatever state the plan before left.

    Both ways: the number of checkpointed layers, dequantized weights, CUDA graphs and cuDNN's attention follow each plan.
    One way: inputs in host memory and tiled MLPs are never undone within a run, whatever a later plan says. They are chosen only when
    nothing else fits, and forward passes that later patches wrap could not be restored on their own.
    At the end, `undo` restores everything.

    Args:
        model: with decoder layers, and with our kernels installed if they are to be used.
        graph_limits: returns the tokens of the run's largest batch and of its longest row; called only for CUDA graphs.
    """

    def __init__(self, model: Any, graph_limits: Callable[[], tuple[int, int]]) -> None:
        self.model = model
        self.layers = decoder_layers(model)
        self.draws = draws_at_random(model)  # recomputation must then repeat the random state
        self.plan: MemoryPlan | None = None
        self._graph_limits = graph_limits
        self._graphs: LayerGraphs | None = None
        self._undo: list[Callable[[], None]] = []
        self._were_checkpointed = [layer.gradient_checkpointing for layer in self.layers]

    def use_own_checkpointing(self) -> None:
        """Replace the library's form of checkpointing, and remove the gradients of frozen embeddings that only it needs."""
        self._undo.append(recompute(self.layers, self.draws).undo)
        embeddings = self.model.get_input_embeddings()
        # PEFT and TRL request gradients of frozen embeddings. Nothing reads them, and they take memory and time.
        if not any(parameter.requires_grad for parameter in embeddings.parameters()):
            detached = embeddings.register_forward_hook(lambda module, args, out: out.detach())
            self._undo.append(detached.remove)

    def apply(self, plan: MemoryPlan) -> MemoryPlan:
        """Apply `plan` to the model and return it with the bytes of weights that are actually dequantized."""
        now = self.plan
        if plan.offloaded and not (now and now.offloaded):
            self._undo.append(offload_inputs(self.layers, self.draws, plan.attends_once).undo)
        if plan.tiled and not (now and now.tiled):
            self._undo.append(tile_mlps(self.layers, TILE_TOKENS, self.draws).undo)
        if plan.unpacked != (now.unpacked if now else 0):
            pack_weights(self.model)
            plan = replace(plan, unpacked=unpack_weights(self.model, plan.unpacked))
        isolated_attention.use_cudnn(plan.cudnn)
        if self._graphs is not None and now is not None and replace(plan, peak=now.peak) != now:
            self._graphs.undo()
            self._graphs = None
        if plan.replayed and self._graphs is None:
            self._graphs = LayerGraphs(self.layers, *self._graph_limits())
        self.plan = plan
        self.select_checkpointed_layers(plan.tokens)
        return plan

    def select_checkpointed_layers(self, tokens: int) -> None:
        """Set `layer.gradient_checkpointing` for a batch of `tokens` tokens, padding included."""
        assert self.plan is not None
        # The last layers keep their activations: they are the first that the backward pass frees.
        for index, layer in enumerate(self.layers):
            layer.gradient_checkpointing = index < len(self.layers) - self.plan.kept(tokens)

    def undo(self) -> None:
        """Restore the model, free dequantized weights and switch cuDNN's attention off. A second call does nothing."""
        if self._graphs is not None:
            self._graphs.undo()
            self._graphs = None
        while self._undo:
            self._undo.pop()()
        for layer, was_checkpointed in zip(self.layers, self._were_checkpointed, strict=True):
            layer.gradient_checkpointing = was_checkpointed
        isolated_attention.use_cudnn(False)
        pack_weights(self.model)
