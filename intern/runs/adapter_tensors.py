"""An adapter's configuration and a base model without weights -> the model with the adapter, and the tensors that PEFT saves of it."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intern.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

LARGEST = 65_504.0  # of float16; trained weights and scales are below 100


def wrapped_by(module: Any) -> str:
    """The key of conf/lora that has put an adapter around a module."""
    keys = {
        "TrainableTokensWrapper": "trainable_token_indices",
        "ModulesToSaveWrapper": "modules_to_save",
    }  # PEFT's classes
    return keys.get(type(module).__name__, "target_modules")


def with_adapter(lora: "LoraConfig", skeleton: "PreTrainedModel", file: Path) -> Any:
    """Return a copy of the base model without weights, with the adapter that its configuration describes."""
    import copy

    import torch
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    try:
        with torch.device("meta"):
            model = get_peft_model(copy.deepcopy(skeleton), dataclasses.replace(lora, init_lora_weights=False))
    except Exception as error:  # PEFT raises errors of many kinds for what it cannot build
        raise UserError(f"{file}: does not fit the base model: {' '.join(str(error).split())[:200]}") from error
    for name, layer in model.named_modules():
        for scale in layer.scaling.values() if isinstance(layer, LoraLayer) else ():
            if not (isinstance(scale, int | float) and abs(scale) <= LARGEST):
                raise UserError(f"{file}: the scale of {name}, lora_alpha / r, is {scale:g}: refused")
    return model


def implied_tensors(lora: "LoraConfig", skeleton: "PreTrainedModel", file: Path) -> dict[str, list[int]]:
    """Return the names and shapes of the tensors that PEFT saves for this configuration."""
    from peft import get_peft_model_state_dict

    model = with_adapter(lora, skeleton, file)
    try:
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    except Exception as error:  # as above
        raise UserError(f"{file}: does not fit the base model: {' '.join(str(error).split())[:200]}") from error
    return {name: list(tensor.shape) for name, tensor in state.items()}
