"""Merging adapters of every kind: the merged weights give the logits of base and adapter."""

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from intern.errors import UserError
from intern.exporting.merge import merged_tensors, write_merged
from intern.model.base import Base
from intern.model.precision import Precision
from intern.model.quant import EightBit, FourBit

CPU = Precision("cpu", torch.float32, False, False)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 16},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
    "modules_to_save": {"modules_to_save": ["embed_tokens"]},
    "tied head saved too": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding adapter": {"target_modules": ["q_proj", "embed_tokens"]},
    "trainable tokens": {"trainable_token_indices": {"embed_tokens": [5, 6, 7]}},
}


@pytest.fixture(scope="module")
def base():
    return Base(OmegaConf.create({"pretrained_model_name_or_path": "data/tiny_llama3", "attn_implementation": "eager"}))


def with_adapter(base, quant, **lora):
    torch.manual_seed(0)
    values = {"r": 4, "target_modules": ALL, "init_lora_weights": False} | lora
    model = get_peft_model(base.load(quant, CPU), LoraConfig(task_type="CAUSAL_LM", **values)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:  # saved modules and magnitudes: as if they had been trained
            parameter.data *= 1 + 0.1 * torch.randn_like(parameter)
    return model


def reloaded(base, model, folder, original=None):
    tied = write_merged(model, base.skeleton, folder, torch.float32, original)
    config = type(base.config).from_dict(base.config.to_dict() | {"tie_word_embeddings": tied})
    config.save_pretrained(folder)
    plain, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return plain.eval()


def difference(one, other):
    ids = torch.arange(1, 60)[None]
    with torch.inference_mode():
        return float((one(ids).logits - other(ids).logits).abs().max())


def nf4():
    return FourBit(
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_give_the_logits_of_base_and_adapter(base, tmp_path, kind):
    model = with_adapter(base, nf4(), **KINDS[kind])
    merged = reloaded(base, model, tmp_path)
    assert difference(merged, model) < 1e-3
    with model.disable_adapter():
        assert difference(merged, model) > 0.1


def test_merging_leaves_the_loaded_model_as_it_is(base):
    model = with_adapter(base, nf4(), use_dora=True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    list(merged_tensors(model))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bases_in_8_bits_and_without_quantization_are_merged_too(base, tmp_path):
    for name, quant, most in (("none", None, 1e-3), ("int8", EightBit(BitsAndBytesConfig(load_in_8bit=True)), 1.0)):
        (tmp_path / name).mkdir()
        model = with_adapter(base, quant)
        assert difference(reloaded(base, model, tmp_path / name), model) < most


def test_an_adapter_that_no_plain_layer_can_hold_is_refused(base):
    model = with_adapter(base, None, target_modules=[], target_parameters=["layers.0.mlp.down_proj.weight"])
    with pytest.raises(UserError, match=r"cannot be merged: use format=adapter"):
        list(merged_tensors(model))
