"""The callbacks of a training run, and the order in which transformers must call them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import DefaultFlowCallback, PrinterCallback, TrainerCallback

from intern import processes
from intern.memory.callback import FitMemory
from intern.runs.directory import Run
from intern.training.arguments import StepRules
from intern.training.checkpoint_state import LoggingWindow
from intern.training.health import Health
from intern.training.history import History
from intern.training.interrupt import Interruption
from intern.training.steps import OptimizerSteps, ResumableEarlyStopping
from intern.training.trainer import InternTrainer

# transformers calls each event of all callbacks in the order of this list.
ORDER: tuple[type[TrainerCallback], ...] = (
    DefaultFlowCallback,  # transformers' own: sets the stop at max_steps
    FitMemory,  # before training begins, memory is measured with nothing else under way
    ResumableEarlyStopping,  # sets a stop, which ...
    OptimizerSteps,  # ... reverts before min_steps, as it does the stop at max_steps after a skipped step
    LoggingWindow,
    Interruption,  # sets a stop that must not be reverted, and a checkpoint, which ...
    Health,  # ... prevents if weights are NaN or infinite; such a loss must end the run before it is logged
    History,
)


@dataclass(frozen=True)
class Callbacks:
    """The callbacks that are read after training."""

    steps: OptimizerSteps
    interruption: Interruption
    window: LoggingWindow
    history: History | None = None  # of process 0
    early_stopping: ResumableEarlyStopping | None = None
    memory: FitMemory | None = None

    def close(self) -> None:
        """Give back the terminal and the signal handlers, also if training failed."""
        if self.history is not None:
            self.history.close()
        self.interruption.close()


def build_callbacks(
    trainer: InternTrainer,
    rules: StepRules,
    run: Run,
    report: Callable[[dict[str, Any]], None],
    build_memory: Callable[[InternTrainer], FitMemory] | None = None,
) -> Callbacks:
    """Add all callbacks to a trainer that has none but transformers' own.

    Args:
        trainer: the trainer.
        rules: our own keys of conf/trainer.
        run: the run directory.
        report: called with each log entry.
        build_memory: makes the callback that fits batches into GPU memory; None: nothing does.
    """
    trainer.remove_callback(PrinterCallback)  # History shows progress
    steps = OptimizerSteps(rules.min_steps, rules.max_skipped_steps)
    patience = rules.early_stopping_patience
    callbacks = Callbacks(
        steps=steps,
        interruption=Interruption(),
        history=History(run, steps, report) if processes.is_main() else None,
        window=LoggingWindow(trainer),
        early_stopping=ResumableEarlyStopping(patience, steps) if patience is not None else None,
        memory=build_memory(trainer) if build_memory is not None else None,
    )
    ordered = (
        callbacks.memory,
        callbacks.early_stopping,
        steps,
        callbacks.window,
        callbacks.interruption,
        Health(run, steps),
        callbacks.history,
    )
    for callback in ordered:
        if callback is not None:
            trainer.add_callback(callback)
    check_order(trainer.callback_handler.callbacks)
    return callbacks


def check_order(callbacks: list[TrainerCallback]) -> None:
    """Assert that the callbacks of `ORDER` are called in that order; others may be anywhere."""
    places = [ORDER.index(type(callback)) for callback in callbacks if type(callback) in ORDER]
    assert places == sorted(places), f"callbacks in the wrong order: {[type(one).__name__ for one in callbacks]}"
