"""Packed rows never see each other: the isolated attention against every row alone."""

import copy

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import intern.attention
from intern.attention import isolated_attention, register
from intern.model import Base

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
