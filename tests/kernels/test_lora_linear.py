"""The fused product of 4-bit weight and adapter, compared with PEFT's."""

import bitsandbytes as bnb
import pytest
import torch
from helpers import adapted, passed
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

from intern.kernels.lora_linear import _Products, forget_waiting, fuse_adapters, pack_weights, unpack_weights


@pytest.mark.parametrize(("compute", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_output_and_gradients_are_those_of_peft(compute, close):
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1))
    model = adapted(compute, lora_alpha=24)
    theirs = passed(model, x)
    model.zero_grad()
    assert len(fuse_adapters(model)) == 2
    ours = passed(model, x)
    assert len(ours) == 2 + 4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert torch.allclose(mine, other, rtol=close, atol=close * other.abs().max().item())


def test_only_the_input_and_the_product_with_a_are_saved_for_the_backward_pass():
    def kept(model):
        sizes = []
        x = torch.randn(4, 16, 128).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            model.base_model.model.first(x)
        return sorted(size for size in sizes if size >= 4 * 16 * 8)

    model = adapted()
    fuse_adapters(model)
    adapters = [8 * 128, 192 * 8]
    assert kept(model) == sorted([4 * 16 * 8, 4 * 16 * 128, *adapters])


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_an_adapter_that_does_more_keeps_pefts_forward_pass(lora):
    assert len(fuse_adapters(adapted(**lora))) == 0


def test_a_disabled_adapter_has_no_effect():
    x = torch.randn(3, 128)
    model = adapted()
    fuse_adapters(model)
    with model.disable_adapter():
        base = model(x)
    assert torch.allclose(base, model.get_base_model()(x)) is False
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(base, model(x))


def test_the_first_pass_of_a_checkpointed_layer_is_fused_too_and_an_evaluation_is_not(monkeypatch):
    model = adapted()
    fuse_adapters(model)
    passes = []
    real = _Products.apply
    monkeypatch.setattr(_Products, "apply", lambda *given: (passes.append(torch.is_grad_enabled()), real(*given))[1])
    x = torch.randn(2, 7, 128, requires_grad=True)
    checkpoint(model, x, use_reentrant=True).sum().backward()
    assert passes == [False, False, True, True]  # two layers: without gradients first
    model.eval()
    with torch.no_grad():
        model(x)
    assert len(passes) == 4


class Attention(torch.nn.Module):
    is_loaded_in_4bit = True

    def __init__(self, bias: bool) -> None:
        super().__init__()
        for name, size in (("q_proj", 128), ("k_proj", 64), ("v_proj", 64)):
            layer = bnb.nn.Linear4bit(128, size, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
            layer.support_avx512bf16_for_cpu = False
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        other = x if other is None else other
        return torch.cat([self.q_proj(x), self.k_proj(other), self.v_proj(other)], dim=-1)


def attention(targets, bias=False):
    torch.manual_seed(0)
    model = get_peft_model(Attention(bias).to("cpu"), LoraConfig(target_modules=targets, r=8, lora_alpha=24))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"], ["k_proj"]])
def test_layers_with_the_same_input_share_one_node_and_compute_what_peft_does(targets, bias, monkeypatch):
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1))
    model = attention(targets, bias)
    theirs = passed(model, x)
    model.zero_grad()
    assert len(fuse_adapters(model)) == 3
    nodes = []
    real = _Products.apply
    monkeypatch.setattr(_Products, "apply", lambda *given: (nodes.append(len(given[1])), real(*given))[1])
    ours = passed(model, x)
    assert nodes == [3]
    assert len(ours) == len(theirs) == 2 + 2 * len(targets)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_a_layer_with_another_input_than_its_siblings_uses_that_input():
    x, other = torch.randn(2, 3, 128), torch.randn(2, 3, 128)
    model = attention(["q_proj", "k_proj", "v_proj"])
    expected = model(x, other)
    fuse_adapters(model)
    assert torch.allclose(model(x, other), expected, atol=1e-5)


def test_outputs_for_siblings_that_are_never_called_can_be_dropped():
    model = attention(["q_proj", "k_proj", "v_proj"])
    fuse_adapters(model)
    module = model.get_base_model()
    module.q_proj(torch.randn(1, 3, 128, requires_grad=True))  # memory runs out before k_proj is called
    siblings = module.k_proj.get_base_layer().siblings
    assert len(siblings._waiting) == 2 and siblings._input is not None
    forget_waiting(model)
    assert not siblings._waiting and siblings._input is None


def test_dequantized_weights_change_no_result_and_are_used(monkeypatch):
    x = torch.randn(2, 7, 128)
    model = adapted()
    fuse_adapters(model)
    expected = passed(model, x)
    model.zero_grad()
    assert unpack_weights(model, 4 * 128 * 192 + 4) == 4 * 128 * 192  # the first; the second does not fit
    assert unpack_weights(model, 10**9) == 4 * (128 * 192 + 192 * 128)
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", None)
    assert all(torch.equal(mine, other) for mine, other in zip(passed(model, x), expected, strict=True))
    pack_weights(model)
    with pytest.raises(TypeError):
        model(x)
