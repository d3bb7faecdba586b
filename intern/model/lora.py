"""conf/lora -> peft.LoraConfig."""

import re
from dataclasses import fields, replace

import torch
from omegaconf import DictConfig
from peft import LoraConfig
from transformers import PreTrainedModel

from intern.config.build import build, plain
from intern.errors import UserError
from intern.runs.adapter import changes_base

_NEED_DATA = ("eva", "corda", "lora_ga")  # values of init_lora_weights that PEFT computes from activations or gradients


def build_lora(node: DictConfig) -> LoraConfig:
    """Return the adapter's configuration.

    Raises:
        UserError: an unknown key, a value of the wrong type, one that PEFT refuses, or one that would change the base model's weights.
    """
    defaults = {field.name: field.default for field in fields(LoraConfig)}
    # null means the default where PEFT has no null, and no tokens to train are no key.
    values = {key: value for key, value in plain(node).items() if value is not None or defaults.get(key, 0) is None}
    if not values.get("trainable_token_indices", True):
        del values["trainable_token_indices"]
    lora = build(LoraConfig, values, "lora")
    if lora.inference_mode:
        raise UserError("lora.inference_mode=true: nothing would be trained: leave it out")
    if lora.init_lora_weights in _NEED_DATA:
        raise UserError(
            f"lora.init_lora_weights={lora.init_lora_weights}: needs a pass over the data before training, which is not made here: "
            "leave it at its default"
        )
    if (change := changes_base(lora)) is not None:
        raise UserError(
            f"lora.{change}: changes the base model's own weights, which evaluations compare with and other runs share: "
            f"leave lora.{change.partition('=')[0]} at its default"
        )
    return lora


def limit_to_text(lora: LoraConfig, skeleton: PreTrainedModel) -> LoraConfig:
    """Keep adapters out of the towers of other senses, which text never reaches.

    Args:
        lora: conf/lora.
        skeleton: the model without weights.

    Returns:
        The configuration with those towers in `exclude_modules`; itself if the model has none.
    """
    decoder = skeleton.get_decoder()
    place = next((name for name, module in skeleton.named_modules() if module is decoder), "")
    head = skeleton.get_output_embeddings()
    towers = sorted(
        {
            _outside(name, place)
            for name, module in skeleton.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head and not name.startswith(f"{place}.")
        }
    )
    if not place or not towers:
        return lora
    ours = "|".join(rf"{re.escape(tower)}(\..*)?" for tower in towers)
    theirs = lora.exclude_modules
    if theirs:
        names = theirs if isinstance(theirs, str) else "|".join(rf"(.*\.)?{re.escape(name)}" for name in sorted(theirs))
        ours = f"{names}|{ours}"
    return replace(lora, exclude_modules=ours)


def _outside(name: str, place: str) -> str:
    """The outermost module around `name` that does not also hold the module at `place`."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        root = ".".join(parts[:count])
        if not f"{place}.".startswith(f"{root}."):
            return root
    return name
