"""Adapters sit where text goes."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import FAMILIES
from transformers import AutoModelForCausalLM

from intern.model.lora import limit_to_text


def adapted(name, **lora):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[name]())
        config = limit_to_text(LoraConfig(task_type="CAUSAL_LM", r=4, **lora), model)
        return config, get_peft_model(model, config).targeted_module_names


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_of_a_vision_model_sit_in_its_text_tower_alone(targets):
    config, names = adapted("gemma3_vision", target_modules=targets)
    assert names and all(name.startswith("model.language_model.") for name in names)
    assert re.fullmatch(config.exclude_modules, "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj")


def test_what_the_user_excludes_stays_excluded():
    _, names = adapted("gemma3_vision", target_modules="all-linear", exclude_modules=["down_proj"])
    assert names and not any("down_proj" in name or "vision" in name for name in names)


def test_a_model_of_text_keeps_its_configuration():
    assert adapted("llama", target_modules="all-linear")[0].exclude_modules is None
    assert adapted("gpt2", target_modules=["c_attn"])[0].exclude_modules is None
