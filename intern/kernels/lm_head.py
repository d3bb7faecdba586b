"""The LM head where loss is: log-probabilities of the scored positions and what they hand back, in one pass over the vocabulary.

TRL's fused head computes its logits twice, forward and backward, and finds the scored positions on the GPU, for which a step has to wait.
Of a frozen head only the hidden states want a gradient, and the gradient of a log-probability is known as soon as its logits are: they
become it in place, some positions at a time, while they are there. The kernels are TRL's, and so is what a pass returns.
"""

import functools
import types
from typing import Any

import torch
from trl.kernels import chunked_logprob
from trl.trainer.utils import FusedCausalLMOutput

_LOGITS = 2**28  # bytes that are there at a time
_ALIGNED = 128  # positions: matrix products like numbers that divide by it
_SCALE = 1024.0  # keeps gradients, at most 1, of unlikely tokens above what float16 takes for zero
# What TRL's head knows more, in a config.
_NO_PART = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def score_positions(model: Any) -> bool:
    """Gives a model with TRL's fused head this one for batches that come with `scored_positions` (intern/kernels/last_mlp.py).

    Returns:
        Whether it did. A head that is trained, adapted or scales its logits keeps TRL's form.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    is_plain = isinstance(head, torch.nn.Linear) and not any(one.requires_grad for one in head.parameters())
    if not is_plain or any(getattr(config, name, None) is not None for name in _NO_PART):
        return False
    theirs, softcap = model.forward, getattr(config, "final_logit_softcapping", None)

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
        hidden = self.base_model(*inputs, **kwargs).last_hidden_state
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

    model.forward = types.MethodType(forward, model)
    return True


class LogProbs(torch.autograd.Function):
    """Log-probabilities of `targets` (positions), with entropies and whether a target is the likeliest token, without gradients.

    Gradients go to the hidden states (positions, hidden size) alone: that of log p_t is (e_t - p) W, with p all probabilities.
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
        least = functools.partial(torch.full_like, targets, -torch.inf, dtype=torch.float32)
        none = functools.partial(torch.zeros_like, targets, dtype=torch.float32)
        largest, before, target, total, weighted, unused = least(), least(), none(), none(), none(), none()
        scale = torch.full_like(targets, _SCALE, dtype=torch.float32)
        piece = max(_ALIGNED, _LOGITS // (size * dtype.itemsize) // _ALIGNED * _ALIGNED)
        for start in range(0, len(targets), piece):
            of = slice(start, start + piece)
            logits = hidden[of].to(dtype) @ weight.t()
            if bias is not None:
                logits += bias.to(dtype)
            given = logits, logits.stride(0), targets[of]
            _run("_forward", (len(logits),), device)(
                *given, largest[of], total[of], weighted[of], unused[of], unused[of], before[of], target[of], 0, size,
                HAS_ENTROPY=True, HAS_LOG_SUM_SQ_PROBS=False, HAS_MEAN_LOGITS=False, HAS_IS_TOP1=True, **transformed,
            )  # fmt: skip
            if gradient is None:
                continue
            sums = largest[of] + total[of].log()
            blocks = -(-size // chunked_logprob._BLOCK_SIZE)
            _run("_backward", (len(logits), blocks), device)(
                *given, sums, sums, scale[of], scale[of], 0, size,
                HAS_LOGPROB_GRAD=True, HAS_ENTROPY_GRAD=False, **transformed,
            )  # fmt: skip
            handed = torch.zeros(hidden[of].shape, dtype=torch.float32, device=device)
            chunked_logprob._addmm_fp32(handed, logits, weight)
            gradient[of] = handed.div_(_SCALE)
        log_sums = largest + total.log()
        ctx.save_for_backward(gradient)
        entropy, is_top1 = log_sums - weighted / total, (target >= largest) & (target > before)
        ctx.mark_non_differentiable(entropy, is_top1)
        return target - log_sums, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [gradient] = ctx.saved_tensors
        return (gradient * grads[0].unsqueeze(1)).to(gradient.dtype), None, None, None, None


def _run(which: str, grid: tuple[int, ...], device: torch.device) -> Any:
    """TRL's kernel, or what stands for it where there is no Triton."""
    if chunked_logprob._use_triton(device):
        return getattr(chunked_logprob, f"{which}_kernel")[grid]
    return getattr(chunked_logprob, f"{which}_tile")
