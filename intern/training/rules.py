"""The rules that a training configuration must keep, one small function each: all are checked before a model's weights load.

Names and types of a library's keys are checked against its class (intern/config/build.py), precision against the card (intern/model/precision.py),
rows against their form (intern/data/files.py). Here stands what no library says in time, or at all. A rule returns what to tell the user, or
None; its docstring's first line is the rule.
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import yaml
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from intern.config.build import check_names
from intern.errors import UserError
from intern.evaluation.metrics import training_metrics
from intern.kernels.isolated_attention import NAME as ISOLATED
from intern.model.attention import choose_attention
from intern.paths import CONF_DIR

Groups = Mapping[str, Any]  # {"lora": {"r": 16, ...}, ..., "seed": 42}

# Key -> the numbers it takes, and what one outside of them would do. -1, null and absent keys have rules of their own.
RANGES: dict[str, tuple[str, str]] = {
    "seed": ("[0, 4294967295]", "random generators take no other"),
    "lora.r": ("[1, inf)", "rank 0 trains nothing"),
    "lora.lora_alpha": ("(0, inf)", "the update is scaled by lora_alpha / r, so nothing would be trained"),
    "lora.lora_dropout": ("[0, 1)", "it is the share of inputs that is dropped"),
    "trainer.num_train_epochs": ("(0, inf)", "trainer.max_steps can be given instead"),
    "trainer.min_steps": ("[0, inf)", "0 asks for no least number of steps"),
    "trainer.max_skipped_steps": ("[0, inf)", "it is a number of steps"),
    "trainer.eval_answers": ("[0, inf)", "0 answers none during training"),
    "trainer.early_stopping_patience": ("[1, inf)", "null switches early stopping off"),
    "trainer.per_device_train_batch_size": ("[1, inf)", "it is a number of rows"),
    "trainer.per_device_eval_batch_size": ("[1, inf)", "it is a number of rows"),
    "trainer.gradient_accumulation_steps": ("[1, inf)", "1 accumulates nothing"),
    "trainer.max_length": ("[1, inf)", "it is a number of tokens"),
    "trainer.learning_rate": ("[0, inf)", "2e-4 is usual"),
    "trainer.weight_decay": ("[0, inf)", "0 switches it off"),
    "trainer.max_grad_norm": ("[0, inf)", "0 switches clipping off"),
    "trainer.warmup_steps": ("[0, inf)", "0 begins with the full learning rate"),
    "trainer.warmup_ratio": ("[0, 1)", "it is a share of the steps"),
    "trainer.adam_beta1": ("[0, 1)", "0.9 is usual"),
    "trainer.adam_beta2": ("[0, 1)", "0.999 is usual"),
    "trainer.adam_epsilon": ("(0, inf)", "1e-8 is usual"),
    "trainer.logging_steps": ("(0, inf)", "it is a number of steps, or below 1 a share of all"),
    "trainer.eval_steps": ("(0, inf)", "it is a number of steps, or below 1 a share of all"),
    "trainer.save_steps": ("(0, inf)", "it is a number of steps, or below 1 a share of all"),
    "trainer.save_total_limit": ("[1, inf)", "a run that keeps no checkpoint cannot go on after a stop"),
    "trainer.label_smoothing_factor": ("[0, 1)", "0 switches it off"),
    "trainer.neftune_noise_alpha": ("[0, inf)", "0 switches it off"),
    "trainer.dataloader_num_workers": ("[0, inf)", "0 reads rows in the training process"),
    "model.quantized_cache_gib": ("(0, inf)", "model.quantized_cache=null keeps none"),
    "data.num_proc": ("[1, inf)", "null chooses by the number of rows"),
    "logger.sample_answers": ("[0, inf)", "0 logs none"),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "quant.bnb_4bit_quant_type": ("nf4", "fp4"),
    "quant.bnb_4bit_compute_dtype": ("float16", "bfloat16", "float32"),
    "trainer.optim": tuple(kind.value for kind in OptimizerNames),
    "trainer.lr_scheduler_type": tuple(kind.value for kind in SchedulerType),
    "trainer.eval_strategy": tuple(kind.value for kind in IntervalStrategy),
    "trainer.save_strategy": tuple(kind.value for kind in SaveStrategy),
}
_RECURRENT = (
    "linear_attention",
    "mamba",
    "mamba2",
    "conv",
    "recurrent",
    "rwkv",
)  # layer types that carry state along a row
_GROUPS = ("model", "quant", "lora", "trainer", "data", "logger")


@dataclass(frozen=True)
class Shape:
    """A base model without weights: its configuration, its modules on the meta device, its tokenizer."""

    config: PreTrainedConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


# --- Rules of the values alone ---


def every_group_is_a_group(cfg: Groups) -> str | None:
    """A group holds keys; text or a number in its place is a slip on the command line."""
    for name in _GROUPS:
        if not isinstance(cfg.get(name) or {}, Mapping):
            return f"{name}={cfg[name]}: must be one of the options in conf/{name}/"
    return None


def every_number_is_finite(cfg: Groups) -> str | None:
    """No key is .nan or .inf: comparisons with them let anything pass."""
    for key, value in _values(cfg):
        if isinstance(value, float) and not math.isfinite(value):
            return f"{key}={value}: must be a finite number"
    return None


def numbers_are_in_range(cfg: Groups) -> str | None:
    """Each key of RANGES lies in its range; a wrong type is left to the library's class."""
    for key, value in _values(cfg):
        if key not in RANGES or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        interval, reason = RANGES[key]
        low, high = (float(end) for end in interval[1:-1].split(","))
        if (
            value < low
            or value > high
            or (value == low and interval[0] == "(")
            or (value == high and interval[-1] == ")")
        ):
            return f"{key}={value}: must be {_words(interval)}; {reason}"
    return None


def the_seed_is_a_whole_number(cfg: Groups) -> str | None:
    """seed belongs to no library's class, so its type is checked here."""
    seed = cfg.get("seed")
    return None if isinstance(seed, int) and not isinstance(seed, bool) else f"seed={seed}: must be a whole number"


def max_steps_is_a_number_of_steps_or_minus_one(cfg: Groups) -> str | None:
    """0 would silently fall back to epochs."""
    most = cfg["trainer"].get("max_steps", -1)
    if isinstance(most, int) and most < 1 and most != -1:
        return f"trainer.max_steps={most}: must be at least 1, or -1 to let trainer.num_train_epochs decide"
    return None


def max_steps_leave_room_for_min_steps(cfg: Groups) -> str | None:
    """max_steps below min_steps asks for two lengths at once."""
    most, least = cfg["trainer"].get("max_steps", -1), cfg["trainer"].get("min_steps", 0)
    if isinstance(most, int) and isinstance(least, int) and 0 < most < least:
        return f"trainer.max_steps={most} is below trainer.min_steps={least}: raise it, or set trainer.min_steps={most} too"
    return None


def early_stopping_has_something_to_watch(cfg: Groups) -> str | None:
    """Early stopping compares evaluations and takes the best checkpoint."""
    trainer = cfg["trainer"]
    if trainer.get("early_stopping_patience") is not None and not trainer.get("load_best_model_at_end"):
        return (
            "trainer.early_stopping_patience needs trainer.load_best_model_at_end=true and trainer.eval_strategy=steps"
        )
    return None


def the_best_model_has_been_evaluated(cfg: Groups) -> str | None:
    """The best checkpoint is one that was evaluated: evaluations and checkpoints come together."""
    trainer = cfg["trainer"]
    evaluates, saves = str(trainer.get("eval_strategy", "no")), str(trainer.get("save_strategy", "steps"))
    if trainer.get("load_best_model_at_end") and evaluates != saves and saves != "best":
        return f"trainer.load_best_model_at_end=true needs trainer.eval_strategy={saves}, as often as checkpoints are written"
    return None


def named_choices_exist(cfg: Groups) -> str | None:
    """Optimizers, schedules and strategies are known by name."""
    for key, choices in CHOICES.items():
        group, _, name = key.partition(".")
        value = cfg[group].get(name)
        if value is not None and str(value) not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            return f"{key}={value}: " + (f"did you mean {near[0]}?" if near else f"must be one of {', '.join(choices)}")
    return None


def the_best_model_is_chosen_by_what_is_measured(cfg: Groups) -> str | None:
    """Evaluations during training have the loss and scores of answers; with any other metric the library would fail at the first of them."""
    trainer = cfg["trainer"]
    metric = trainer.get("metric_for_best_model")
    of_answers = training_metrics()
    key = f"eval_{str(metric).removeprefix('eval_')}"
    if metric is not None and key not in ("eval_loss", *of_answers):
        known = ", ".join(["eval_loss", *of_answers])
        return (
            f"trainer.metric_for_best_model={metric}: must be one of {known}, which evaluations during training measure"
        )
    if key in of_answers and not trainer.get("eval_answers"):
        return f"trainer.metric_for_best_model={metric} needs trainer.eval_answers: golden rows to answer at each evaluation, such as 32"
    return None


def answers_come_with_evaluations(cfg: Groups) -> str | None:
    """Golden rows are answered where they are evaluated during training, not elsewhere."""
    trainer = cfg["trainer"]
    if trainer.get("eval_answers") and str(trainer.get("eval_strategy", "no")) == "no":
        return f"trainer.eval_answers={trainer['eval_answers']} needs trainer.eval_strategy=steps"
    return None


def checkpoints_are_written(cfg: Groups) -> str | None:
    """A run without checkpoints is lost at the first stop."""
    if str(cfg["trainer"].get("save_strategy", "steps")) in ("no", "False"):
        return "trainer.save_strategy=no: a stopped run could not go on; keep steps and raise trainer.save_steps"
    return None


def packed_rows_stay_whole(cfg: Groups) -> str | None:
    """The packing strategy "wrapped" cuts rows in two and lets neighbours see each other."""
    trainer = cfg["trainer"]
    if trainer.get("packing") and trainer.get("packing_strategy", "bfd") == "wrapped":
        return "trainer.packing_strategy=wrapped: cuts rows in two and mixes neighbours; take bfd"
    if trainer.get("padding_free") and not trainer.get("packing"):
        return "trainer.padding_free=true works with trainer.packing=true alone, which implies it: leave it out"
    return None


def the_adapter_is_for_a_causal_language_model(cfg: Groups) -> str | None:
    """Other task types wrap the model in heads that answers do not come from."""
    task = cfg["lora"].get("task_type")
    return None if task == "CAUSAL_LM" else f"lora.task_type={task}: must be CAUSAL_LM"


def the_adapter_names_no_code(cfg: Groups) -> str | None:
    """PEFT's megatron keys import a module by its name."""
    for key in ("megatron_config", "auto_mapping"):
        if cfg["lora"].get(key):
            return f"lora.{key}: not supported: leave it out"
    return None


def automatic_keys_are_true_false_or_auto(cfg: Groups) -> str | None:
    """activation_checkpointing and use_liger_kernel are a library's switches with one more position."""
    for key in ("activation_checkpointing", "use_liger_kernel"):
        value = cfg["trainer"].get(key, "auto")
        if not isinstance(value, bool) and value != "auto":
            return f"trainer.{key}={value}: must be auto, true or false"
    return None


# --- Rules of the values and the model's shape ---


def rows_fit_into_the_models_positions(cfg: Groups, shape: Shape, lora: LoraConfig) -> str | None:
    """Beyond its positions a model computes nonsense, or fails on the GPU."""
    length, positions = (
        cfg["trainer"]["max_length"],
        getattr(shape.config.get_text_config(), "max_position_embeddings", None),
    )
    if positions is not None and int(length) > positions:
        return f"trainer.max_length={length}: the model has {positions} positions"
    return None


def the_tokenizer_fits_the_model(cfg: Groups, shape: Shape, lora: LoraConfig) -> str | None:
    """A token without an embedding stops a GPU with an error that names nothing."""
    most = max(shape.tokenizer.get_vocab().values())
    rows = cast(nn.Embedding, shape.model.get_input_embeddings()).num_embeddings
    if most >= rows:
        return f"model.pretrained_model_name_or_path: its tokenizer knows token {most}, the model embeds {rows}: they do not belong together"
    return None


def target_modules_are_in_the_model(cfg: Groups, shape: Shape, lora: LoraConfig) -> str | None:
    """Every name in target_modules is a linear layer's: PEFT is content when one of them is, and trains less than was asked for."""
    wanted = lora.target_modules
    if wanted == "all-linear":
        return None
    if wanted is None:
        kind = str(shape.config.model_type)
        known = kind in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        return None if known else f"lora.target_modules: there is no default for {kind}: take lora=all_linear"
    modules = dict(shape.model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Embedding | Conv1D)}
    if isinstance(wanted, str):
        try:
            matched = [name for name in modules if re.fullmatch(wanted, name)]
        except re.error as error:
            return f"lora.target_modules={wanted}: no regular expression ({error}); a single name is written [{wanted}]"
        if not linear.intersection(matched):
            return f"lora.target_modules={wanted}: matches no linear layer; their names are such as {max(sorted(linear), key=len)}"
        return None
    for name in sorted(wanted):
        found = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not found:
            ends = sorted({path.rsplit(".", 1)[-1] for path in linear})
            near = difflib.get_close_matches(name, ends, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(ends)}"
            return f"lora.target_modules: the model has no {name}; {hint}"
        if not linear.intersection(found):
            return f"lora.target_modules: {name} is a {type(modules[found[0]]).__name__}, not a linear layer"
    return None


def something_is_left_to_train(cfg: Groups, shape: Shape, lora: LoraConfig) -> str | None:
    """exclude_modules and layers_to_transform may take away all that target_modules names."""
    if not (lora.exclude_modules or lora.layers_to_transform) or lora.target_modules in (None, "all-linear"):
        return None
    if not any(check_target_module_exists(lora, name) for name, _ in shape.model.named_modules()):
        return "lora.target_modules: nothing is left of it after lora.exclude_modules and lora.layers_to_transform"
    return None


def the_rank_is_no_larger_than_the_model(cfg: Groups, shape: Shape, lora: LoraConfig) -> str | None:
    """A rank above the model's width adds memory and no capacity."""
    width = shape.config.get_text_config().hidden_size
    return None if lora.r <= width else f"lora.r={lora.r}: must be at most {width}, the model's width"


def packed_rows_can_be_kept_apart(cfg: Groups, shape: Shape, lora: LoraConfig) -> str | None:
    """Rows in one batch are told apart by their positions; a model that ignores those, or carries state along, mixes them.

    With "isolated" the kernels get the rows' boundaries; sdpa, eager and flex get a mask that transformers makes from the positions.
    """
    return _why_rows_mix(cfg, shape) if cfg["trainer"].get("packing") else None


def batches_need_no_padding(cfg: Groups, shape: Callable[[], Shape]) -> bool:
    """Whether the rows of an unpacked batch can lie one behind the other: by the kernels that keep packed rows apart.

    The model's shape is asked for only where the values leave that open.
    """
    trainer = cfg["trainer"]
    several = not trainer.get("packing") and trainer.get("per_device_train_batch_size", 8) > 1
    if not several or cfg["model"].get("attn_implementation") != ISOLATED:
        return False
    attention = choose_attention(shape().config, ISOLATED, int(trainer["max_length"]))
    return attention.packs and attention.name == ISOLATED


def _why_rows_mix(cfg: Groups, shape: Shape) -> str | None:
    attention = choose_attention(
        shape.config, cfg["model"].get("attn_implementation"), int(cfg["trainer"]["max_length"])
    )
    if attention.packs:
        return None
    return f"trainer.packing=true: {shape.config.model_type} cannot keep packed rows apart: take trainer.packing=false"


OF_VALUES: tuple[Callable[[Groups], str | None], ...] = (
    every_group_is_a_group,
    every_number_is_finite,
    numbers_are_in_range,
    the_seed_is_a_whole_number,
    max_steps_is_a_number_of_steps_or_minus_one,
    max_steps_leave_room_for_min_steps,
    early_stopping_has_something_to_watch,
    the_best_model_has_been_evaluated,
    the_best_model_is_chosen_by_what_is_measured,
    answers_come_with_evaluations,
    named_choices_exist,
    checkpoints_are_written,
    packed_rows_stay_whole,
    the_adapter_is_for_a_causal_language_model,
    the_adapter_names_no_code,
    automatic_keys_are_true_false_or_auto,
)
OF_SHAPE: tuple[Callable[[Groups, Shape, LoraConfig], str | None], ...] = (
    rows_fit_into_the_models_positions,
    the_tokenizer_fits_the_model,
    target_modules_are_in_the_model,
    something_is_left_to_train,
    the_rank_is_no_larger_than_the_model,
)


def check_values(cfg: Groups) -> None:
    """Raises UserError for a top-level key that conf/train.yaml has not, and for the first rule that the values break."""
    check_names(cfg, _top_level())
    groups = {name: {} for name in _GROUPS} | {name: value for name, value in cfg.items() if value is not None}
    for rule in OF_VALUES:
        if (complaint := rule(groups)) is not None:
            raise UserError(complaint.replace("\n", "\\n"))  # a value may be text of several lines


def check_shape(cfg: Groups, shape: Shape, lora: LoraConfig) -> None:
    """Raises UserError for the first rule that values and model break together."""
    for rule in OF_SHAPE:
        if (complaint := rule(cfg, shape, lora)) is not None:
            raise UserError(complaint)


def _top_level() -> set[str]:
    """What stands in conf/train.yaml: its own keys and its groups."""
    content = yaml.safe_load((CONF_DIR / "train.yaml").read_text(encoding="utf-8"))
    groups = {name for entry in content["defaults"] if isinstance(entry, dict) for name in entry if " " not in name}
    return (set(content) | groups) - {"defaults", "hydra", "experiment"}


def _values(cfg: Groups) -> list[tuple[str, Any]]:
    """("lora.r", 16), ... of all groups."""
    pairs: list[tuple[str, Any]] = []
    for group, values in cfg.items():
        pairs += (
            [(f"{group}.{key}", value) for key, value in values.items()]
            if isinstance(values, Mapping)
            else [(group, values)]
        )
    return pairs


def _words(interval: str) -> str:
    """ "[0, 1)" -> "at least 0 and below 1"."""
    low, high = (end.strip() for end in interval[1:-1].split(","))
    words = f"{'at least' if interval[0] == '[' else 'above'} {low}"
    return words if high == "inf" else f"{words} and {'at most' if interval[-1] == ']' else 'below'} {high}"


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters
