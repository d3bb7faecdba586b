"""Recorded layers have the same losses and gradients as layers that are not recorded, for rows of any length.

A CPU has no CUDA graphs: here "replaying" calls the recorded work again, on the same memory. The test at the end needs a GPU.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from intern.kernels.cuda_graphs import LayerGraphs
from intern.kernels.decoder_layers import are_one_kind
from intern.kernels.isolated_attention import register
from intern.kernels.rms_norm import fuse_norms

PACKS = ([30, 20, 50], [100], [7], [1, 1, 60, 9, 9, 9, 9, 9, 9, 9])  # lengths of the rows in each batch


def adapted(device="cpu"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, use_cache=False
    )
    config._attn_implementation = register()
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    assert len(fuse_norms(model)) == 8  # as in training
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if device == "cuda":  # as a base is loaded: 16 bits, and adapters in 32
        for parameter in model.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.half()
    return model.train().to(device)


def batch(lengths, device="cpu", packed=True):
    torch.manual_seed(sum(lengths))
    ids = torch.randint(0, 64, (1, sum(lengths)), device=device)
    if not packed:
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(one, device=device) for one in lengths])[None]
    return {
        "input_ids": ids,
        "labels": ids,
        "position_ids": positions,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def layers(model):
    return model.get_base_model().model.layers


def graphed(model, most=104, longest=100):
    calls = []

    def again(forward, backward):
        calls.append((forward, backward))
        forward()  # as before recording CUDA graphs: it must leave no trace
        backward()
        return forward, backward

    return LayerGraphs(layers(model), most, longest, again), calls


def losses_and_gradients(model, batches):
    """Of two optimizer steps on all batches: gradients add up within a step and start again at zero after it."""
    found = []
    for _ in range(2):
        model.zero_grad()
        for one in batches:
            loss = model(**one).loss
            loss.backward()
            found.append(loss.detach())
        found += [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    return found


def same(mine, others, **limits):
    return all(torch.allclose(one, other, **limits) for one, other in zip(mine, others, strict=True))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("checkpointed", [0, 2])
def test_losses_and_gradients_are_those_of_layers_that_are_not_recorded(packed, checkpointed):
    batches = [batch(lengths, packed=packed) for lengths in PACKS]
    model = adapted()
    expected = losses_and_gradients(model, batches)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for index, layer in enumerate(layers(model)):
            layer.gradient_checkpointing = index < checkpointed
    graphs, calls = graphed(model)
    assert same(losses_and_gradients(model, batches), expected, atol=1e-6)
    # 100 and 95 tokens are padded to 104 or 128, 7 to 64; ten rows and the padding need more boundaries than three rows.
    assert len(calls) == (3 if packed else 2)
    graphs.undo()
    assert same(losses_and_gradients(model, batches), expected, atol=1e-6)
    assert len(calls) == (3 if packed else 2)


def test_what_is_after_a_row_changes_nothing():
    model = adapted()
    graphed(model)
    first = model(**batch([7])).loss
    first.backward()
    model(**batch([60])).loss.backward()  # the same shape: its tokens stay in the buffers
    assert torch.equal(model(**batch([7])).loss, first)


def test_no_row_is_longer_than_the_length_that_kernels_receive():
    model = adapted()
    received = []
    graphed(model, most=800, longest=50)  # lengths in steps of 128: the padding is one more row, of up to 127 tokens
    layers(model)[1].self_attn.register_forward_pre_hook(
        lambda module, args, given: received.append(
            (given["cu_seq_lens_q"].diff().max().item(), given["max_length_q"])
        ),
        with_kwargs=True,
    )
    model(**batch([50, 50, 30])).loss.backward()
    assert received == [(126, 128)] * 2


def test_gradients_from_other_passes_are_kept():
    batches = [batch([30]), batch([20])]
    model = adapted()
    expected = losses_and_gradients(model, batches)[:]
    graphed(model)
    model.zero_grad()
    for layer in layers(model):
        layer.training = False  # the first batch is not replayed
    model(**batches[0]).loss.backward()
    model.train()
    model(**batches[1]).loss.backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert same(found, expected[2 : 2 + len(found)], atol=1e-6)


@pytest.mark.parametrize("case", ["evaluation", "no gradient", "long row", "padding", "too many tokens", "open"])
def test_every_other_pass_is_not_replayed(case):
    model = adapted()
    rows = batch([40]) if case != "padding" else batch([40], packed=False)
    if case == "padding":
        rows["attention_mask"][:, :5] = 0
    expected = model(**rows).loss
    _, calls = graphed(model, most=64 if case == "too many tokens" else 104, longest=32 if case == "long row" else 64)
    if case == "too many tokens":
        rows = batch([40, 40])
        expected = adapted()(**rows).loss
    if case == "evaluation":
        model.eval()
    if case == "open":
        waiting = model(**rows).loss  # its backward pass is still to come
        assert len(calls) == 1
        assert torch.allclose(model(**batch([30])).loss, adapted()(**batch([30])).loss, atol=1e-6)
        waiting.backward()
        assert len(calls) == 1
        del calls[:]
    with torch.set_grad_enabled(case != "no gradient"):
        found = model(**rows).loss
    assert torch.allclose(found, expected, atol=1e-6)
    assert not calls


@pytest.mark.parametrize("case", ["alike", "a layer says so", "only the configuration says so"])
def test_layers_that_differ_are_recognized(case):
    model = adapted()
    if case == "a layer says so":
        layers(model)[3].attention_type = "sliding_attention"
    if case == "only the configuration says so":  # Gemma 3: each layer gets the rotation of its type
        model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    assert are_one_kind(model, layers(model)) == (case == "alike")


def test_layers_that_return_more_than_hidden_states_say_so():
    model = adapted()
    kind = type("Talkative", (type(layers(model)[0]),), {"forward": lambda layer, hidden, **given: (hidden, None)})
    layers(model)[0].__class__ = kind
    graphed(model)
    with pytest.raises(RuntimeError, match="Talkative returns more than hidden states"):
        model(**batch([40]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")
def test_recorded_on_a_gpu():
    batches = [batch(lengths, "cuda") for lengths in PACKS]
    model = adapted("cuda")
    with torch.autocast("cuda", torch.float16):
        expected = losses_and_gradients(model, batches)
        graphs = LayerGraphs(layers(model), 104, 100)
        found = losses_and_gradients(model, batches)
        assert same(found, expected, atol=2e-3, rtol=1e-2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)  # as an optimizer would: in place
        changed = losses_and_gradients(model, batches)
        graphs.undo()
        assert not same(changed, expected, atol=2e-3, rtol=1e-2)
        assert same(changed, losses_and_gradients(model, batches), atol=2e-3, rtol=1e-2)
