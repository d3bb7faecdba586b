"""conf/data -> what is trained on and how it is shown."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from intern.data.conversation import checked_text
from intern.data.formats import AUTO, RowSettings
from intern.data.row_tokens import LossOn
from intern.errors import UserError
from intern.paths import PROJECT, find

HUB = "hub:"  # begins the name of a dataset on the hub


@dataclass(frozen=True)
class DataConfig:
    """conf/data. A key that a group file leaves out has the value that it has in conf/data/train_jsonl.yaml; no file has a sample of its own."""

    train_file: str | list[str]
    eval_file: str | list[str] | None = AUTO
    context: str = AUTO
    num_proc: int | None = None
    system_prompt: str | None = AUTO
    sample: dict[str, str] | None = None  # what "auto" means for the sample's own training file
    format: str = AUTO
    columns: dict[str, str] | None = None
    chat_template: str | None = None
    template_kwargs: dict[str, Any] | None = None
    loss_on: LossOn = "all"
    eval_share: float = 0.0
    weights: list[float] | None = None
    max_rows: int | None = None
    seed: int = 42
    split: str = "train"
    eval_split: str = "test"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False

    @property
    def train_files(self) -> list[str]:
        """data.train_file as a list."""
        return [self.train_file] if isinstance(self.train_file, str) else self.train_file

    @property
    def eval_files(self) -> list[str]:
        """data.eval_file as a list; empty without one."""
        return [self.eval_file] if isinstance(self.eval_file, str) else self.eval_file or []

    @property
    def evaluates(self) -> bool:
        """Whether there are golden rows, in a file of their own or held out of the training rows."""
        return bool(self.eval_file) or self.eval_share > 0

    @property
    def rows(self) -> RowSettings:
        """How a row is read."""
        return RowSettings(self.format, self.columns or {}, self.context != "never")


def resolved(data: DataConfig) -> DataConfig:
    """Replace `auto`: the sample's golden file, context mode and system prompt belong to the sample's training file, and to no other.

    Raises:
        UserError: values that contradict each other, or are out of range.
    """
    if not data.train_files:
        raise UserError("data.train_file=[]: give at least one file")
    sample = data.sample if data.sample and _is_sample(data) else {}
    eval_file, system_prompt = data.eval_file, data.system_prompt
    if not 0 <= data.eval_share < 1:
        raise UserError(
            f"data.eval_share={data.eval_share}: must be at least 0 and below 1; it is a share of the documents"
        )
    if eval_file == AUTO:
        eval_file = sample.get("eval_file") if not data.eval_share else None
    elif eval_file and data.eval_share:
        raise UserError("data.eval_share: data.eval_file is given too: keep one of them")
    if system_prompt == AUTO:
        system_prompt = sample.get("system_prompt")
    checked_text(system_prompt, "data.system_prompt")
    context = sample.get("context", "never") if data.context == AUTO else data.context
    if data.weights is not None:
        if len(data.weights) != len(data.train_files):
            raise UserError(
                f"data.weights={data.weights}: must have one weight per entry of data.train_file, which has {len(data.train_files)}"
            )
        if min(data.weights) <= 0:
            raise UserError(f"data.weights={data.weights}: each must be above 0; leave the file out instead")
    if data.max_rows is not None and data.max_rows < 1:
        raise UserError(f"data.max_rows={data.max_rows}: must be at least 1, or null for all")
    if data.streaming and data.max_rows is None:
        raise UserError("data.streaming=true needs data.max_rows: how many rows to take from the start of the dataset")
    return replace(data, eval_file=eval_file, context=context, system_prompt=system_prompt or "", sample=None)


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """conf/data as a run stores it, with the keys that it lacks if it is from before there were such keys."""
    defaults = {
        one.name: one.default for one in fields(DataConfig) if one.default is not MISSING and one.name != "sample"
    }
    return {**defaults, **values}


def _is_sample(data: DataConfig) -> bool:
    """Whether the only training file is the one that ships with the project, not another one of the same name."""
    assert data.sample is not None
    files = data.train_files
    shipped = (PROJECT / data.sample.get("train_file", "")).resolve()
    return len(files) == 1 and not files[0].startswith(HUB) and find(files[0]) == shipped
