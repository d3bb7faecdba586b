"""Packed rows never see each other: the isolated attention against every row alone."""

import copy

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import intern.attention
from intern.attention import isolated_attention, register
from intern.layers import decoder_layers
from intern.model import Base
from intern.offload import offload_inputs

_IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
LENGTHS = (7, 33, 1, 18, 50)


@pytest.fixture(scope="module")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def model(device):
    base = Base(OmegaConf.create({"pretrained_model_name_or_path": "data/tiny_llama3"}))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return AutoModelForCausalLM.from_pretrained(base.name, attn_implementation=register(), dtype=dtype).to(device)


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(10, 3000, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def packed(some, device):
    row = {
        "input_ids": [token for one in some for token in one["input_ids"]],
        "labels": [token for one in some for token in one["labels"]],
        "seq_lengths": [len(one["input_ids"]) for one in some],
    }
    batch = DataCollatorForLanguageModeling(pad_token_id=2, padding_free=True)([row])
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def logits(model, batch):
    return model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits.float()


def close(model):
    return {"atol": 1e-4, "rtol": 1e-4} if model.dtype == torch.float32 else {"atol": 0.15, "rtol": 0.05}


def test_a_packed_row_has_the_logits_it_has_alone(model, device):
    together = logits(model, packed(rows(), device))[0].split(LENGTHS)
    for row, ours in zip(rows(), together, strict=True):
        alone = model(input_ids=torch.tensor([row["input_ids"]], device=device)).logits.float()[0]
        torch.testing.assert_close(ours, alone, **close(model))


def test_packed_gradients_are_the_sum_of_the_rows_own(model, device):
    def gradients(losses):
        twin = copy.deepcopy(model)
        sum(losses(twin)).backward()
        return torch.cat([parameter.grad.float().flatten() for parameter in twin.parameters()])

    def loss(out, row):
        return torch.nn.functional.cross_entropy(
            out[:-1], torch.tensor(row["input_ids"][1:], device=device), reduction="sum"
        )

    def in_a_pack(twin):
        return [
            loss(out, row)
            for row, out in zip(rows(), logits(twin, packed(rows(), device))[0].split(LENGTHS), strict=True)
            if len(out) > 1
        ]

    def alone(twin):
        return [
            loss(twin(input_ids=torch.tensor([row["input_ids"]], device=device)).logits.float()[0], row)
            for row in rows()
            if len(row["input_ids"]) > 1
        ]

    ours, theirs = gradients(in_a_pack), gradients(alone)
    assert torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs) < (
        1e-4 if model.dtype == torch.float32 else 0.05
    )


def test_a_changed_row_never_changes_its_neighbours(model, device):
    before = logits(model, packed(rows(), device))[0].split(LENGTHS)
    changed = rows()
    changed[1] = {"input_ids": [11] * LENGTHS[1], "labels": [11] * LENGTHS[1]}
    after = logits(model, packed(changed, device))[0].split(LENGTHS)
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [
        True,
        False,
        True,
        True,
        True,
    ]


def test_numbers_that_autocast_left_wide_are_narrowed():
    """In a float32 model the rotation gives float32 queries and keys, and the values stay as autocast made them."""
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    boundaries = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed_rows = {"cu_seq_lens_q": boundaries, "max_length_q": 3}
    out, _ = isolated_attention(torch.nn.Identity(), query, key, value.bfloat16(), None, **packed_rows)
    whole, _ = isolated_attention(torch.nn.Identity(), query, key, value, None, **packed_rows)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), whole, atol=0.05, rtol=0.05)


def test_no_mask_is_made_for_a_packed_batch(model, device, monkeypatch):
    monkeypatch.setattr(intern.attention, "sdpa_mask", lambda **kwargs: pytest.fail("a mask was made"))
    logits(model, packed(rows(), device))


def test_padded_batches_and_generation_are_transformers_own(model, device):
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("sdpa")
    ids = torch.tensor([[2, 2, 2, 100, 101], [100, 101, 102, 103, 104]], device=device)
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], device=device)
    for twin in (model, reference):
        twin.eval()
    assert torch.equal(
        model(input_ids=ids, attention_mask=mask).logits, reference(input_ids=ids, attention_mask=mask).logits
    )
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(model.generate(**asked), reference.generate(**asked))


def test_a_long_row_attends_once_where_layers_keep_results(monkeypatch):
    """With the kernel that CPUs have in the place of cuDNN's."""
    aten, calls = torch.ops.aten, []

    def forward(query, key, value, scaling):
        calls.append(query.shape)
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scaling)

    def backward(scaling, grad, *kept):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, *kept, 0.0, True, scale=scaling)

    def loss_and_gradients():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
        )
        twin = LlamaForCausalLM._from_config(config, attn_implementation=register()).train()
        twin.gradient_checkpointing_enable()
        offload_inputs(decoder_layers(twin), preserve_rng_state=False, keeps_results=is_long)
        ids = torch.arange(40)[None]
        loss = twin(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in twin.parameters())]

    monkeypatch.setattr(intern.attention, "_cudnn_forward", forward)
    monkeypatch.setattr(intern.attention, "_cudnn_backward", backward)
    monkeypatch.setattr(intern.attention, "_is_long_row", lambda query, key: is_long)
    is_long = False
    expected = loss_and_gradients()
    assert not calls
    is_long = True
    found = loss_and_gradients()
    assert calls == [(1, 2, 40, 16)] * 3
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not _IS_HOPPER, reason="needs a Hopper GPU: its kernel for long rows runs nowhere else")
def test_the_kernel_of_long_rows_gives_what_flash_attention_gives():
    lengths = [3000, 5000]
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, 8000, heads, 128) for heads in (8, 2, 2)]
    drawn = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    boundaries = torch.tensor([0, 3000, 8000], dtype=torch.int32, device="cuda")

    def out_and_gradients(attend):
        rows = [one.transpose(1, 2).detach().requires_grad_() for one in drawn]
        out = attend(*rows)
        out.backward(torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).to(out.dtype))
        return [out.detach(), *(row.grad for row in rows)]

    ours = out_and_gradients(lambda *rows: intern.attention._cudnn(*rows, lengths, 0.09))
    flash = out_and_gradients(lambda *rows: intern.attention._flash(*rows, boundaries, 5000, 0.09, 4))
    for mine, other in zip(ours, flash, strict=True):
        assert torch.linalg.norm((mine - other).float()) < 0.01 * torch.linalg.norm(other.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: CPUs have no such kernel")
def test_the_kernel_of_older_cards_gives_the_same(device, monkeypatch):
    base = Base(OmegaConf.create({"pretrained_model_name_or_path": "data/tiny_llama3"}))
    half = AutoModelForCausalLM.from_pretrained(base.name, attn_implementation=register(), dtype=torch.float16).to(
        device
    )
    newer = logits(half, packed(rows(), device))
    monkeypatch.setattr(intern.attention, "has_flash_attention", lambda query: False)
    older = logits(half, packed(rows(), device))
    torch.testing.assert_close(newer, older, atol=0.05, rtol=0.05)
