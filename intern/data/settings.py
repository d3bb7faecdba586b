"""conf/data -> what is trained on and how it is shown."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """conf/data."""

    train_file: str
    eval_file: str | None
    context: str
    num_proc: int | None
    system_prompt: str
