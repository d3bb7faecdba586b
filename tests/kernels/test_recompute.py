"""Recomputed layers, inputs in host memory, tiled MLPs: the same loss and gradients with fewer saved activations."""

import functools

import bitsandbytes as bnb
import pytest
import torch
from helpers import adapted, passed
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import intern.kernels.recompute
from intern.kernels.decoder_layers import decoder_layers, draws_at_random
from intern.kernels.lora_linear import _weights, fuse_adapters
from intern.kernels.recompute import _Host, offload_inputs, recompute, save_for_recompute
from intern.kernels.tiled_mlp import tile_mlps


def model_and_layers(**config):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        use_cache=False,
        **config,
    )
    model = LlamaForCausalLM(config).train()
    model.model.embed_tokens.requires_grad_(False)  # as under LoRA: the first layer's input needs no gradient
    model.gradient_checkpointing_enable()
    return model, decoder_layers(model)


def loss_and_gradients(model):
    ids = torch.arange(40).reshape(2, 20) % 64
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("form", [recompute, offload_inputs])
def test_recomputed_layers_have_the_same_loss_and_gradients(form, dropout):
    model, layers = model_and_layers(attention_dropout=dropout, attn_implementation="eager")
    for layer in layers:
        layer.gradient_checkpointing = False
    expected = loss_and_gradients(model)
    model, layers = model_and_layers(attention_dropout=dropout, attn_implementation="eager")
    runs = []
    layers[1].mlp.register_forward_hook(lambda module, given, out: runs.append(torch.is_grad_enabled()))
    assert draws_at_random(model) == bool(dropout)
    form(layers, preserve_rng_state=draws_at_random(model))
    found = loss_and_gradients(model)
    assert runs == [False, True]
    assert len(found) == len(expected) > 20
    assert all(torch.allclose(mine, other, atol=1e-6) for mine, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("case", "draws"),
    [
        ("nothing", False),
        ("lora dropout", True),
        ("an attention's dropout", True),
        ("a dropout that is no module", True),
        ("a router's noise", True),
    ],
)
def test_models_that_draw_random_numbers_are_recognized(case, draws):
    model = model_and_layers()[0]
    if case == "lora dropout":
        model.model.layers[1].mlp.lora_dropout = torch.nn.Dropout(0.1)
    if case == "an attention's dropout":
        model.config.attention_dropout = 0.1
    if case == "a dropout that is no module":
        model.config.dropout = 0.1  # OPT
    if case == "a router's noise":
        model.config.router_jitter_noise = 0.01  # Phi-3.5-MoE
    assert draws_at_random(model) == draws


@pytest.mark.parametrize("tokens", [None, 7])
def test_loss_and_gradients_stay_the_same(tokens, monkeypatch):
    expected = loss_and_gradients(model_and_layers()[0])
    kept = []
    real = _Host.keep
    monkeypatch.setattr(_Host, "keep", lambda host, tensor: (kept.append(tensor.shape), real(host, tensor))[1])
    model, layers = model_and_layers()
    offload_inputs(layers, preserve_rng_state=False)
    if tokens:
        tile_mlps(layers, tokens)
    found = loss_and_gradients(model)
    assert [tuple(shape) for shape in kept if len(shape) == 3] == [(2, 20, 32)] * 3
    assert len(found) == len(expected) > 20
    assert all(torch.allclose(mine, other, atol=1e-6) for mine, other in zip(found, expected, strict=True))


def test_the_output_of_a_tiled_mlp_is_computed_if_a_norm_reads_it():
    def model_and_layers():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = Gemma2Config(vocab_size=64, num_hidden_layers=2, head_dim=16, **sizes)
        model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").train()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter)
        model.gradient_checkpointing_enable()
        return model, decoder_layers(model)

    expected = loss_and_gradients(model_and_layers()[0])
    model, layers = model_and_layers()
    offload_inputs(layers, preserve_rng_state=False)
    tile_mlps(layers, 7)
    found = loss_and_gradients(model)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shared", [{}, None])
def test_a_layer_that_leaves_states_for_others_has_gradients_in_its_first_forward(shared):
    _, layers = model_and_layers()
    recompute(layers, preserve_rng_state=False)
    runs = []

    def layer(hidden, shared):
        runs.append(torch.is_grad_enabled())
        return hidden.sin()

    x = torch.randn(3, requires_grad=True)
    layers[0]._gradient_checkpointing_func(functools.partial(layer, shared=shared), x).sum().backward()
    assert runs == [shared is not None, True]
    assert torch.equal(x.grad, x.detach().cos())


def test_the_output_of_a_layer_that_recomputes_takes_no_memory(monkeypatch):
    model, layers = model_and_layers()
    offload_inputs(layers, preserve_rng_state=False)
    sizes = []
    real = intern.kernels.recompute._free_unread_sum
    monkeypatch.setattr(
        intern.kernels.recompute,
        "_free_unread_sum",
        lambda out: (real(out), sizes.append(out.untyped_storage().nbytes())),
    )
    loss_and_gradients(model)
    assert sizes == [0] * 3  # of the second forward of each layer; that gradients stay the same is tested above
    norm = torch.nn.functional.layer_norm(torch.randn(2, 8, requires_grad=True), (8,))
    real(norm)  # its gradient may need its elements
    assert norm.untyped_storage().nbytes() > 0


def test_chunks_are_no_longer_than_requested_and_computed_twice_like_a_checkpointed_layer():
    model, layers = model_and_layers()
    lengths = []
    for layer in layers:
        layer.mlp.gate_proj.register_forward_hook(lambda module, given, out: lengths.append(given[0].shape[1]))
    offload_inputs(layers, preserve_rng_state=False)
    tile_mlps(layers, 8)
    loss_and_gradients(model)
    # Three layers of rows of 8 + 8 + 4 tokens, forward and once more.
    assert sorted(lengths) == 2 * 3 * [4] + 2 * 3 * 2 * [8]


def test_weights_are_dequantized_once_for_all_chunks(monkeypatch):
    mlp = adapted()
    fuse_adapters(mlp)
    x = torch.randn(1, 20, 128)
    expected = passed(mlp, x)
    mlp.zero_grad()
    real, calls = bnb.functional.dequantize_4bit, []
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *given: (calls.append(1), real(*given))[1])
    layer = torch.nn.Module()
    layer.mlp = mlp
    tile_mlps([layer], 8)  # 8 + 8 + 4 tokens
    with torch.no_grad():
        assert torch.allclose(mlp(x), expected[0], atol=1e-5)
    assert len(calls) == 2  # it has two weights
    token = intern.kernels.recompute._run.set(intern.kernels.recompute._Run(is_second=True, results=None))
    try:
        _, *gradients = passed(mlp, x)
    finally:
        intern.kernels.recompute._run.reset(token)
    assert len(calls) == 4
    assert all(torch.allclose(mine, other, atol=1e-4) for mine, other in zip(gradients, expected[1:], strict=True))
    assert [weight.unpacked for weight in _weights(mlp)] == [None, None]


class Tanh(torch.autograd.Function):
    """x -> tanh(2 x), as if that were expensive."""

    computed = 0

    @staticmethod
    def forward(ctx, x):
        def compute():
            Tanh.computed += 1
            return torch.tanh(2 * x), torch.tensor(2.0)

        out, factor = save_for_recompute(compute)
        ctx.save_for_backward(out, factor)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, factor = ctx.saved_tensors
        return grad * factor * (1 - out**2)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("keeps_results", [False, True])
def test_results_saved_for_the_recomputation_are_computed_once(keeps_results, calls, monkeypatch):
    def with_tanh(model, layers):
        for layer in layers:
            whole = layer.mlp.forward
            layer.mlp.forward = lambda x, whole=whole: whole(Tanh.apply(Tanh.apply(x)) if calls == 2 else Tanh.apply(x))
        return model

    expected = loss_and_gradients(with_tanh(*model_and_layers()))
    model, layers = model_and_layers()
    offload_inputs(layers, preserve_rng_state=False, keeps_results=keeps_results)
    monkeypatch.setattr(Tanh, "computed", 0)
    found = loss_and_gradients(with_tanh(model, layers))
    assert Tanh.computed == calls * len(layers) * (1 if keeps_results else 2)
    assert all(torch.allclose(mine, other, atol=1e-6) for mine, other in zip(found, expected, strict=True))
