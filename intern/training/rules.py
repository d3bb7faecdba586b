"""The rules that the values of a training configuration must keep, one small function each.

The names and types of a library's keys are checked against its class (intern/config/build.py), precision against the GPU
(intern/model/precision.py), rows against their format (intern/data/files.py), and what depends on the model in
intern/training/model_rules.py. Here are the rules that no library checks, or checks too late. A rule returns the message for the user, or
None; the first line of its docstring is the rule. A little over 300 lines: a list of small functions is easier to search than two.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from intern.config.build import check_names
from intern.errors import UserError
from intern.evaluation.metrics import training_metrics
from intern.paths import CONF_DIR
from intern.runs.names import words_fault

Groups = Mapping[str, Any]  # {"lora": {"r": 16, ...}, ..., "seed": 42}

# Key -> the numbers that it accepts, and why. The special values -1 and null, and missing keys, have rules of their own.
RANGES: dict[str, tuple[str, str]] = {
    "seed": ("[0, 4294967295]", "random number generators accept nothing else"),
    "lora.r": ("[1, inf)", "rank 0 trains nothing"),
    "lora.lora_alpha": ("(0, inf)", "the update is multiplied by lora_alpha / r, so 0 trains nothing"),
    "lora.lora_dropout": ("[0, 1)", "it is the fraction of inputs that is dropped"),
    "trainer.num_train_epochs": ("(0, inf)", "to train for a number of steps instead, set trainer.max_steps"),
    "trainer.min_steps": ("[0, inf)", "0 means no minimum"),
    "trainer.max_skipped_steps": ("[0, inf)", "it is a number of steps"),
    "trainer.eval_answers": ("[0, inf)", "0 generates no answers during training"),
    "trainer.early_stopping_patience": ("[1, inf)", "null turns early stopping off"),
    "trainer.per_device_train_batch_size": ("[1, inf)", "it is a number of rows"),
    "trainer.per_device_eval_batch_size": ("[1, inf)", "it is a number of rows"),
    "trainer.gradient_accumulation_steps": ("[1, inf)", "1 means no accumulation"),
    "trainer.max_length": ("[1, inf)", "it is a number of tokens"),
    "trainer.learning_rate": ("[0, inf)", "2e-4 is typical"),
    "trainer.weight_decay": ("[0, inf)", "0 turns it off"),
    "trainer.max_grad_norm": ("[0, inf)", "0 turns clipping off"),
    "trainer.warmup_steps": ("[0, inf)", "0 starts at the full learning rate"),
    "trainer.warmup_ratio": ("[0, 1)", "it is a fraction of all steps"),
    "trainer.adam_beta1": ("[0, 1)", "0.9 is typical"),
    "trainer.adam_beta2": ("[0, 1)", "0.999 is typical"),
    "trainer.adam_epsilon": ("(0, inf)", "1e-8 is typical"),
    "trainer.logging_steps": ("(0, inf)", "it is a number of steps or, below 1, a fraction of all steps"),
    "trainer.eval_steps": ("(0, inf)", "it is a number of steps or, below 1, a fraction of all steps"),
    "trainer.save_steps": ("(0, inf)", "it is a number of steps or, below 1, a fraction of all steps"),
    "trainer.save_total_limit": ("[1, inf)", "a run without checkpoints cannot be resumed"),
    "trainer.label_smoothing_factor": ("[0, 1)", "0 turns it off"),
    "trainer.neftune_noise_alpha": ("[0, inf)", "0 turns it off"),
    "trainer.eval_accumulation_steps": ("[1, inf)", "leave it out to keep all"),
    "trainer.pad_to_multiple_of": ("[1, inf)", "leave it out for no padding beyond the longest row"),
    "trainer.dataloader_num_workers": ("[0, 512]", "0 loads rows in the training process"),
    "model.quantized_cache_gib": ("(0, inf)", "model.quantized_cache=null turns the cache off"),
    "data.num_proc": ("[1, 512]", "null chooses by the number of rows"),
    "logger.sample_answers": ("[0, inf)", "0 logs none"),
}
_LOG_LEVELS = ("passive", "detail", "debug", "info", "warning", "error", "critical")
_GROUPS = ("model", "quant", "lora", "trainer", "data", "logger")


def every_group_is_a_group(cfg: Groups) -> str | None:
    """A group holds keys; text or a number instead is a slip on the command line."""
    for name in _GROUPS:
        if not isinstance(cfg.get(name) or {}, Mapping):
            return f"{name}={cfg[name]}: must name one of the options in conf/{name}/"
    return None


def every_number_is_finite(cfg: Groups) -> str | None:
    """No key is NaN or infinite: NaN passes every comparison below."""
    for key, value in _values(cfg):
        if isinstance(value, float) and not math.isfinite(value):
            return f"{key}={value}: must be a finite number"
    return None


def numbers_are_in_range(cfg: Groups) -> str | None:
    """Each key of RANGES is in its range; values of a wrong type are left to the library's class."""
    for key, value in _values(cfg):
        if key not in RANGES or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        interval, reason = RANGES[key]
        low, high = (float(end) for end in interval[1:-1].split(","))
        is_open = (value == low and interval[0] == "(") or (value == high and interval[-1] == ")")
        if not low <= value <= high or is_open:
            return f"{key}={value}: must be {_words(interval)}; {reason}"
    return None


def steps_are_counted_in_whole_numbers(cfg: Groups) -> str | None:
    """From 1 on, the distance of log lines, evaluations and checkpoints is a whole number of steps."""
    for key in ("logging_steps", "eval_steps", "save_steps"):
        value = cfg["trainer"].get(key)
        if isinstance(value, float) and value > 1 and not value.is_integer():
            return f"trainer.{key}={value}: must be a whole number of steps or, below 1, a fraction of all steps"
    return None


def the_seed_is_a_whole_number(cfg: Groups) -> str | None:
    """The seed belongs to no library's class, so its type is checked here."""
    seed = cfg.get("seed")
    return None if isinstance(seed, int) and not isinstance(seed, bool) else f"seed={seed}: must be a whole number"


def processes_are_counted_in_whole_numbers(cfg: Groups) -> str | None:
    """num_processes belongs to no library's class, so its type is checked here."""
    count = cfg.get("num_processes")
    if count is None or (isinstance(count, int) and not isinstance(count, bool) and count >= 1):
        return None
    return f"num_processes={count}: must be a whole number, at least 1: one process for each GPU"


def name_and_notes_are_text(cfg: Groups) -> str | None:
    """A name is short, can be printed, and cannot be taken for a path's start or for a word that run_dir= knows; notes are text."""
    return words_fault(cfg.get("name"), cfg.get("notes"))


def max_steps_is_a_number_of_steps_or_minus_one(cfg: Groups) -> str | None:
    """max_steps is positive or -1: transformers would silently train for epochs with 0."""
    most = cfg["trainer"].get("max_steps", -1)
    if isinstance(most, int) and most < 1 and most != -1:
        return f"trainer.max_steps={most}: must be at least 1, or -1 to train for trainer.num_train_epochs"
    return None


def max_steps_leave_room_for_min_steps(cfg: Groups) -> str | None:
    """max_steps is not below min_steps, which would contradict it."""
    most, least = cfg["trainer"].get("max_steps", -1), cfg["trainer"].get("min_steps", 0)
    if isinstance(most, int) and isinstance(least, int) and 0 < most < least:
        return f"trainer.max_steps={most} is below trainer.min_steps={least}: raise max_steps, or set trainer.min_steps={most} too"
    return None


def early_stopping_has_something_to_watch(cfg: Groups) -> str | None:
    """Early stopping compares evaluations and keeps the best checkpoint, so it needs both."""
    trainer = cfg["trainer"]
    patience = trainer.get("early_stopping_patience")
    if patience is not None and not trainer.get("load_best_model_at_end"):
        return f"trainer.early_stopping_patience={patience} needs trainer.load_best_model_at_end=true and trainer.eval_strategy=steps"
    return None


def the_best_model_has_been_evaluated(cfg: Groups) -> str | None:
    """Only a checkpoint that was evaluated can be the best: evaluations and checkpoints are made together."""
    trainer = cfg["trainer"]
    evaluates, saves = str(trainer.get("eval_strategy", "no")), str(trainer.get("save_strategy", "steps"))
    if trainer.get("load_best_model_at_end") and evaluates != saves and saves != "best":
        return (
            f"trainer.load_best_model_at_end=true needs trainer.eval_strategy={saves}: "
            "only a checkpoint that was evaluated can be the best"
        )
    return None


def named_choices_exist(cfg: Groups) -> str | None:
    """Optimizers, schedules and strategies are known by name."""
    from accelerate.utils import DynamoBackend  # these are heavy
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    named = {
        "quant.bnb_4bit_quant_type": ("nf4", "fp4"),
        "quant.bnb_4bit_compute_dtype": ("float16", "bfloat16", "float32"),
        "trainer.log_level": _LOG_LEVELS,
        "trainer.log_level_replica": _LOG_LEVELS,
        "trainer.packing_strategy": ("bfd", "bfd_split", "wrapped"),
        "trainer.loss_type": ("nll", "dft", "chunked_nll"),
        "trainer.dataloader_multiprocessing_context": ("fork", "forkserver", "spawn"),
        "trainer.torch_compile_backend": tuple(backend.value.lower() for backend in DynamoBackend),
        "trainer.torch_compile_mode": (
            "default",
            "lite",
            "reduce-overhead",
            "max-autotune-no-cudagraphs",
            "max-autotune",
        ),
        **{
            f"trainer.{key}": tuple(str(kind.value) for kind in kinds)
            for key, kinds in (
                ("optim", OptimizerNames),
                ("lr_scheduler_type", SchedulerType),
                ("eval_strategy", IntervalStrategy),
                ("save_strategy", SaveStrategy),
            )
        },
    }
    for key, choices in named.items():
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
    """Golden rows are answered at evaluations during training, so there must be some."""
    trainer = cfg["trainer"]
    if trainer.get("eval_answers") and str(trainer.get("eval_strategy", "no")) == "no":
        return f"trainer.eval_answers={trainer['eval_answers']} needs trainer.eval_strategy=steps"
    return None


def checkpoints_are_written(cfg: Groups) -> str | None:
    """A run writes checkpoints: without them an interruption loses everything."""
    saves = str(cfg["trainer"].get("save_strategy", "steps"))
    if saves in ("no", "False", "None"):
        return f"trainer.save_strategy={'null' if saves == 'None' else saves}: a run without checkpoints cannot be resumed; keep steps and raise trainer.save_steps"
    return None


def the_best_checkpoint_comes_with_evaluations(cfg: Groups) -> str | None:
    """save_strategy=best writes a checkpoint after an evaluation only, so evaluations must not be off or delayed."""
    trainer = cfg["trainer"]
    if str(trainer.get("save_strategy", "steps")) != "best":
        return None
    if str(trainer.get("eval_strategy", "no")) in ("no", "False"):
        return (
            "trainer.save_strategy=best needs trainer.eval_strategy=steps: without evaluations no checkpoint is written"
        )
    if trainer.get("metric_for_best_model", "eval_loss") is None:
        return "trainer.save_strategy=best needs trainer.metric_for_best_model=eval_loss: without it no checkpoint is the best"
    if delay := trainer.get("eval_delay"):
        return f"trainer.eval_delay={delay}: no checkpoint is written until then with trainer.save_strategy=best; leave it out or use steps"
    return None


def packed_rows_stay_whole(cfg: Groups) -> str | None:
    """Packing keeps rows whole: the strategy "wrapped" cuts them in two and lets neighbors see each other."""
    trainer = cfg["trainer"]
    if trainer.get("packing") and trainer.get("packing_strategy", "bfd") == "wrapped":
        return "trainer.packing_strategy=wrapped: cuts rows in two and lets neighboring rows see each other; use bfd"
    if trainer.get("padding_free") and not trainer.get("packing"):
        return "trainer.padding_free=true only works with trainer.packing=true, which implies it: leave it out"
    return None


def the_adapter_is_for_a_causal_language_model(cfg: Groups) -> str | None:
    """The adapter is for a causal language model: other task types add heads that do not generate answers."""
    task = cfg["lora"].get("task_type")
    return None if task == "CAUSAL_LM" else f"lora.task_type={task}: must be CAUSAL_LM"


def the_adapter_names_no_code(cfg: Groups) -> str | None:
    """No key names code (PEFT's megatron keys), has no effect here, or turns the adapter off while the rows are trained on (aLoRA)."""
    for key in (
        *("megatron_config", "megatron_core", "auto_mapping", "base_model_name_or_path", "revision"),
        *("use_qalora", "alora_invocation_tokens"),
    ):
        if cfg["lora"].get(key) and not (key == "megatron_core" and cfg["lora"][key] == "megatron.core"):
            return f"lora.{key}: not supported: leave it out"
    if cfg["lora"].get("velora_config") is not None:  # 4-bit layers do not have it
        return "lora.velora_config: not supported: leave it out"
    if cfg["lora"].get("peft_type") not in (None, "LORA"):
        return f"lora.peft_type={cfg['lora']['peft_type']}: only LORA is trained here"
    return None


def alphas_are_above_zero(cfg: Groups) -> str | None:
    """An adapter whose alpha is 0 does nothing, whatever it learns."""
    patterns = cfg["lora"].get("alpha_pattern")
    for name, value in patterns.items() if isinstance(patterns, dict) else ():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            return f"lora.alpha_pattern: {name} has {value}: must be a number above 0; 0 would train nothing"
    return None


def processes_that_load_rows_are_there(cfg: Groups) -> str | None:
    """Keys of the processes that load rows need such processes."""
    trainer = cfg["trainer"]
    for key in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if trainer.get(key) and not trainer.get("dataloader_num_workers"):
            return f"trainer.{key}={trainer[key]}: needs trainer.dataloader_num_workers of at least 1"
    return None


def automatic_keys_are_true_false_or_auto(cfg: Groups) -> str | None:
    """activation_checkpointing and use_liger_kernel are true, false or auto."""
    for key in ("activation_checkpointing", "use_liger_kernel"):
        value = cfg["trainer"].get(key, "auto")
        if not isinstance(value, bool) and value != "auto":
            return f"trainer.{key}={value}: must be auto, true or false"
    return None


OF_VALUES: tuple[Callable[[Groups], str | None], ...] = (
    every_group_is_a_group,
    every_number_is_finite,
    numbers_are_in_range,
    steps_are_counted_in_whole_numbers,
    the_seed_is_a_whole_number,
    processes_are_counted_in_whole_numbers,
    name_and_notes_are_text,
    max_steps_is_a_number_of_steps_or_minus_one,
    max_steps_leave_room_for_min_steps,
    early_stopping_has_something_to_watch,
    the_best_model_has_been_evaluated,
    the_best_model_is_chosen_by_what_is_measured,
    answers_come_with_evaluations,
    named_choices_exist,
    checkpoints_are_written,
    the_best_checkpoint_comes_with_evaluations,
    packed_rows_stay_whole,
    the_adapter_is_for_a_causal_language_model,
    the_adapter_names_no_code,
    alphas_are_above_zero,
    processes_that_load_rows_are_there,
    automatic_keys_are_true_false_or_auto,
)


def check_values(cfg: Groups, without_libraries: bool = False) -> None:
    """Check the values of a configuration, without looking at the model, the data or the machine.

    Args:
        cfg: the groups of conf/train.yaml and its own keys, as built-in types.
        without_libraries: leave out the rule whose names are those of transformers, which takes seconds to import.

    Raises:
        UserError: a top-level key that conf/train.yaml does not have, or the first rule that is broken.
    """
    check_names(cfg, top_level())
    groups = {name: {} for name in _GROUPS} | {name: value for name, value in cfg.items() if value is not None}
    for rule in OF_VALUES:
        if without_libraries and rule is named_choices_exist:
            continue
        if (complaint := rule(groups)) is not None:
            raise UserError(complaint)


def top_level() -> set[str]:
    """The names in conf/train.yaml: its own keys and its groups."""
    content = yaml.safe_load((CONF_DIR / "train.yaml").read_text(encoding="utf-8"))
    groups = {name for entry in content["defaults"] if isinstance(entry, dict) for name in entry if " " not in name}
    return (set(content) | groups) - {"defaults", "hydra", "experiment"}


def _values(cfg: Groups) -> list[tuple[str, Any]]:
    """Return ("lora.r", 16), ... for all groups."""
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
    if interval[0] == "[" and interval[-1] == "]":
        return f"between {low} and {high}"
    words = f"{'at least' if interval[0] == '[' else 'above'} {low}"
    return words if high == "inf" else f"{words} and below {high}"
