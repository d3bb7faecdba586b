"""The rules that a training configuration and its base model must keep together, one small function each.

They look at the model's configuration and at its modules on the meta device, so no weights are needed. A rule returns the message for the
user, or None; the first line of its docstring is the rule.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import regex
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from intern.errors import UserError
from intern.kernels.isolated_attention import NAME as ISOLATED
from intern.model.attention import Attention
from intern.runs.patterns import matching, without_patterns
from intern.training.rules import Groups


@dataclass(frozen=True)
class Shape:
    """A base model without weights: its configuration, its modules on the meta device, its tokenizer."""

    config: PreTrainedConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


# --- The values and the model ---


def rows_fit_into_the_models_positions(cfg: Groups, shape: Shape) -> str | None:
    """No row is longer than the model's positions, beyond which it computes nonsense or fails on the GPU."""
    length = cfg["trainer"]["max_length"]
    positions = getattr(shape.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and int(length) > positions:
        return f"trainer.max_length={length}: the model has {positions:,} positions: lower it to {positions}"
    return None


def the_tokenizer_fits_the_model(cfg: Groups, shape: Shape) -> str | None:
    """Every token has an embedding: one without stops a GPU with an error that names nothing."""
    most = max(shape.tokenizer.get_vocab().values())
    rows = cast(nn.Embedding, shape.model.get_input_embeddings()).num_embeddings
    if most >= rows:
        return (
            f"model.pretrained_model_name_or_path: its tokenizer has token ids up to {most}, but the model has only {rows} embeddings: "
            "use the tokenizer that belongs to the model"
        )
    return None


# --- The adapter and the model ---


def target_modules_are_in_the_model(shape: Shape, lora: LoraConfig) -> str | None:
    """Every name in target_modules is a linear layer's: PEFT accepts one match and silently trains less than requested."""
    wanted = lora.target_modules
    if wanted == "all-linear":
        return None
    if wanted is None:
        kind = str(shape.config.model_type)
        known = kind in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        return None if known else f"lora.target_modules: PEFT has no default for {kind}: use lora=all_linear"
    if not wanted and not lora.target_parameters:
        return "lora.target_modules=[]: nothing would be trained: name linear layers, or all-linear"
    modules = dict(shape.model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Embedding | Conv1D)}
    ends = sorted({path.rsplit(".", 1)[-1] for path in linear})
    if isinstance(wanted, str):
        try:
            matched = matching(wanted, list(modules))
        except TimeoutError:
            return f"lora.target_modules={wanted[:80]}: takes too long to match: name the modules in a list, such as [q_proj,v_proj]"
        except regex.error as error:
            return f"lora.target_modules={wanted}: not a valid regular expression ({error}); write a single name as [{wanted}]"
        if not linear.intersection(matched):
            longest = max(sorted(linear), key=len)
            return f"lora.target_modules={wanted}: matches no linear layer; their names look like {longest}"
        return None
    for name in sorted(wanted):
        found = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not found:
            near = difflib.get_close_matches(name, ends, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its linear layers are {', '.join(ends)}"
            return f"lora.target_modules: the model has no {name}; {hint}"
        if not linear.intersection(found):
            kind = type(modules[found[0]]).__name__
            return (
                f"lora.target_modules: {name} is a {kind}, not a linear layer; the linear layers are {', '.join(ends)}"
            )
    return None


def something_is_left_to_train(shape: Shape, lora: LoraConfig) -> str | None:
    """exclude_modules and layers_to_transform leave something of target_modules."""
    if not (lora.exclude_modules or lora.layers_to_transform) or lora.target_modules in (None, "all-linear"):
        return None
    names = [name for name, _ in shape.model.named_modules()]
    lora = without_patterns(lora, names, Path("lora"))
    if not any(check_target_module_exists(lora, name) for name in names):
        return "lora.target_modules: lora.exclude_modules and lora.layers_to_transform leave nothing of it to train"
    return None


def modules_to_save_are_in_the_model(shape: Shape, lora: LoraConfig) -> str | None:
    """Every name in modules_to_save is a module's: PEFT ignores the others."""
    names = [name for name, _ in shape.model.named_modules()]
    for wanted in sorted(lora.modules_to_save or ()):
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            near = difflib.get_close_matches(wanted, sorted({name.rpartition(".")[2] for name in names}), n=1)
            return f"lora.modules_to_save: the model has no {wanted}" + (f"; did you mean {near[0]}?" if near else "")
    return None


def every_pattern_matches_a_target(shape: Shape, lora: LoraConfig) -> str | None:
    """Every name in rank_pattern, alpha_pattern and exclude_modules is one of the model's: PEFT only ignores the others."""
    names = [name for name, _ in shape.model.named_modules()] + [name for name, _ in shape.model.named_parameters()]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, key) or {}:
            if not matching(rf"(.*\.)?({pattern})", names):
                return f"lora.{key}: the model has no {pattern}"
    wanted = lora.exclude_modules
    for name in sorted(wanted) if isinstance(wanted, list | set) else ():
        if not any(path == name or path.endswith(f".{name}") for path in names):
            return f"lora.exclude_modules: the model has no {name}"
    return None


def the_rank_is_no_larger_than_the_model(shape: Shape, lora: LoraConfig) -> str | None:
    """The rank is at most the model's hidden size: a higher one adds memory and no capacity."""
    width = shape.config.get_text_config().hidden_size
    return None if lora.r <= width else f"lora.r={lora.r}: must be at most {width}, the model's hidden size"


OF_MODEL: tuple[Callable[[Groups, Shape], str | None], ...] = (
    rows_fit_into_the_models_positions,
    the_tokenizer_fits_the_model,
)
OF_ADAPTER: tuple[Callable[[Shape, LoraConfig], str | None], ...] = (
    target_modules_are_in_the_model,
    something_is_left_to_train,
    modules_to_save_are_in_the_model,
    every_pattern_matches_a_target,
    the_rank_is_no_larger_than_the_model,
)


def check_model_rules(cfg: Groups, shape: Shape) -> None:
    """Raise UserError for the first rule that the values break with this model."""
    for rule in OF_MODEL:
        if (complaint := rule(cfg, shape)) is not None:
            raise UserError(complaint)


def check_adapter_rules(shape: Shape, lora: LoraConfig) -> None:
    """Raise UserError for the first rule that the adapter breaks with this model."""
    for rule in OF_ADAPTER:
        if (complaint := rule(shape, lora)) is not None:
            raise UserError(complaint)


def batches_need_no_padding(cfg: Groups, attention: Callable[[], Attention]) -> bool:
    """Return whether the rows of an unpacked batch can be concatenated: the kernels that keep packed rows apart keep them apart too.

    Args:
        cfg: the groups as built-in types.
        attention: returns how the model attends; called only if the values leave the answer open.
    """
    trainer = cfg["trainer"]
    several = not trainer.get("packing") and trainer.get("per_device_train_batch_size", 8) > 1
    if not several or cfg["model"].get("attn_implementation") != ISOLATED:
        return False
    chosen = attention()
    return chosen.packs and chosen.name == ISOLATED
