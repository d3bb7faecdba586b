"""State of our callbacks in a checkpoint, found by a stable key.

transformers stores the state of a callback in trainer_state.json under the name of its class, and looks that name up again when it saves
the next checkpoint. A renamed class would lose its counts. So every state that we store carries a key of its own, and only the key counts
when a run resumes.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from intern.errors import UserError
from intern.runs.checkpoints import FORMAT

# Class names that stand for a key in checkpoints written before states carried one.
_OLD_NAMES = {"optimizer_steps": "OptimizerSteps", "early_stopping": "Patience", "logging_window": "Carried"}


class CheckpointedCallback(TrainerCallback, ExportableState):
    """A callback with state that a checkpoint must have for a resumed run to end like one that never stopped."""

    checkpoint_key: ClassVar[str]  # never changes, whatever the class is called
    checkpoint_attributes: ClassVar[tuple[str, ...]]  # names of attributes whose values JSON can hold

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        attributes = {name: getattr(self, name) for name in self.checkpoint_attributes}
        return {"args": {}, "attributes": attributes, "checkpoint_key": self.checkpoint_key, "format": FORMAT}

    def restore(self, attributes: dict[str, Any]) -> None:
        """Set the attributes to what a checkpoint stored."""
        for name in self.checkpoint_attributes:
            setattr(self, name, attributes[name])


def find_state(stored: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Return the state with this key, or None.

    Args:
        stored: stateful_callbacks of a trainer_state.json.
        key: a callback's checkpoint_key.
    """
    name = _name_of(stored, key)
    return stored[name] if name is not None else None


def restore_callbacks(callbacks: Iterable[Any], state: TrainerState, checkpoint: str) -> None:
    """Give every CheckpointedCallback what the checkpoint stored of it.

    Args:
        callbacks: all callbacks of the trainer.
        state: as loaded from the checkpoint; its entries get the names that the classes have now, which transformers needs at the next save.
        checkpoint: folder of the checkpoint, for the message.

    Raises:
        UserError: the checkpoint lacks a state or a part of it; resuming would count wrong.
    """
    stored: Any = state.stateful_callbacks
    for callback in callbacks:
        if not isinstance(callback, CheckpointedCallback):
            continue
        name = _name_of(stored, callback.checkpoint_key)
        attributes = stored[name].get("attributes", {}) if name is not None else {}
        missing = [part for part in callback.checkpoint_attributes if part not in attributes]
        if missing:
            raise UserError(
                f"{checkpoint}/trainer_state.json: the state {callback.checkpoint_key} lacks {', '.join(missing)}, so counts would be "
                "wrong after a resume: delete that checkpoint to resume from an earlier one, or start again in another hydra.run.dir"
            )
        callback.restore(attributes)
        stored[type(callback).__name__] = stored.pop(name)


def _name_of(stored: dict[str, Any], key: str) -> str | None:
    for name, state in stored.items():
        if isinstance(state, dict) and state.get("checkpoint_key") == key:
            return name
    old = _OLD_NAMES.get(key)
    is_old = old in stored and isinstance(stored[old], dict) and "checkpoint_key" not in stored[old]
    return old if is_old else None


class LoggingWindow(CheckpointedCallback):
    """What the next log line averages: transformers and TRL forget it at a checkpoint that falls between two log lines.

    Args:
        trainer: an InternTrainer.
    """

    checkpoint_key = "logging_window"
    # The sum of losses since the last log line, the step of that line, and TRL's metrics since then.
    checkpoint_attributes = ("loss_sum", "last_logged", "figures")

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._restored: dict[str, Any] = {}

    @property
    def loss_sum(self) -> float:
        return self.trainer._tr_loss.item() if self._has_begun else 0.0

    @property
    def last_logged(self) -> int:
        return self.trainer._globalstep_last_logged if self._has_begun else 0

    @property
    def figures(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self.trainer._metrics["train"].items()}

    @property
    def mean_loss(self) -> float:
        """The mean of the losses since the last log line: of the whole run, whatever was resumed, if it is too short for a line."""
        return self.loss_sum / max(1, self.trainer.state.global_step - self.last_logged)

    @property
    def _has_begun(self) -> bool:
        return hasattr(self.trainer, "_tr_loss")

    def restore(self, attributes: dict[str, Any]) -> None:
        """Note the values until training begins: only then does the trainer have the attributes that hold them."""
        self._restored = attributes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._restored:
            return
        self.trainer._tr_loss.fill_(self._restored["loss_sum"])
        self.trainer._globalstep_last_logged = self._restored["last_logged"]
        metrics = self.trainer._metrics["train"]
        metrics.clear()
        metrics.update({name: list(values) for name, values in self._restored["figures"].items()})
        self._restored = {}
