"""The LM head in one pass, compared with the logits of the whole vocabulary and with TRL's head in training."""

import pytest
import torch
import trl.trainer.utils
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

import intern.kernels.lm_head
from intern.kernels.last_mlp import positions
from intern.kernels.lm_head import LogProbs, score_positions

VOCABULARY = 3000


def drawn(device, dtype, bias):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator)
    weight = torch.randn(VOCABULARY, 64, generator=generator) / 4
    targets = torch.randint(VOCABULARY, (300,), generator=generator)
    targets[:50] = (hidden @ weight.T).argmax(1)[:50]
    offsets = torch.randn(VOCABULARY, generator=generator) if bias else None
    return [one.to(device, dtype) if one is not None else None for one in (hidden, weight, offsets)] + [
        targets.to(device)
    ]


def check(device, dtype, bias, softcap, tolerance):
    hidden, weight, offsets, targets = drawn(device, dtype, bias)
    graded = torch.linspace(-2, 2, 300, device=device)
    ours = hidden.clone().requires_grad_()
    found = LogProbs.apply(ours, weight, offsets, targets, softcap)
    (found[0] * graded).sum().backward()
    theirs = hidden.float().requires_grad_()
    logits = theirs @ weight.float().T + (offsets.float() if bias else 0)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    every = logits.log_softmax(1)
    wanted = every.gather(1, targets[:, None])[:, 0]
    (wanted * graded).sum().backward()
    assert torch.linalg.norm(found[0] - wanted) < tolerance * torch.linalg.norm(wanted)
    assert torch.linalg.norm(ours.grad - theirs.grad) < tolerance * torch.linalg.norm(theirs.grad)
    torch.testing.assert_close(found[1], -(every.exp() * every).sum(1).detach(), atol=30 * tolerance, rtol=tolerance)
    assert (found[2] == (logits.argmax(1) == targets)).float().mean() >= 1 - tolerance


@pytest.mark.parametrize("piece", [128, 256, 512])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, None), (False, 3.0)])
def test_log_probabilities_and_gradients_are_those_of_the_whole_vocabulary(piece, bias, softcap, monkeypatch):
    monkeypatch.setattr(intern.kernels.lm_head, "_LOGITS_BYTES", piece * VOCABULARY * 4)
    check("cpu", torch.float32, bias, softcap, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: Triton's kernels run nowhere else")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_computes_the_same(dtype, monkeypatch):
    monkeypatch.setattr(intern.kernels.lm_head, "_LOGITS_BYTES", 128 * VOCABULARY * 2)
    check("cuda", dtype, True, None, 0.02)


def llama(**more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **more
    )
    model = LlamaForCausalLM(config).train()
    model.lm_head.requires_grad_(False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def results(model, scored):
    ids = torch.arange(40).reshape(2, 20) % 64
    labels = torch.where(torch.arange(20) < scored, -100, ids)
    out = model(input_ids=ids, labels=labels, fused_lm_head=True, scored_positions=positions(labels))
    out.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    sums = [one.detach().sum().float() for one in (out.loss, out.log_probs, out.entropy, out.is_top1, out.label_mask)]
    return sums + gradients


@pytest.mark.parametrize("scored", [14, 20])  # 20: not one position
def test_a_pass_returns_what_trls_head_returns(scored, monkeypatch):
    theirs = llama()
    plain = theirs.forward
    theirs.forward = lambda scored_positions, **given: plain(**given)
    expected = results(theirs, scored)
    ours = llama()
    assert len(score_positions(ours)) == 1
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", None)  # it is not used
    found = results(ours, scored)
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["trained", "scaled", "logits requested"])
def test_other_heads_and_passes_are_the_librarys(case):
    model = llama(**({"logits_scaling": 2.0} if case == "scaled" else {}))
    if case == "trained":
        model.lm_head.requires_grad_(True)
    assert len(score_positions(model)) == (case == "logits requested")
    ids = torch.arange(6)[None]
    assert model(input_ids=ids).logits.shape == (1, 6, 64)
    assert model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 8)
