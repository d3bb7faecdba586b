"""conf/trainer -> trl.SFTConfig and our own keys."""

from dataclasses import dataclass, fields

from omegaconf import DictConfig
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

from intern.config.build import build, plain
from intern.errors import UserError
from intern.model.precision import Precision
from intern.runs.directory import Run
from intern.training.optimizer import check_optimizer

AUTO = "auto"  # a value of trainer.activation_checkpointing and trainer.use_liger_kernel besides true and false
_UPLOAD = "nothing is uploaded during training: upload the finished adapter/ with hf upload"
_SAME_PRECISION = "golden rows are scored in the precision of training"
_WHOLE_BASE = "every process has the whole base on its GPU; num_processes says how many there are"
_ROWS = "set by data: rows arrive as tokens and labels"
# Keys of SFTConfig that conf/trainer must not set, and what sets them.
_SET_ELSEWHERE = {
    "output_dir": "set by hydra.run.dir",
    "seed": "set by seed",
    "report_to": "set by logger",
    "disable_tqdm": "progress adapts to the terminal",
    "include_num_input_tokens_seen": "tokens are always counted",
    "logging_nan_inf_filter": "a NaN or infinite loss ends the run",
    "dataset_kwargs": "set by trainer.packing",
    "resume_from_checkpoint": "set by resume: python -m intern.train resume=RUN_DIR",
    "ignore_data_skip": "a resumed run continues with the next row, not with the first",
    "save_only_model": "a checkpoint has everything that is needed to resume",
    "restore_callback_states_from_checkpoint": "they are always restored",
    "enable_jit_checkpoint": "Ctrl-C and SIGTERM always write a checkpoint",
    "assistant_only_loss": "the loss is on the answer and its end-of-turn token",
    "completion_only_loss": "the loss is on the answer and its end-of-turn token",
    "model_init_kwargs": "set by model",
    "trust_remote_code": "code from a model repository is never run",
    "chat_template_path": "set by model: the tokenizer's own",
    "eos_token": "set by model: the tokenizer's own",
    "pad_token": "set by model: the tokenizer's own",
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_token": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_always_push": _UPLOAD,
    "hub_revision": _UPLOAD,
    "bf16_full_eval": _SAME_PRECISION,
    "fp16_full_eval": _SAME_PRECISION,
    "deepspeed": _WHOLE_BASE,
    "fsdp": _WHOLE_BASE,
    "fsdp_config": _WHOLE_BASE,
    "parallelism_config": _WHOLE_BASE,
    "local_rank": "set by torchrun",
    "ddp_backend": "NCCL between GPUs, Gloo between CPUs",
    "auto_find_batch_size": "set by trainer.activation_checkpointing=auto, which measures what fits",
    "activation_offloading": "set by trainer.activation_checkpointing=auto, which measures what fits",
    "dataloader_drop_last": "every row is trained",
    "label_names": _ROWS,
    "remove_unused_columns": _ROWS,
    "dataset_text_field": _ROWS,
    "gradient_checkpointing": "set by trainer.activation_checkpointing, its new name",
    "gradient_checkpointing_kwargs": "set by trainer.activation_checkpointing_kwargs, its new name",
}


@dataclass(frozen=True)
class StepRules:
    """Our own keys of conf/trainer.

    Args:
        min_steps: optimizer steps to take at least.
        max_skipped_steps: optimizer steps in a row that fp16's loss scaling may skip.
        early_stopping_patience: evaluations without improvement after which training stops; None: never.
        cuda_graphs: whether decoder layers may be replayed as CUDA graphs.
        eval_answers: golden rows answered at each evaluation; 0: none.
    """

    min_steps: int
    max_skipped_steps: int
    early_stopping_patience: int | None = None
    cuda_graphs: bool = True
    eval_answers: int = 0


def build_rules(node: DictConfig) -> StepRules:
    """Return our own keys of conf/trainer.

    Raises:
        UserError: a wrong type, or a missing key.
    """
    values = plain(node)
    own = {name: values[name] for name in StepRules.__dataclass_fields__ if name in values}
    return build(StepRules, own, "trainer")


def build_training_args(node: DictConfig, run: Run, precision: Precision, seed: int, evaluates: bool) -> SFTConfig:
    """Return TRL's configuration of one run.

    Args:
        node: conf/trainer.
        run: where checkpoints are written.
        precision: what was chosen for this machine.
        seed: of everything that is random in training.
        evaluates: whether there are golden rows.

    Raises:
        UserError: an unknown key, a wrong type, a value that TRL refuses, or a key that is set elsewhere.
    """
    values = {key: value for key, value in plain(node).items() if key not in StepRules.__dataclass_fields__}
    for key, place in _SET_ELSEWHERE.items():
        if key in values:
            raise UserError(f"trainer.{key}: cannot be set here; {place}")
    if values.get("eval_strategy", "no") != "no" and not evaluates:
        raise UserError(f"trainer.eval_strategy={values['eval_strategy']} needs a data.eval_file")
    if values.get("max_length") is None:
        raise UserError("trainer.max_length: give the maximum number of tokens of a row")
    if values.get("activation_checkpointing") == AUTO:
        values["activation_checkpointing"] = precision.device == "cuda"  # a CPU rarely runs out of memory
    if values.get("use_liger_kernel") == AUTO:
        values["use_liger_kernel"] = precision.device == "cuda" and is_liger_kernel_available()
    if values.get("use_liger_kernel") is True and not is_liger_kernel_available():
        raise UserError(
            "trainer.use_liger_kernel=true: the package liger-kernel is not installed: install it, or leave auto"
        )
    values |= {
        "output_dir": str(run.checkpoints),
        "seed": seed,
        "fp16": precision.fp16,
        "bf16": precision.bf16,
        "use_cpu": precision.device == "cpu",
        "report_to": [],
        "disable_tqdm": True,
        "include_num_input_tokens_seen": "non_padding",
        "logging_nan_inf_filter": False,  # intern/training/health.py must see a NaN or infinite loss
        # Rows are tokenized and cut already; only packing is left to TRL.
        "dataset_kwargs": {"skip_prepare_dataset": not values.get("packing", False)},
    }
    args = build(SFTConfig, values, "trainer")
    for field in fields(SFTConfig):
        if "dict" in str(field.type) and isinstance(value := getattr(args, field.name), str) and value:
            raise UserError(f"trainer.{field.name}={value!r}: must be names and values, such as {{name: value}}")
    check_optimizer(args, steps_here=precision.device == "cpu")
    args._n_gpu = min(args.n_gpu, 1)  # one process uses one GPU: nn.DataParallel cannot train models that TRL patched
    return args
