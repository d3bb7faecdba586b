"""conf/trainer -> trl.SFTConfig, and the trainer that counts the optimizer steps that really happened."""

import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig, SFTTrainer

from intern.config.build import build, plain
from intern.data.prompt import IGNORED
from intern.errors import RunError, UserError
from intern.kernels.install import InstalledKernels
from intern.kernels.isolated_attention import no_mask
from intern.kernels.last_mlp import POSITIONS, WithPositions
from intern.kernels.lora_linear import forget_waiting
from intern.model.precision import Precision
from intern.runs.directory import Run
from intern.upstream import forget_optimizers

log = logging.getLogger(__name__)

AUTO = "auto"  # for trainer.activation_checkpointing (intern/memory/callback.py) and trainer.use_liger_kernel
# Of the libraries' log entries: a second token count, which starts anew at a resume, and figures that metrics.json has.
_NOT_KEPT = {"num_tokens", "eval_num_tokens", "total_flos", "train_runtime"} | {
    f"train_{unit}_per_second" for unit in ("tokens", "samples", "steps")
}
# SFTConfig's keys that something else decides, and what does.
_ELSEWHERE = {
    "output_dir": "decided by hydra.run.dir",
    "seed": "decided by seed",
    "report_to": "decided by logger",
    "disable_tqdm": "progress adapts to the terminal",
    "include_num_input_tokens_seen": "tokens are always counted",
    "logging_nan_inf_filter": "a loss that is no number ends the run",
    "dataset_kwargs": "decided by trainer.packing",
    "resume_from_checkpoint": "decided by resume: python -m intern.train resume=RUN_DIR",
    "ignore_data_skip": "a run that goes on takes the next row, not the first",
    "save_only_model": "a checkpoint holds all that a run needs to go on",
    "restore_callback_states_from_checkpoint": "they are always restored",
    "assistant_only_loss": "loss is on the answer and its end of turn",
    "completion_only_loss": "loss is on the answer and its end of turn",
    "model_init_kwargs": "decided by model",
    "trust_remote_code": "code that a model brings along is never run",
    "chat_template_path": "decided by model: the tokenizer's own",
    "eos_token": "decided by model: the tokenizer's own",
    "gradient_checkpointing": "decided by trainer.activation_checkpointing, its new name",
    "gradient_checkpointing_kwargs": "decided by trainer.activation_checkpointing_kwargs, its new name",
}


@dataclass(frozen=True)
class StepRules:
    """Our own keys of conf/trainer, in optimizer steps."""

    min_steps: int
    max_skipped_steps: int
    early_stopping_patience: int | None = None
    cuda_graphs: bool = True  # whether decoder layers may be replayed as CUDA graphs
    eval_answers: int = 0  # in golden rows


def build_rules(node: DictConfig) -> StepRules:
    """Raises UserError for a wrong type or a missing key."""
    values = plain(node)
    return build(
        StepRules, {name: values[name] for name in StepRules.__dataclass_fields__ if name in values}, "trainer"
    )


def build_training_args(node: DictConfig, run: Run, precision: Precision, seed: int, evaluates: bool) -> SFTConfig:
    """TRL's configuration of one run, with the precision that was planned for this machine.

    Raises:
        UserError: an unknown key, a wrong type, a value that TRL refuses, or one that belongs elsewhere.
    """
    values = {key: value for key, value in plain(node).items() if key not in StepRules.__dataclass_fields__}
    for key, place in _ELSEWHERE.items():
        if key in values:
            raise UserError(f"trainer.{key}: not set here; {place}")
    if values.get("eval_strategy", "no") != "no" and not evaluates:
        raise UserError(f"trainer.eval_strategy={values['eval_strategy']} needs a data.eval_file")
    if values.get("max_length") is None:
        raise UserError("trainer.max_length: give the most tokens of a row")
    if values.get("activation_checkpointing") == AUTO:
        values["activation_checkpointing"] = precision.device == "cuda"  # a CPU's memory is not what runs out
    if values.get("use_liger_kernel") == AUTO:
        values["use_liger_kernel"] = precision.device == "cuda" and is_liger_kernel_available()
    values |= {
        "output_dir": str(run.checkpoints),
        "seed": seed,
        "fp16": precision.fp16,
        "bf16": precision.bf16,
        "use_cpu": precision.device == "cpu",
        "report_to": [],
        "disable_tqdm": True,
        "include_num_input_tokens_seen": "non_padding",
        "logging_nan_inf_filter": False,  # a loss that is no number must show
        # Rows come tokenized and cut to length; only packing is TRL's to do.
        "dataset_kwargs": {"skip_prepare_dataset": not values.get("packing", False)},
    }
    args = build(SFTConfig, values, "trainer")
    args._n_gpu = min(args.n_gpu, 1)  # one process uses one GPU: nn.DataParallel cannot train what TRL patches
    return args


def _restore(callback: ExportableState, state: TrainerState) -> None:
    """Gives a callback back what a checkpoint kept of it, where training goes on from one."""
    stored: Any = state.stateful_callbacks
    for name, value in stored.get(type(callback).__name__, {"attributes": {}})["attributes"].items():
        setattr(callback, name, value)


class OptimizerSteps(TrainerCallback, ExportableState):
    """Counts steps that were taken and steps that fp16's loss scaling skipped; each skipped step is made up for at the end."""

    def __init__(self, min_steps: int, max_skipped_steps: int) -> None:
        self.min_steps = min_steps
        self.max_skipped_steps = max_skipped_steps
        self.taken = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.seconds = 0.0  # from the first step on, with checkpoints and evaluations, without pauses between a stop and its resume
        self._clock = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {"min_steps": self.min_steps, "max_skipped_steps": self.max_skipped_steps},
            "attributes": {name: getattr(self, name) for name in ("taken", "skipped", "skipped_in_a_row", "seconds")},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _restore(self, state)
        state.max_steps += self.skipped
        self._clock = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.taken += 1
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            state.max_steps += 1
            control.should_training_stop = False
        if self.skipped_in_a_row > self.max_skipped_steps:
            raise RunError(
                f"fp16 skipped {self.skipped_in_a_row} optimizer steps in a row (step {state.global_step}): gradients overflow at every "
                "loss scale; lower trainer.learning_rate, or on a card with bfloat16 take trainer=ampere quant=nf4_bf16"
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_training_stop and self.taken < self.min_steps:
            control.should_training_stop = False  # early stopping waits for min_steps


class Patience(EarlyStoppingCallback):
    """The library's early stopping, which would forget at a resume how long nothing has got better."""

    def __init__(self, patience: int, steps: OptimizerSteps) -> None:
        super().__init__(patience)
        self.steps = steps
        self.stopped = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        names = ("early_stopping_patience_counter", "stopped")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _restore(self, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        super().on_evaluate(args, state, control, metrics, **kwargs)
        exhausted = self.early_stopping_patience_counter >= self.early_stopping_patience
        self.stopped = exhausted and self.steps.taken >= self.steps.min_steps


class Interruption(TrainerCallback):
    """Ctrl-C or SIGTERM: the step is finished, a checkpoint saved, training ends. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self.restore()
            raise KeyboardInterrupt
        self.signal = number
        log.warning("%s: saving a checkpoint after this step (Ctrl-C again: stop at once)", signal.Signals(number).name)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.signal is not None:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= self.signal is not None  # whoever waits for min_steps does not outwait a signal

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class History(TrainerCallback):
    """Every log step: a line in history.jsonl, the same to `report`, and a progress bar in a terminal or a line of text elsewhere."""

    def __init__(self, run: Run, steps: OptimizerSteps, report: Callable[[dict[str, Any]], None]) -> None:
        self.run = run
        self.report = report
        self.steps = steps
        self._tokens = 0
        self._since = 0.0
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = self._start = time.monotonic()
        self._first = state.global_step
        self._tokens = state.num_input_tokens_seen
        if self._console.is_terminal:
            self._bar.start()
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, figures="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, completed=state.global_step, total=state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = {name: value for name, value in kwargs["logs"].items() if name not in _NOT_KEPT}
        if "train_loss" in logs:
            return  # the summary at the end: metrics.json has it
        entry: dict[str, Any] = {
            "step": state.global_step,
            "optimizer_steps": self.steps.taken,
            "skipped_steps": self.steps.skipped,
        } | logs
        self._since += logs.get("eval_runtime", 0.0)  # an evaluation is no time in which tokens are trained
        if "loss" in logs:
            now, tokens = time.monotonic(), state.num_input_tokens_seen
            entry["tokens_per_second"] = round((tokens - self._tokens) / max(now - self._since, 1e-9), 1)
            self._tokens, self._since = tokens, now
            if kwargs["optimizer"].scaler is None and _is_bad(float(logs["loss"])):
                raise RunError(
                    f"the loss is {logs['loss']} at step {state.global_step}: lower trainer.learning_rate; "
                    f"the last checkpoint before it is in {self.run.checkpoints}"
                )
            scaler = getattr(kwargs.get("optimizer"), "scaler", None)
            if scaler is not None:
                entry["loss_scale"] = scaler.get_scale()
        # A loss that is not finite is kept as text: JSON has no such numbers.
        self.run.append_history({name: value if not _is_bad(value) else str(value) for name, value in entry.items()})
        self.report(entry)
        self._show(entry, state)

    def _show(self, entry: dict[str, Any], state: TrainerState) -> None:
        shown = {"loss": ".3f", "eval_loss": ".3f", "eval_f1": ".3f", "tokens_per_second": ",.0f", "loss_scale": ".0f"}
        figures = "  ".join(
            f"{name.replace('tokens_per_second', 'tokens/s')} {entry[name]:{form}}"
            for name, form in shown.items()
            if name in entry
        )
        if self._console.is_terminal:
            self._bar.update(self._task, figures=figures)
            return
        left = (
            (time.monotonic() - self._start)
            / max(state.global_step - self._first, 1)
            * (state.max_steps - state.global_step)
        )
        log.info(
            "step %d/%d  %s  left %s",
            state.global_step,
            state.max_steps,
            figures,
            time.strftime("%H:%M:%S", time.gmtime(left)),
        )

    def close(self) -> None:
        """Takes the progress bar off the terminal."""
        if self._console.is_terminal:
            self._bar.stop()


def _is_bad(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class InternTrainer(SFTTrainer):
    """TRL's trainer with float32 adapters and at least `rules.min_steps` steps.

    Args:
        rules: our own keys of conf/trainer.
        answer_scores: a model -> scores of its answers by their keys in a log entry, such as eval_f1; every evaluation then has them.
        kwargs: what SFTTrainer takes.
    """

    def __init__(
        self, rules: StepRules, answer_scores: Callable[[Any], dict[str, float]] | None = None, **kwargs: Any
    ) -> None:
        self._min_steps = rules.min_steps
        # Of intern/memory/callback.py: what a batch's tokens are told to before it is computed, and what makes room where GPU memory runs out.
        self.before_batch: Callable[[int], None] | None = None
        self.step_back: Callable[[], None] | None = None
        self._batches: list[dict[str, Any]] = []  # of the optimizer step that is under way
        self._answer_scores = answer_scores
        self._has_looked = False
        args: SFTConfig = kwargs["args"]
        length = args.max_length
        if args.padding_free and not args.packing:
            args.max_length = None  # TRL insists, since it would not cut these rows: they are cut
        prepared: Any = args.accelerator_config
        prepared.non_blocking = args.dataloader_pin_memory  # the next batch is copied while this one is computed
        super().__init__(**kwargs)
        args.max_length = length
        self.data_collator = WithPositions(self.data_collator)
        # Counts and figures of batches since they were read last: to read one is to wait for all that the GPU was given.
        self._tokens: list[torch.Tensor] = []
        self._figures: list[torch.Tensor] = []
        # TRL casts the adapters of a quantized model to bfloat16: fp16's GradScaler cannot unscale that, and small updates vanish in it.
        assert self.model is not None
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)
        self.kernels = InstalledKernels()
        asked = args.loss_type != "nll" or self.label_smoother is not None or self.compute_loss_func is not None
        self._has_plain_loss = not asked and self.accelerator.parallelism_config is None

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the library's loop with our kernels installed; Liger's are in place by now (intern/kernels/install.py)."""
        assert self.model is not None
        try:
            with self.kernels.installed(self.model, self.aux_loss_enabled):
                return super()._inner_training_loop(*args, **kwargs)
        finally:
            forget_optimizers()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The library's; where GPU memory runs out, the whole optimizer step's batches again after `step_back` made room."""
        self._batches.append(inputs)
        loss = self._tried(model, [inputs], num_items_in_batch)
        while loss is None:
            assert self.step_back is not None
            self.step_back()
            model.zero_grad()
            loss = self._tried(model, self._batches, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._batches = []
        return loss

    def _tried(self, model: Any, batches: list[dict[str, Any]], num_items_in_batch: Any) -> torch.Tensor | None:
        """The last batch's loss; None where memory ran out. It returns, so that what the failed pass held is free again."""
        try:
            for one in batches:
                if self.before_batch is not None:
                    self.before_batch(one["input_ids"].numel())
                loss = super().training_step(model, dict(one), num_items_in_batch)
            return loss
        except torch.cuda.OutOfMemoryError:
            forget_waiting(model)
            if self.step_back is None:
                self._batches = []
                raise
            return None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **kwargs: Any) -> Any:
        """The library's, after the last MLP was told which positions it will be asked for."""
        has_head, last_mlp = "lm_head" in self.kernels, self.kernels.get("last_mlp")
        scored = inputs[POSITIONS] if has_head else inputs.pop(POSITIONS)
        if last_mlp is not None and model.training:
            last_mlp.look_at(inputs["labels"].shape, scored)
        assert self.model is not None
        with no_mask(self.model, inputs):
            if (
                has_head
                and model.training
                and self._has_plain_loss
                and not arguments
                and kwargs.keys() == {"num_items_in_batch"}
            ):
                return self._plain_loss(model, inputs, **kwargs)
            return super().compute_loss(model, inputs, *arguments, **kwargs)

    def _plain_loss(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """What TRL's compute_loss gives and keeps of an ordinary batch; its figures are read later."""
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        figures = torch.stack([outputs.label_mask.sum(), outputs.entropy.sum(), outputs.is_top1.sum()])
        self._figures.append(self.accelerator.gather(figures).view(-1, 3).sum(0))
        items = len(outputs.log_probs) if num_items_in_batch is None else num_items_in_batch
        loss: torch.Tensor = -outputs.log_probs.sum() / torch.as_tensor(items).clamp(min=1)
        shared = self.args.average_tokens_across_devices and num_items_in_batch is not None
        return loss * self.accelerator.num_processes if shared else loss

    def _read_figures(self) -> None:
        """Hands over what was counted: tokens to the state, figures to the next log entry."""
        if self._tokens:
            self.state.num_input_tokens_seen += int(torch.stack(self._tokens).sum())
        kept = self._metrics["train"]
        for scored, entropy, right in torch.stack(self._figures).tolist() if self._figures else []:
            kept["entropy"].append(entropy / max(1, scored))
            kept["mean_token_accuracy"].append(right / max(1, scored))
        self._tokens, self._figures = [], []

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        """The library's; the first batch must have something to learn from, or every loss would be 0 / 0."""
        samples, tokens = super().get_batch_samples(*arguments)
        if not self._has_looked and samples:
            self._has_looked = True
            if not any(bool((sample["labels"] != IGNORED).any()) for sample in samples):
                raise RunError(
                    "no token of the first batch carries loss: look at the rows with python -m intern.preview"
                )
        return samples, tokens

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """The library's count of tokens that are not padding, read later."""
        if "attention_mask" in inputs:
            tokens = inputs["attention_mask"].sum()
        else:
            tokenizer: Any = self.processing_class
            tokens = (inputs["input_ids"] != tokenizer.pad_token_id).sum()
        self._tokens.append(self.accelerator.gather(tokens).sum())

    def _maybe_log_save_evaluate(self, *arguments: Any, **kwargs: Any) -> None:
        """The library's; by then what was counted must have been read."""
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._read_figures()
        super()._maybe_log_save_evaluate(*arguments, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None: no figure of a run is made of them, and the library counts all parameters anew for every batch."""
        return 0

    def forget_metrics(self) -> None:
        """Takes back what a step outside of training has left in the figures of the next log entry."""
        for figures in self._metrics.values():
            figures.clear()
        self._figures = []
        self._total_train_tokens = 0

    def evaluation_loop(self, *arguments: Any, **kwargs: Any) -> EvalLoopOutput:
        """The library's, before it logs and compares the figures."""
        output = super().evaluation_loop(*arguments, **kwargs)
        if self._answer_scores is not None and output.metrics is not None:
            output.metrics.update(self._answer_scores(self.model))
        return output

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: the run directory itself says what was trained on what."""

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> Any:
        """The library's plan with two changes: no fewer than min_steps, and epochs without end, so that max_steps alone ends training."""
        _, *between, max_steps = super().set_initial_training_values(args, dataloader)
        return sys.maxsize, *between, max(max_steps, self._min_steps)

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        """Where to go on. The library would take one step more from a checkpoint of the last step: then no epoch is left."""
        epochs, batches = super()._init_training_state(max_steps, *arguments)
        stored: Any = self.state.stateful_callbacks
        skipped = stored.get("OptimizerSteps", {}).get("attributes", {}).get("skipped", 0)
        stopped = stored.get("Patience", {}).get("attributes", {}).get("stopped", False)
        return (sys.maxsize, 0) if stopped or self.state.global_step >= max_steps + skipped else (epochs, batches)
