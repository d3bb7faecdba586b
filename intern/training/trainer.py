"""What differs from TRL's SFTTrainer: kernels, float32 adapters, metrics read without waiting for the GPU, steps repeated after OOM,
batches shared by several processes.

A little over 300 lines: one class whose methods override one of the library's each.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy, rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from intern import processes
from intern.data.prompt import IGNORED
from intern.errors import RunError
from intern.kernels.install import InstalledKernels
from intern.kernels.isolated_attention import no_mask
from intern.kernels.last_mlp import POSITIONS, WithPositions
from intern.kernels.lora_linear import forget_waiting
from intern.runs.checkpoints import begin, examine, seal
from intern.training.arguments import StepRules
from intern.training.checkpoint_state import restore_callbacks
from intern.training.shared_batches import RowLosses, share_batches, stand_in
from intern.training.steps import OptimizerSteps, ResumableEarlyStopping
from intern.upstream import forget_optimizers


@runtime_checkable
class MemoryControl(Protocol):
    """What a callback has if it decides how much memory a batch takes (intern/memory/callback.py)."""

    can_step_back: bool  # whether step_back may be called now

    def before_batch(self, tokens: int) -> None:
        """Prepare for a batch of `tokens` tokens, padding included."""

    def step_back(self) -> None:
        """Use less memory from now on, after GPU memory ran out. Raises RunError if nothing is left to give up."""


class InternTrainer(SFTTrainer):
    """TRL's trainer with float32 adapters, our kernels and at least `rules.min_steps` optimizer steps.

    Args:
        rules: our own keys of conf/trainer.
        answer_scores: given the model, returns scores of its answers by their keys in a log entry, such as eval_f1; every evaluation
            then has them.
        kwargs: arguments of SFTTrainer.
    """

    def __init__(
        self, rules: StepRules, answer_scores: Callable[[Any], dict[str, float]] | None = None, **kwargs: Any
    ) -> None:
        self._min_steps = rules.min_steps
        self._folder = Path(kwargs["args"].output_dir)  # of the checkpoints, in the run directory
        self._batches: list[dict[str, Any]] = []  # of the current optimizer step
        self._answer_scores = answer_scores
        self._has_checked_labels = False
        args: SFTConfig = kwargs["args"]
        # Without its limit the library removes no checkpoint: it would before a new one has its manifest, and also the last one at the end.
        self._save_total_limit, args.save_total_limit = args.save_total_limit, None
        length = args.max_length
        if args.padding_free and not args.packing:
            args.max_length = None  # TRL refuses a length since it would not cut these rows; they are cut already
        prepared: Any = args.accelerator_config
        prepared.non_blocking = args.dataloader_pin_memory  # the next batch is copied while this one is computed
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = (
                False  # every adapter is used by every batch, and a search for others takes time
            )
        super().__init__(**kwargs)
        args.max_length = length
        tokenizer: Any = self.processing_class
        self.data_collator = WithPositions(self.data_collator, stand_in(tokenizer.pad_token_id))
        # Counts and metrics of this process's batches since the last log entry, on their device: reading one waits for the GPU.
        self._tokens: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []  # labels, entropy, labels that are the most probable token: (3,) each
        # TRL casts the adapters of a quantized model to bfloat16: fp16's GradScaler cannot unscale it, and small updates vanish in it.
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
        """Run the library's; if GPU memory runs out and a MemoryControl can use less, repeat all batches of the optimizer step.

        Returns:
            The loss of the batch, a scalar on its device.

        Raises:
            torch.OutOfMemoryError: no callback can use less memory.
            RunError: a callback has nothing left to give up.
        """
        self._batches.append(inputs)
        controls = [callback for callback in self.callback_handler.callbacks if isinstance(callback, MemoryControl)]
        loss = self._try_batches(model, [inputs], num_items_in_batch, controls)
        while loss is None:
            for control in controls:
                if control.can_step_back:
                    control.step_back()
            model.zero_grad()
            loss = self._try_batches(model, self._batches, num_items_in_batch, controls)
        if self.accelerator.sync_gradients:
            self._batches = []
        return loss

    def _try_batches(
        self, model: Any, batches: list[dict[str, Any]], num_items_in_batch: Any, controls: list[MemoryControl]
    ) -> torch.Tensor | None:
        """Return the last batch's loss, or None if GPU memory ran out.

        Returning, instead of handling the exception in place, drops its traceback, which would keep the failed pass's tensors alive.
        """
        try:
            for one in batches:
                for control in controls:
                    control.before_batch(one["input_ids"].numel())
                loss = super().training_step(model, dict(one), num_items_in_batch)
            return loss
        except torch.cuda.OutOfMemoryError:
            forget_waiting(model)
            if not any(control.can_step_back for control in controls):
                self._batches = []
                raise
            return None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **kwargs: Any) -> Any:
        """Run the library's, after the last MLP has been given the positions that carry loss."""
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
        """Return what TRL's compute_loss returns for an ordinary batch, and note the same metrics, but read them later.

        Returns:
            The sum of the negative log-probabilities over `num_items_in_batch`, a scalar.
        """
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        sums = torch.stack([outputs.label_mask.sum(), outputs.entropy.sum(), outputs.is_top1.sum()])
        self._sums.append(sums)
        items = len(outputs.log_probs) if num_items_in_batch is None else num_items_in_batch
        loss: torch.Tensor = -outputs.log_probs.sum() / torch.as_tensor(items).clamp(min=1)
        shared = self.args.average_tokens_across_devices and num_items_in_batch is not None
        return loss * self.accelerator.num_processes if shared else loss

    def _read_metrics(self) -> None:
        """Read what all processes counted since the last log entry: tokens for the state, metrics for the next entry. Waits for the GPU."""
        if self._tokens:
            self.state.num_input_tokens_seen += int(self._over_processes(torch.stack(self._tokens).sum()))
        metrics = self._metrics["train"]
        for labels, entropy, right in self.accelerator.gather(torch.stack(self._sums)).tolist() if self._sums else []:
            if labels:  # a batch without rows has none
                metrics["entropy"].append(entropy / labels)
                metrics["mean_token_accuracy"].append(right / labels)
        self._tokens, self._sums = [], []

    def _over_processes(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes, each of which has had the same number of batches."""
        summed: torch.Tensor = self.accelerator.reduce(counts, reduction="sum")
        return summed

    def get_train_dataloader(self) -> DataLoader:
        """Return the library's, with batches that no two processes share. From here on each process draws random numbers of its own."""
        loader: DataLoader = share_batches(super().get_train_dataloader(), self.args.world_size)
        if self.args.process_index:
            torch.manual_seed(
                self.args.seed + self.args.process_index
            )  # for dropout: the order of the rows is fixed by now
        return loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Return the library's, with batches that no two processes share."""
        loader: DataLoader = share_batches(super().get_eval_dataloader(eval_dataset), self.args.world_size)
        return loader

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        """Run the library's, and check that the first step's batches have labels: without any, every loss would be 0 / 0."""
        samples, tokens = super().get_batch_samples(*arguments)
        if not self._has_checked_labels and samples:
            self._has_checked_labels = True
            here = any(bool((sample["labels"] != IGNORED).any()) for sample in samples)
            if not processes.largest(int(here)):
                raise RunError(
                    "no token of the first batch carries loss: look at the rows with python -m intern.preview"
                )
        return samples, tokens

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count tokens that are not padding, as the library does, but read the count later, and none of a batch without rows."""
        if "attention_mask" in inputs:
            tokens = inputs["attention_mask"].sum()
        else:
            tokenizer: Any = self.processing_class
            tokens = (inputs["input_ids"] != tokenizer.pad_token_id).sum()
        self._tokens.append(tokens * (inputs["labels"] != IGNORED).any())

    def _maybe_log_save_evaluate(self, *arguments: Any, **kwargs: Any) -> None:
        """Run the library's, after reading what was counted if anything will use it.

        With save_strategy=best, an evaluation decides whether a checkpoint is written, and would cancel that of an interruption.
        """
        control, step = self.control, self.state.global_step
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._read_metrics()
        is_canceled = control.should_save and control.should_evaluate and self.args.save_strategy == SaveStrategy.BEST
        super()._maybe_log_save_evaluate(*arguments, **kwargs)
        if is_canceled and not (self._folder / f"checkpoint-{step}").exists():
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: nothing uses the number, and the library would count all parameters again for every batch."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Run the library's, without TRL's own count of tokens: it starts at 0 after a resume, and stays 0 if we compute the loss."""
        for metrics in self._metrics.values():
            metrics.pop("num_tokens", None)
        super().log(logs, start_time)

    def forget_metrics(self) -> None:
        """Drop what a step outside of training added to the next log entry."""
        for metrics in self._metrics.values():
            metrics.clear()
        self._sums = []

    def evaluation_loop(self, *arguments: Any, **kwargs: Any) -> EvalLoopOutput:
        """Run the library's, and add the scores of answers before the metrics are logged and compared. Processes share the rows."""
        if self.args.world_size > 1 and self.eval_dataset is not None:
            self.gather_function = RowLosses(self.accelerator.gather, len(self.eval_dataset))  # type: ignore[arg-type]
        output = super().evaluation_loop(*arguments, **kwargs)
        if self._answer_scores is not None and output.metrics is not None:
            output.metrics.update(self._answer_scores(self.model))
        return output

    def _save_checkpoint(self, *arguments: Any) -> None:
        """Run the library's, then write the manifest. Older checkpoints are removed only after that, when this one is on the disk.

        Process 0 writes all of it but the states of the other processes' random generators.
        """
        checkpoint = self._folder / f"checkpoint-{self.state.global_step}"
        if self.args.world_size > 1:  # a checkpoint stores the loss of one process, which must stand for all of them
            self._tr_loss.copy_(self._over_processes(self._tr_loss) / self.args.world_size)
        if processes.is_main():
            begin(checkpoint, self._folder.parent)
        processes.wait()
        super()._save_checkpoint(*arguments)
        processes.wait()
        if processes.is_main():
            seal(checkpoint, self._folder.parent)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(self._folder), self._save_total_limit, best, use_mtime=True)
        processes.wait()

    def _load_best_model(self) -> None:
        """Run the library's, after checking that the best checkpoint is as it was written."""
        best = examine(Path(str(self.state.best_model_checkpoint)), self._folder.parent)
        if not best.is_usable:
            raise RunError(
                f"{best.path.parent}: {best.fault or best.path.name}: the best checkpoint cannot be loaded: put that file back from a copy, "
                "then resume the run"
            )
        super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Run the library's, without its pickled arguments: they hold values that config.yaml leaves unresolved, and nothing reads them."""
        super()._save(output_dir, state_dict)
        (Path(output_dir or str(self.args.output_dir)) / "training_args.bin").unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: the run directory itself says what was trained on what."""

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> Any:
        """Return the library's plan with at least min_steps steps, and with epochs without end, so that only max_steps ends training."""
        _, *between, max_steps = super().set_initial_training_values(args, dataloader)
        return sys.maxsize, *between, max(max_steps, self._min_steps)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Return where to resume, with the callbacks' state restored. After the last step nothing is left: the library would take one more."""
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        callbacks = self.callback_handler.callbacks
        best = self._folder / f"checkpoint-{self.state.best_global_step}"
        if (
            self.state.best_model_checkpoint is None and best.is_dir()
        ):  # the library looks where the run was when it was written
            self.state.best_model_checkpoint = str(best)
        if self.state.global_step:
            restore_callbacks(callbacks, self.state, str(resume_from_checkpoint))
        skipped = sum(callback.skipped for callback in callbacks if isinstance(callback, OptimizerSteps))
        has_stopped = any(callback.stopped for callback in callbacks if isinstance(callback, ResumableEarlyStopping))
        return (sys.maxsize, 0) if has_stopped or self.state.global_step >= max_steps + skipped else position
