"""A written checkpoint -> the same without transformers' pickled arguments, which hold resolved values and which nothing reads."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_FILE = "training_args.bin"


class PickledArguments(TrainerCallback):
    """Removes training_args.bin from each checkpoint: config.yaml has the arguments, with what came from the environment unresolved."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _FILE).unlink(missing_ok=True)
        return control
