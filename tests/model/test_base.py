"""The base model as it is loaded: quantized, in the compute dtype, and with correct gradients after an evaluation."""

import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from helpers import ROOT
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from intern.errors import UserError
from intern.model.base import Base
from intern.model.precision import Precision
from intern.model.quant import build_quant

TINY = {"pretrained_model_name_or_path": "data/tiny_llama3", "attn_implementation": "isolated"}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}


def load(dtype=torch.float32, **base):
    quant = build_quant(OmegaConf.create(NF4))
    return Base(OmegaConf.create(TINY | base)).load(quant, Precision("cpu", dtype, False, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_layer_is_nf4_and_computes_in_the_planned_dtype(dtype):
    model = load(dtype)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name: module for name, module in linear.items() if isinstance(module, bnb.nn.Linear4bit)}
    assert set(linear) - set(quantized) == {"lm_head"}
    assert len(quantized) == 7 * model.config.num_hidden_layers
    for module in quantized.values():
        assert (module.weight.quant_type, module.weight.quant_state.nested) == ("nf4", True)
        assert (module.compute_dtype, module.weight.quant_state.dtype) == (dtype, dtype)
    assert model.get_input_embeddings().weight.dtype == dtype


def test_a_base_that_is_published_quantized_computes_in_the_dtype_of_this_machine_too(tmp_path):
    quant = build_quant(OmegaConf.create(NF4 | {"bnb_4bit_compute_dtype": "float16"}))
    published = AutoModelForCausalLM.from_pretrained(
        Base(OmegaConf.create(TINY)).name, quantization_config=quant.config, dtype=torch.float16
    )
    published.save_pretrained(tmp_path)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).model.layers[0].mlp.up_proj
    assert stored.weight.quant_state.dtype == torch.float16  # what loading alone would leave
    layer = load(pretrained_model_name_or_path=str(tmp_path)).model.layers[0].mlp.up_proj
    assert (layer.compute_dtype, layer.weight.quant_state.dtype) == (torch.float32, torch.float32)
    assert layer.support_avx512bf16_for_cpu is False


def test_an_evaluation_does_not_change_the_gradients_after_it():
    """On CPUs with AVX512-BF16, bitsandbytes would repack the weights in place in the first evaluation."""
    model = load()
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    ids = torch.arange(10, 60).view(1, -1)

    def gradient():
        embeddings.grad = None
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return embeddings.grad.clone()

    before = gradient()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    assert torch.equal(gradient(), before)


def test_weights_are_counted_without_loading_them():
    base = Base(OmegaConf.create(TINY))
    assert base.parameters() == sum(
        parameter.numel() for parameter in base.load(None, Precision("cpu", torch.float32, False, False)).parameters()
    )


def test_a_padding_token_is_never_the_end_of_a_turn():
    tokenizer = Base(OmegaConf.create(TINY)).tokenizer()
    assert tokenizer.pad_token not in (tokenizer.eos_token, "<|eot_id|>", tokenizer.bos_token)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "nowhere", "a/b/c"])
def test_a_folder_that_does_not_exist_is_named(name):
    with pytest.raises(UserError, match="no such folder"):
        Base(OmegaConf.create(TINY | {"pretrained_model_name_or_path": name}))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        Base(OmegaConf.create(TINY | {"pretrained_model_name_or_path": str(tmp_path)}))


def test_an_unknown_key_is_named():
    with pytest.raises(
        UserError, match=r"model.attn_implementatio: unknown key; did you mean model.attn_implementation\?"
    ):
        Base(OmegaConf.create(TINY | {"attn_implementatio": "sdpa"}))


def _truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _other_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] * 2}))


def _missing_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _more_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))


@pytest.mark.parametrize(
    "damage",
    [
        _truncated,
        _other_sizes,
        _more_layers,
        _missing_shard,
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
    ],
    ids=[
        "truncated",
        "other sizes",
        "more layers",
        "missing shard",
        "empty",
        "git-lfs pointer",
        "no weights",
        "broken config",
    ],
)
def test_a_damaged_base_is_one_line_that_names_its_folder(damage, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(ROOT / "data" / "tiny_llama3", folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        load(pretrained_model_name_or_path=str(folder), quantized_cache=None)
    assert str(caught.value).startswith(f"model.pretrained_model_name_or_path={folder}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, caught.value


def test_an_unquantized_base_of_other_shapes_is_one_line_too(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(ROOT / "data" / "tiny_llama3", folder)
    _other_sizes(folder)
    base = Base(OmegaConf.create(TINY | {"pretrained_model_name_or_path": str(folder)}))
    with pytest.raises(UserError, match="its weights have other shapes than its config.json implies"):
        base.load(None, Precision("cpu", torch.float32, False, False))
