"""Adapters of every form that training can write are loaded as PEFT saved them; hostile ones are in test_untrusted.py."""

import dataclasses
import shutil
import time

import pytest
import torch
from helpers import ROOT
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from intern.errors import UserError
from intern.inference.answer import Intern
from intern.model.lora import build_lora
from intern.runs.adapter import changes_base, check_adapter, check_tensors
from intern.runs.directory import Run

TARGETS = ["q_proj", "v_proj"]
ADAPTERS = {
    "two targets, each with a rank of its own": {"r": 16, "target_modules": TARGETS, "rank_pattern": {"q_proj": 4, "v_proj": 8}},
    "a rank of its own that is larger": {"r": 2, "target_modules": TARGETS, "rank_pattern": {"v_proj": 32}},
    "a regular expression": {"target_modules": r".*\.(q|v)_proj"},
    "a repeated group": {"target_modules": r"(?:\w+\.)*layers\.(?:[02])\.(?:\w+\.)+(?:gate|up)_proj"},
    "counted repetition": {"target_modules": r"(\w{1,9}\.){2,3}\d\.self_attn\.[kq]_proj"},
    "an expression of excluded modules": {"target_modules": TARGETS, "exclude_modules": r".*layers\.1\..*"},
    "both": {"target_modules": r".*_proj", "exclude_modules": r"model\.layers\.(0|1)(\..*)?|.*mlp.*"},
    "expressions of ranks and scales": {
        "target_modules": TARGETS,
        "rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 3, "q_proj": 5},
        "alpha_pattern": {r".*layers\.3.*": 7, r"^model\.layers\.0\.self_attn\.v_proj": 9},
    },
    "some layers": {"target_modules": TARGETS, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "every linear layer": {"target_modules": "all-linear"},
    "DoRA": {"target_modules": TARGETS, "use_dora": True},
    "rank-stabilized": {"target_modules": TARGETS, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "biases of its own": {"target_modules": TARGETS, "lora_bias": True},
    "a norm trained as a whole": {"target_modules": TARGETS, "modules_to_save": ["norm"]},
    "trained tokens": {"target_modules": TARGETS, "trainable_token_indices": [5, 6]},
    "another initialization": {"target_modules": TARGETS, "init_lora_weights": "gaussian"},
}  # fmt: skip


def saved(run, **lora):
    """Replaces the run's adapter by one of this configuration with random weights; returns PEFT's model."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny_llama3")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point() and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(run.adapter))
    (run.adapter / "README.md").unlink(missing_ok=True)
    return model


def scales(model):
    return {name: layer.scaling["default"] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


@pytest.fixture
def run(trained_run, tmp_path):
    copy = Run(tmp_path / "run")
    shutil.copytree(trained_run, copy.path, ignore=shutil.ignore_patterns("wandb", "checkpoints", ".hydra"))
    return copy


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_loaded_as_it_was_saved(name, run):
    model = saved(run, **ADAPTERS[name])
    intern = Intern(run, {"max_new_tokens": 2, "do_sample": False})
    before = get_peft_model_state_dict(model, save_embedding_layers=False)
    after = get_peft_model_state_dict(intern.model, save_embedding_layers=False)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].float(), after[key].float()) for key in before)
    assert scales(model) == scales(intern.model)


def test_a_slow_pattern_is_given_up_after_some_seconds(run, monkeypatch):
    saved(run, target_modules=TARGETS)
    lora = check_adapter(run.adapter, run.path)
    skeleton = AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny_llama3")
    slow = dataclasses.replace(lora, target_modules=r"(?:.|..)+[xq]_prox?j[0-9]")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"adapter_config.json: the pattern .* takes too long to match"):
        check_tensors(slow, skeleton, run.adapter)
    assert time.monotonic() - start < 10


def test_the_check_leaves_the_model_as_it_was(run):
    saved(run, target_modules=TARGETS)
    skeleton = AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny_llama3")
    before = [name for name, _ in skeleton.named_modules()]
    check_tensors(check_adapter(run.adapter, run.path), skeleton, run.adapter)
    assert [name for name, _ in skeleton.named_modules()] == before


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_these_initializations_leave_the_base_alone(init):
    base = AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny_llama3")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, init_lora_weights=init)
    model = get_peft_model(base, lora)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    assert changes_base(lora) is None and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "lora", [{"init_lora_weights": "olora"}, {"init_lora_weights": "pissa"}, {"bias": "lora_only"}]
)
def test_training_refuses_an_adapter_that_changes_the_base(lora):
    [(key, value)] = lora.items()
    with pytest.raises(UserError, match=f"lora.{key}={value}: changes the base model's own weights.*leave lora.{key}"):
        build_lora(OmegaConf.create({"target_modules": TARGETS} | lora))
