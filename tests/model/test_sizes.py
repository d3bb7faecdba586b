"""The memory that weights take is counted before they are loaded, and agrees with what is loaded."""

import json
import re

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from intern.errors import UserError
from intern.model.base import Base
from intern.model.precision import Precision
from intern.model.quant import build_quant
from intern.model.sizes import check_fit, weight_bytes

QUANTS = {
    "none": {},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 once": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
    "int8 in part": {"load_in_8bit": True, "llm_int8_skip_modules": ["o_proj", "lm_head"]},
}
SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "dense": LlamaConfig(**SHAPE),
    "tied, with biases": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "fused experts": Qwen3MoeConfig(
        **SHAPE, head_dim=64, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2, decoder_sparse_step=1
    ),
    "transposed layers": GPT2Config(vocab_size=1000, n_positions=128, n_embd=256, n_layer=2, n_head=4),
}
LLAMA3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def base_of(folder, config):
    """A base that consists of its configuration alone."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return Base(OmegaConf.create({"pretrained_model_name_or_path": str(folder)}))


def held(model):
    """The bytes of all tensors of a model, each storage once, with the state of quantized weights."""
    tensors = []
    for tensor in [*model.parameters(), *model.buffers()]:
        states = [tensor, getattr(tensor, "quant_state", None), getattr(tensor, "SCB", None)]
        states += [getattr(states[1], "state2", None), getattr(states[1], "offset", None)]
        for state in states:
            tensors += [state] if isinstance(state, torch.Tensor) else [getattr(state, "absmax", None)]
            tensors += [] if isinstance(state, torch.Tensor) else [getattr(state, "code", None)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quant", QUANTS)
def test_the_estimate_is_what_the_loaded_model_holds(family, quant, tmp_path):
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    base = Base(OmegaConf.create({"pretrained_model_name_or_path": str(tmp_path)}))
    chosen = build_quant(OmegaConf.create(QUANTS[quant]))
    loaded = base.load(chosen, Precision("cpu", torch.bfloat16, False, False))
    assert weight_bytes(base, chosen, torch.bfloat16) == pytest.approx(held(loaded), rel=0.02)


@pytest.mark.parametrize(
    ("config", "quant", "gib"),
    [(LLAMA3_8B, "nf4", 5.3), (LLAMA3_8B, "int8", 8.5), (LLAMA3_8B, "none", 15.0), (QWEN3_30B_A3B, "nf4", 55.6)],
)
def test_large_models_take_what_they_are_known_to_take(config, quant, gib, tmp_path):
    base, chosen = base_of(tmp_path, config), build_quant(OmegaConf.create(QUANTS[quant]))
    assert weight_bytes(base, chosen, torch.float16) / 2**30 == pytest.approx(gib, rel=0.02)


def test_the_estimate_leaves_the_skeleton_as_it_was(tmp_path):
    base = base_of(tmp_path, LLAMA3_8B)
    before = weight_bytes(base, None, torch.float16)
    weight_bytes(base, build_quant(OmegaConf.create(QUANTS["nf4"])), torch.float16)
    assert weight_bytes(base, None, torch.float16) == before


def test_a_published_quantization_counts_in_place_of_the_chosen_one(tmp_path):
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    published = base_of(tmp_path / "nf4", LLAMA3_8B | {"quantization_config": stored})
    plain = base_of(tmp_path / "plain", LLAMA3_8B)
    nf4 = build_quant(OmegaConf.create(QUANTS["nf4"]))
    assert weight_bytes(published, None, torch.float16) == weight_bytes(plain, nf4, torch.float16)
    unknown = base_of(tmp_path / "gptq", LLAMA3_8B | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert weight_bytes(unknown, None, torch.float16) is None


@pytest.mark.parametrize(
    ("quant", "free", "message"),
    [
        ("nf4", 4, "needs 5.[0-9] GiB for its weights, 4.0 GiB of GPU memory are free: choose a smaller"),
        ("int8", 4, "needs 8.[0-9] GiB for its weights, 4.0 GiB of GPU memory are free: use quant=nf4_fp16"),
        ("none", 12, "needs 15.0 GiB .*: use quant=nf4_fp16"),
        ("nf4", 16, None),
        ("int8", 14.5, None),  # a T4
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, monkeypatch, quant, free, message):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr("intern.model.sizes._process_cap", lambda: 80 * 2**30)
    chosen = build_quant(OmegaConf.create(QUANTS[quant]))
    try:
        check_fit(base_of(tmp_path, LLAMA3_8B), chosen, Precision("cuda", torch.float16, True, False))
        said = None
    except UserError as error:
        said = str(error)
    assert (said is None) if message is None else re.search(message, said or "")
