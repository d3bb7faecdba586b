"""The last MLP at scored positions only: the same loss and gradients from fewer positions."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from intern.kernels.last_mlp import ScoredOnly, positions

IDS = torch.arange(40).reshape(2, 20) % 64
LABELS = torch.where(torch.arange(20) < 14, -100, IDS)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, use_cache=False
    )
    model = LlamaForCausalLM(config).train()
    rows = []
    model.model.layers[-1].mlp.gate_proj.register_forward_hook(
        lambda module, given, out: rows.append(given[0].shape[:-1].numel())
    )
    return model, rows


def loss_and_gradients(model):
    loss = model(input_ids=IDS, labels=LABELS).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("recomputed", [False, True])
def test_loss_and_gradients_stay_the_same(recomputed):
    expected = loss_and_gradients(llama()[0])
    model, rows = llama()
    if recomputed:
        model.gradient_checkpointing_enable()
    scored = ScoredOnly(model)
    scored.look_at(LABELS.shape, positions(LABELS))
    found = loss_and_gradients(model)
    assert set(rows) == {2 * 6}  # the positions before the six labelled tokens of each row
    assert all(torch.allclose(mine, other, atol=1e-6) for mine, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", ["an unknown part", "more arguments", "more than one result"])
def test_an_mlp_of_another_shape_computes_all(case):
    model, rows = llama()
    layer = model.model.layers[-1]
    if case == "an unknown part":  # a convolution over positions, perhaps
        layer.conv = torch.nn.Identity()
    if case == "more than one result":
        whole = layer.mlp.forward
        layer.mlp.forward = lambda hidden: (whole(hidden), "scores")
    scored = ScoredOnly(model)
    scored.look_at(LABELS.shape, positions(LABELS))
    hidden = torch.randn(2, 20, 32)
    if case == "more arguments":
        layer.mlp.forward = scored._at_scored_positions(layer.mlp, lambda hidden, residual: hidden + residual)
        assert torch.equal(layer.mlp(hidden, hidden), hidden * 2)
        return
    out = layer.mlp(hidden)
    assert rows[-1] == 40 and isinstance(out, tuple) == (case == "more than one result")


@pytest.mark.parametrize("case", ["evaluation", "another batch", "nothing scored"])
def test_every_other_pass_computes_all(case):
    model, rows = llama()
    scored = ScoredOnly(model)
    labels = torch.full_like(LABELS, -100) if case == "nothing scored" else LABELS
    scored.look_at(labels.shape, positions(labels))
    ids = IDS[:, :15] if case == "another batch" else IDS
    plain = llama()[0]
    if case == "evaluation":
        model.eval()
    assert torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-6)
    assert rows == [ids.numel()]


def test_an_output_that_autocast_narrows_keeps_its_dtype():
    model, rows = llama()
    layer, hidden = model.model.layers[-1], torch.randn(2, 20, 32)
    with torch.autocast("cpu", torch.bfloat16):
        whole = layer.mlp(hidden)
        scored = ScoredOnly(model)
        scored.look_at(LABELS.shape, positions(LABELS))
        found = layer.mlp(hidden)
    assert rows == [40, 12] and found.dtype == whole.dtype == torch.bfloat16
    at = positions(LABELS)
    torch.testing.assert_close(found.flatten(0, 1)[at], whole.flatten(0, 1)[at], atol=1e-2, rtol=1e-2)
