"""Training steps before training begins: how much memory and time a batch takes, without leaving a trace in the run."""

import copy
import functools
import time
from typing import Any

import torch

from intern import processes
from intern.kernels.patches import Patches
from intern.memory.batches import Rows, largest


class Probe:
    """Runs forward, backward, optimizer step and evaluation on a batch before training begins.

    Use it as a context manager: at the end, weights, optimizer, random state and metrics are what they were.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        # Of several processes, each measures for itself: what sums their gradients would wait for one that ran out of memory.
        self.is_shared = processes.place().size > 1
        self.model = trainer.model if self.is_shared else trainer.model_wrapped
        self._patches = Patches()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # Without accelerate's wrapper: its loss scaling would count these steps.
        self.optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)

    @functools.cached_property
    def budget(self) -> int:
        """Bytes of GPU memory that this process may use: its cap, and what others leave of the GPU. The least of a run's processes."""
        free, total = torch.cuda.mem_get_info()
        cap = total * torch.cuda.get_per_process_memory_fraction()
        return min(processes.gather(int(min(cap, free + torch.cuda.memory_reserved()))))

    @functools.cached_property
    def _largest_golden(self) -> Rows:
        return largest(self.trainer.eval_dataset, self.trainer.args.per_device_eval_batch_size)

    def __enter__(self) -> None:
        if self.is_shared:  # TRL gathers its metrics in every pass
            self._patches.set(self.trainer.accelerator, "gather_for_metrics", lambda data: data)
        self._rng = torch.random.fork_rng(devices=list(range(torch.cuda.device_count())))
        self._rng.__enter__()
        self._weights = [parameter.detach().to("cpu", copy=True) for parameter in self.trained]
        self._states = copy.deepcopy(self.optimizer.state_dict())  # empty, unless the run resumes

    def __exit__(self, *failure: Any) -> None:
        for parameter, weight in zip(self.trained, self._weights, strict=True):
            parameter.data.copy_(weight)
        self.model.zero_grad()
        self.optimizer.state.clear()
        if self._states["state"]:
            self.optimizer.load_state_dict(self._states)
        self._rng.__exit__(*failure)
        self._patches.undo()
        self.trainer.forget_metrics()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the peak of these steps is not the run's

    def peak(self, rows: Rows) -> int | None:
        """Return the bytes allocated at the peak of a step on these rows, or None if memory ran out; the worst of a run's processes."""
        peak: int | None = None
        try:
            self._whole_step(rows)
            peak = torch.cuda.max_memory_allocated()
        except torch.cuda.OutOfMemoryError:
            pass  # said by the None
        finally:
            self.model.zero_grad()
        peaks = processes.gather(peak)
        return max(one for one in peaks if one is not None) if None not in peaks else None

    def reserved(self, rows: Rows) -> int:
        """Return the bytes reserved at the peak of a step: memory that CUDA graphs keep between replays counts only as reserved."""
        self._whole_step(rows)
        return max(processes.gather(torch.cuda.max_memory_reserved()))

    def timed(self, rows: Rows) -> tuple[float, float]:
        """Return the seconds that forward and backward of these rows take, and the loss (its scale is not a run's)."""
        torch.cuda.synchronize()
        start = time.monotonic()
        loss = self._pass(rows)
        torch.cuda.synchronize()
        return max(processes.gather(time.monotonic() - start)), loss

    def _whole_step(self, rows: Rows) -> None:
        """Run a step and an evaluation; peaks count from its beginning."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._step(rows)
        self._evaluate()

    def _step(self, rows: Rows) -> None:
        # A run has optimizer states from its second step on, and gradients from its second batch on.
        if not self.optimizer.state:
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
        self._pass(rows)
        self.optimizer.step()

    def _pass(self, rows: Rows) -> float:
        tokens = torch.tensor(1000, device=self.trainer.args.device)
        return float(
            self.trainer.training_step(self.model, self.trainer.data_collator(rows), num_items_in_batch=tokens)
        )

    def _evaluate(self) -> None:
        if self.trainer.eval_dataset is None:
            return
        batch = self.trainer.data_collator(self._largest_golden)
        self.model.eval()
        try:
            self.trainer.prediction_step(self.model, batch, prediction_loss_only=True)
        finally:
            self.model.train()
