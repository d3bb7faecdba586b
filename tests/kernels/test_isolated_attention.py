"""Packed rows never see each other: isolated attention compared with each row on its own."""

import copy
import itertools
import math

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import intern.kernels.isolated_attention
from intern.kernels import cudnn_attention, cudnn_graphs
from intern.kernels.decoder_layers import decoder_layers
from intern.kernels.isolated_attention import DISABLE_FLASH_ATTENTION, isolated_attention, register
from intern.kernels.recompute import offload_inputs
from intern.model.base import Base

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


def test_a_packed_row_has_the_logits_that_it_has_on_its_own(model, device):
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


def test_queries_and_keys_that_autocast_left_in_float32_are_cast_to_the_dtype_of_the_values():
    """In a float32 model rotary embeddings return float32 queries and keys, while the values have autocast's dtype."""
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    boundaries = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed_rows = {"cu_seq_lens_q": boundaries, "max_length_q": 3}
    out, _ = isolated_attention(torch.nn.Identity(), query, key, value.bfloat16(), None, **packed_rows)
    whole, _ = isolated_attention(torch.nn.Identity(), query, key, value, None, **packed_rows)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), whole, atol=0.05, rtol=0.05)


def test_no_mask_is_made_for_a_packed_batch(model, device, monkeypatch):
    masks = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for layer in decoder_layers(model)
    ]
    monkeypatch.setattr(intern.kernels.isolated_attention, "sdpa_mask", lambda **kwargs: pytest.fail("a mask was made"))
    try:
        logits(model, packed(rows(), device))
        assert masks == [None] * len(hooks)
        monkeypatch.undo()
        masks.clear()
        padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], device=device)
        model(input_ids=padded + 10, attention_mask=padded)
        assert len(masks) == len(hooks) and all(isinstance(mask, torch.Tensor) for mask in masks)
        # The same pack with the library's own attention: there a mask keeps the rows apart.
        masks.clear()
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("sdpa")
        logits(twin, packed(rows(), device))
        assert len(masks) == len(hooks) and all(isinstance(mask, torch.Tensor) for mask in masks)
    finally:
        for hook in hooks:
            hook.remove()


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
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(model.generate(**arguments), reference.generate(**arguments))


class _Graph:
    """Replaces one of cuDNN's kernels: the same sizes and offsets, computed row by row."""

    def __init__(self, calls, sizes, is_backward):
        self.calls, self.sizes, self.is_backward = calls, sizes, is_backward

    def run(self, given):
        self.calls.append(("backward" if self.is_backward else "forward", self.sizes.heads))
        sizes, lengths = self.sizes, given["lengths"].tolist()
        assert len(lengths) == sizes.rows and sum(lengths) == len(given["query"]) <= sizes.tokens
        assert max(lengths) <= sizes.longest
        starts = (given["query_begins"] // (sizes.heads * sizes.head_size)).tolist()
        assert (given["key_begins"] // (sizes.key_heads * sizes.head_size)).tolist() == starts
        for row, (start, size) in enumerate(zip(starts, lengths, strict=False)):
            if size:
                self._row(given, slice(start, start + size), row)

    @torch.enable_grad()
    def _row(self, given, tokens, row):
        query, key, value = (given[name][tokens].detach().requires_grad_() for name in ("query", "key", "value"))
        groups = self.sizes.heads // self.sizes.key_heads
        weights = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(groups, 1)) * self.sizes.scaling
        weights = weights.masked_fill(torch.ones(weights.shape[1:]).tril() == 0, -math.inf)
        sums = weights.logsumexp(-1).detach()
        kept = given["sums"][row, :, : len(query)] if self.sizes.is_padded else given["sums"][tokens].T
        out = torch.einsum("hqk,khd->qhd", weights.softmax(-1), value.repeat_interleave(groups, 1))
        if not self.is_backward:
            given["out"][tokens] = out.detach()
            kept.copy_(sums)
            return
        torch.testing.assert_close(kept, sums)
        torch.testing.assert_close(given["out"][tokens], out)
        found = torch.autograd.grad(out, (query, key, value), given["grad"][tokens])
        for name, gradient in zip(("grad_query", "grad_key", "grad_value"), found, strict=True):
            given[name][tokens] = gradient


@pytest.fixture
def fake_cudnn(monkeypatch):
    """Replace kernels that CPUs do not have, and return the list of their calls."""
    calls = []
    monkeypatch.setattr(cudnn_attention, "is_built", lambda sizes: True)
    monkeypatch.setattr(cudnn_attention, "forward_graph", lambda sizes: _Graph(calls, sizes, False))
    monkeypatch.setattr(cudnn_attention, "backward_graph", lambda sizes: _Graph(calls, sizes, True))
    return calls


@pytest.mark.parametrize("lengths", [[5, 1, 9, 3], [40], [3] * 30 + [60]])
@pytest.mark.parametrize("turns", [1, 2, 4])
def test_cudnn_receives_the_offsets_of_rows_and_the_heads_of_each_turn(lengths, turns, fake_cudnn, monkeypatch):
    tokens, heads, key_heads, size = sum(lengths), 8, 4, 16
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    torch.manual_seed(0)
    drawn = [torch.randn(tokens, count, size) for count in (heads, key_heads, key_heads)]
    sizes = cudnn_graphs.AttentionSizes.of(*drawn[:2], len(lengths), max(lengths), 0.3)
    monkeypatch.setattr(cudnn_graphs, "_BACKWARD_WORKSPACE_BYTES", 3 * 4 * size * sizes.tokens * heads // turns)

    def out_and_gradients(attend):
        given = [one.clone().requires_grad_() for one in drawn]
        out = attend(*given)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        return [out.detach(), *(one.grad for one in given)]

    def whole(query, key, value):
        rows = (one.transpose(0, 1)[None] for one in (query, key, value))
        query, key, value = rows
        shared = (intern.kernels.isolated_attention.repeat_kv(one, heads // key_heads) for one in (key, value))
        return intern.kernels.isolated_attention._row_by_row(query, *shared, lengths, 0.3)[0]

    found = out_and_gradients(lambda *rows: cudnn_attention.attend(*rows, boundaries, max(lengths), 0.3))
    assert fake_cudnn == [("forward", heads)] + [("backward", heads // turns)] * turns
    for mine, other in zip(found, out_and_gradients(whole), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_batches_of_similar_size_share_a_kernel():
    rounded = cudnn_graphs._rounded
    assert [rounded(count, 2) for count in (1, 2, 3, 1360, 2048, 2049)] == [1, 2, 4, 2048, 2048, 4096]
    assert [rounded(count, 8) for count in (1, 2, 8, 9, 45, 64, 65)] == [1, 8, 8, 64, 64, 64, 512]
    assert [rounded(count, 2, 8) for count in (1, 7, 16, 17, 16321, 16384)] == [1, 7, 16, 18, 16384, 16384]
    assert all(count <= rounded(count, 2, 8) <= count * 9 / 8 for count in range(1, 3000))


def test_building_cudnns_kernels_pays_in_long_runs_and_earlier_with_long_rows():
    llama = {"layers": 32, "width": 4096}
    assert not cudnn_attention.pays(400_000, 1000, **llama)
    assert cudnn_attention.pays(400_000, 40, **llama)
    assert cudnn_attention.pays(16_000_000, 40_000, **llama)
    assert not cudnn_attention.pays(16_000_000, 40_000, layers=4, width=256)


@pytest.mark.parametrize("missing", [None, "Hopper", "permission", "frontend"])
def test_cudnn_is_used_on_hopper_with_its_frontend_and_unless_it_is_disabled(missing, monkeypatch):
    monkeypatch.setattr(cudnn_graphs, "is_hopper", lambda: missing != "Hopper")
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: missing != "permission")
    monkeypatch.setattr(cudnn_graphs, "_library", lambda: None if missing == "frontend" else object())
    assert cudnn_graphs.has_cudnn_frontend() == (missing is None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    heads = torch.zeros(3, 2, 64, dtype=torch.bfloat16)
    assert cudnn_attention.is_possible(heads, heads) == (missing is None)
    assert not cudnn_attention.is_possible(heads.float(), heads.float())


def test_the_number_of_cached_kernels_is_bounded():
    """Each holds memory, and the process of a sweep trains on rows of many lengths."""
    for build in (cudnn_graphs.forward_graph, cudnn_graphs.backward_graph, cudnn_graphs.is_built):
        assert build.cache_info().maxsize == cudnn_graphs._BUILDS


@pytest.mark.parametrize(
    ("capability", "dtype", "disabled", "has_flash"),
    [
        ((8, 0), torch.bfloat16, "", True),
        ((9, 0), torch.float16, "0", True),
        ((7, 5), torch.float16, "", False),
        ((8, 0), torch.float32, "", False),
        ((9, 0), torch.float16, "1", False),
    ],
)
def test_flash_attention_needs_16_bits_and_a_newer_gpu_and_can_be_disabled(
    capability, dtype, disabled, has_flash, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv(DISABLE_FLASH_ATTENTION, disabled)
    assert intern.kernels.isolated_attention.has_flash_attention(torch.zeros(1, dtype=dtype)) == has_flash


def test_attention_is_computed_once_if_layers_keep_results(fake_cudnn, monkeypatch):
    def loss_and_gradients(keeps_results):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
        )
        twin = LlamaForCausalLM._from_config(config, attn_implementation=register()).train()
        twin.gradient_checkpointing_enable()
        offload_inputs(decoder_layers(twin), preserve_rng_state=False, keeps_results=keeps_results)
        batch = DataCollatorForLanguageModeling(pad_token_id=2, padding_free=True)(
            [{"input_ids": list(range(40)), "seq_lengths": [15, 25]}]
        )
        del batch["seq_idx"]
        loss = twin(**batch).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in twin.parameters())]

    expected = loss_and_gradients(False)
    assert not fake_cudnn  # a CPU does not use it
    monkeypatch.setattr(intern.kernels.isolated_attention, "_row_by_row", with_cudnn)
    found = loss_and_gradients(True)
    assert fake_cudnn == [("forward", 2)] * 3 + [("backward", 2)] * 3
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def with_cudnn(query, key, value, lengths, scaling):
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    flat = [one[0].transpose(0, 1) for one in (query, key, value)]
    return cudnn_attention.attend(*flat, boundaries, max(lengths), scaling)[None]


@pytest.mark.gpu
@pytest.mark.skipif(not cudnn_graphs.has_cudnn_frontend(), reason="needs a Hopper GPU and cuDNN's frontend")
@pytest.mark.parametrize("lengths", [[3000, 5000], [1, 2047, 3, 129, 500, 1, 63], [7] * 300 + [4096]])
@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cudnn_and_flash_attention_agree(lengths, turns, dtype, monkeypatch):
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = [
        torch.randn((sum(lengths), heads, 128), generator=generator, device="cuda", dtype=dtype) for heads in (8, 2, 2)
    ]
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    monkeypatch.setattr(cudnn_graphs, "_BACKWARD_WORKSPACE_BYTES", 2**40 if turns == 1 else 1)

    def out_and_gradients(attend):
        given = [one.clone().requires_grad_() for one in drawn]
        out = attend(*given)
        out.backward(torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).to(dtype))
        return [out.detach(), *(one.grad for one in given)]

    ours = out_and_gradients(lambda *rows: cudnn_attention.attend(*rows, boundaries, max(lengths), 0.09))
    flash = out_and_gradients(
        lambda *rows: intern.kernels.isolated_attention._flash(list(rows), boundaries, max(lengths), 0.09, 4)
    )
    for mine, other in zip(ours, flash, strict=True):
        assert torch.linalg.norm((mine - other).float()) < 0.01 * torch.linalg.norm(other.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: CPUs have no such kernel")
def test_the_kernel_of_older_gpus_gives_the_same_logits(device, monkeypatch):
    base = Base(OmegaConf.create({"pretrained_model_name_or_path": "data/tiny_llama3"}))
    half = AutoModelForCausalLM.from_pretrained(base.name, attn_implementation=register(), dtype=torch.float16).to(
        device
    )
    newer = logits(half, packed(rows(), device))
    monkeypatch.setenv(DISABLE_FLASH_ATTENTION, "1")
    older = logits(half, packed(rows(), device))
    torch.testing.assert_close(newer, older, atol=0.05, rtol=0.05)
