"""The LM head at scored positions: log-probabilities and their gradient in one pass over the vocabulary.

TRL's fused head computes its logits twice, forward and backward, and finds the scored positions on the GPU, which makes the CPU wait.
A frozen head needs gradients only for its input, and the gradient of a log-probability is known as soon as its logits are. So the logits
become their own gradient in place, a chunk of positions at a time. The kernels and the values returned are TRL's.
"""

import functools
import types
from typing import Any

import torch
from trl.kernels import chunked_logprob
from trl.trainer.utils import FusedCausalLMOutput

from intern.kernels.patches import Patches

_LOGITS_BYTES = 2**28  # of one chunk's logits
_ALIGNED = 128  # positions; matrix products are fastest for multiples of it
_GRADIENT_SCALE = 1024.0  # keeps gradients (at most 1) of unlikely tokens above the smallest float16
# Keys of a model's configuration that make TRL's head scale its logits, which this one does not.
_SCALING_KEYS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def applies(model: Any) -> bool:
    """Whether the head of a model, or of a PEFT model's base, is a frozen linear layer whose logits are not scaled."""
    base = _base(model)
    config, head = base.config.get_text_config(), base.get_output_embeddings()
    is_frozen = isinstance(head, torch.nn.Linear) and not any(weight.requires_grad for weight in head.parameters())
    return is_frozen and all(getattr(config, name, None) is None for name in _SCALING_KEYS)


def score_positions(model: Any) -> Patches:
    """Replace the forward pass of a model with TRL's fused head for batches that carry `scored_positions` (last_mlp.py).

    Args:
        model: the model, or a PEFT model around it. Nothing is replaced if `applies` refuses it.

    Returns:
        What was replaced: one forward pass, or none.
    """
    patches = Patches()
    if not applies(model):
        return patches
    base = _base(model)
    config, head = base.config.get_text_config(), base.get_output_embeddings()
    theirs, softcap = base.forward, getattr(config, "final_logit_softcapping", None)

    @functools.wraps(theirs)
    def forward(
        self: Any,
        *inputs: Any,
        fused_lm_head: bool = False,
        scored_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or scored_positions is None:
            return theirs(*inputs, fused_lm_head=fused_lm_head, **kwargs)
        labels, items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*inputs, **kwargs).last_hidden_state  # (batch, tokens, hidden)
        scored = hidden.flatten(0, 1).index_select(0, scored_positions).to(head.weight.device)
        targets = labels.flatten().index_select(0, scored_positions + 1).to(head.weight.device)
        log_probs, entropy, is_top1 = LogProbs.apply(scored, head.weight, head.bias, targets, softcap)
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / (max(1, len(targets)) if items is None else items),
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=torch.ones_like(targets, dtype=torch.bool),
        )

    patches.set(base, "forward", types.MethodType(forward, base))
    return patches


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class LogProbs(torch.autograd.Function):
    """Log-probabilities of target tokens, with the entropy of each prediction and whether the target is the likeliest token.

    Only the hidden states get a gradient, and only from the log-probabilities: d log p_t / d hidden = (e_t - p) W, where p holds the
    probabilities of all tokens.

    Args of `apply`:
        hidden: (positions, hidden).
        weight: (vocabulary, hidden), frozen.
        bias: (vocabulary) or None, frozen.
        targets: (positions) int64 token ids.
        softcap: logits become softcap * tanh(logits / softcap); None leaves them.

    Returns:
        log-probabilities (positions) float32 in nats, entropies (positions) float32 in nats, is_top1 (positions) bool.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
    ) -> tuple[torch.Tensor, ...]:
        device = hidden.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        weight, size = weight.to(dtype), len(weight)
        transformed = {
            "logit_scale": 1.0,
            "softcap": softcap or 1.0,
            "inv_t": 1.0,
            "HAS_SOFTCAP": softcap is not None,
            "BLOCK_SIZE": chunked_logprob._BLOCK_SIZE,
        }
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Statistics of each position's logits, (positions) float32, which TRL's kernel updates.
        lowest = functools.partial(torch.full_like, targets, -torch.inf, dtype=torch.float32)
        zeros = functools.partial(torch.zeros_like, targets, dtype=torch.float32)
        largest, before, target, total, weighted, unused = lowest(), lowest(), zeros(), zeros(), zeros(), zeros()
        scale = torch.full_like(targets, _GRADIENT_SCALE, dtype=torch.float32)
        chunk = max(_ALIGNED, _LOGITS_BYTES // (size * dtype.itemsize) // _ALIGNED * _ALIGNED)
        for start in range(0, len(targets), chunk):
            of = slice(start, start + chunk)
            logits = hidden[of].to(dtype) @ weight.t()  # (chunk, vocabulary)
            if bias is not None:
                logits += bias.to(dtype)
            given = logits, logits.stride(0), targets[of]
            _kernel("_forward", (len(logits),), device)(
                *given, largest[of], total[of], weighted[of], unused[of], unused[of], before[of], target[of], 0, size,
                HAS_ENTROPY=True, HAS_LOG_SUM_SQ_PROBS=False, HAS_MEAN_LOGITS=False, HAS_IS_TOP1=True, **transformed,
            )  # fmt: skip
            if gradient is None:
                continue
            sums = largest[of] + total[of].log()
            blocks = -(-size // chunked_logprob._BLOCK_SIZE)
            _kernel("_backward", (len(logits), blocks), device)(
                *given, sums, sums, scale[of], scale[of], 0, size,
                HAS_LOGPROB_GRAD=True, HAS_ENTROPY_GRAD=False, **transformed,
            )  # fmt: skip
            grad_hidden = torch.zeros(hidden[of].shape, dtype=torch.float32, device=device)
            chunked_logprob._addmm_fp32(grad_hidden, logits, weight)
            gradient[of] = grad_hidden.div_(_GRADIENT_SCALE)
        log_sums = largest + total.log()
        ctx.save_for_backward(gradient)
        entropy, is_top1 = log_sums - weighted / total, (target >= largest) & (target > before)
        ctx.mark_non_differentiable(entropy, is_top1)
        return target - log_sums, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [gradient] = ctx.saved_tensors
        return (gradient * grads[0].unsqueeze(1)).to(gradient.dtype), None, None, None, None


def _kernel(which: str, grid: tuple[int, ...], device: torch.device) -> Any:
    """Return TRL's Triton kernel launched on `grid`, or its PyTorch equivalent on devices without Triton."""
    if chunked_logprob._use_triton(device):
        return getattr(chunked_logprob, f"{which}_kernel")[grid]
    return getattr(chunked_logprob, f"{which}_tile")
