"""Norms that add both parts of a gradient, compared with the library's."""

import pytest
import torch
from transformers import GemmaConfig, GemmaModel, LlamaConfig, LlamaModel

from intern.kernels.rms_norm import _Norm, _SumAndNorm, fuse_norms, gradient, normalized

SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 10}
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")])  # fmt: skip


def llama():
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(num_key_value_heads=2, **SIZES)).train().requires_grad_(False)
    for layer in model.layers:
        layer.post_attention_layernorm.weight.copy_(torch.linspace(0.5, 2, 64))
        layer.self_attn.q_proj.requires_grad_(True)
    return model


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(inputs_embeds=x * 2).last_hidden_state
    (out * torch.linspace(-1, 1, 64)).sum().backward()
    return [out, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("recomputes", [False, True])
def test_layers_compute_what_they_did_before(recomputes):
    model = llama()
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    x = torch.randn(2, 7, 64)
    expected = gradients(model, x)
    assert len(fuse_norms(model)) == 4
    found = gradients(model, x)
    assert len(found) == 4
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_sum_gets_its_whole_gradient_from_the_norm_that_reads_it(monkeypatch):
    model = llama()
    fuse_norms(model)
    seen = []
    monkeypatch.setattr(
        "intern.kernels.rms_norm.gradient", lambda *given: seen.append(given[1] is not None) or gradient(*given)
    )
    gradients(model, torch.randn(1, 5, 64))
    assert seen == [True, True, True, False]  # backwards; the input of the first layer is no sum


def test_norms_of_another_kind_and_trained_ones_stay():
    gemma = GemmaModel(GemmaConfig(num_key_value_heads=2, head_dim=16, **SIZES)).requires_grad_(False)
    assert len(fuse_norms(gemma)) == 0
    model = llama()
    model.layers[0].input_layernorm.requires_grad_(True)
    model.layers[1].something = torch.nn.Identity()  # an unknown part
    assert len(fuse_norms(model)) == 1


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("size", [64, 3000])
def test_values_and_gradients_are_those_of_the_formula(device, dtype, close, size):
    x, other, grad = (torch.randn(2, 5, size).to(device, dtype) for _ in range(3))
    weight = torch.linspace(0.5, 2, size).to(device, dtype)
    exact = x.double().requires_grad_()
    out = weight.double() * exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    out.backward(grad.double())
    mine, scale = normalized(x, weight, 1e-5)
    torch.testing.assert_close(mine.double(), out.detach(), rtol=close, atol=close)
    for more in (None, other):
        found = gradient(grad.clone(), more, x, weight, scale)
        assert found.dtype == dtype
        expected = exact.grad if more is None else exact.grad + other.double()
        torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)


def test_gradients_of_both_forms_are_those_of_finite_differences():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(0.5, 2, 8, dtype=torch.float64)

    def both(x):
        passed, out = _SumAndNorm.apply(x + 0, weight, 1e-5)
        return passed, out, _Norm.apply(x, weight, 1e-5)

    # Steps large enough to show in float32, the dtype of the scale.
    assert torch.autograd.gradcheck(both, (x,), eps=1e-3, atol=1e-3)
