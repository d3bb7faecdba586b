"""A composed configuration -> everything that a training run needs, checked before the model's weights load.

Every command that checks a configuration uses the pieces below, so that all of them come to the same verdict: training, the preview and
intern.verify take all pieces in ORDER, the doctor takes them one by one. The doctor must also run if a library does not load, so nothing
heavy is imported at the top of this module: each piece imports what it needs. Over 300 lines, because a piece may use any other one.
"""

import copy
import functools
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from omegaconf import DictConfig

from intern.errors import UserError
from intern.runs.directory import Run

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from intern.data.files import DataFile
    from intern.data.prepare import Located, Prepared
    from intern.data.prompt import Prompt
    from intern.data.settings import DataConfig
    from intern.data.tokenize import Tokenized
    from intern.memory.callback import FitMemory
    from intern.model.attention import Attention
    from intern.model.base import Base
    from intern.model.precision import Precision
    from intern.model.quant import Quantization
    from intern.training.arguments import StepRules
    from intern.training.model_rules import Shape

log = logging.getLogger(__name__)
T = TypeVar("T")

# The pieces that the configuration alone decides, and all pieces, the cheapest first.
CONFIGURATION = ("value_rules", "logger", "rules", "lora", "quant", "data", "configured_args")
ORDER = (
    *CONFIGURATION,
    *(
        "located",
        "precision_rules",
        "precision",
        "base",
        "room_for_weights",
        "tokenizer",
        "model_rules",
        "adapter_rules",
    ),
    *("adapter", "args", "prompt", "rows", "build_memory"),
)


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that is known to be right before the model's weights are loaded."""

    rules: "StepRules"
    args: "SFTConfig"
    build_memory: (
        "Callable[[Any], FitMemory] | None"  # of a trainer; on a GPU, unless trainer.activation_checkpointing=false
    )
    lora: "LoraConfig"
    quant: "Quantization | None"
    precision: "Precision"
    base: "Base"
    tokenizer: "PreTrainedTokenizerBase"
    prompt: "Prompt"
    logger: dict[str, Any]
    data: "Prepared"

    @property
    def files(self) -> list["DataFile"]:
        """The data files that the run depends on."""
        return self.data.files

    @property
    def train(self) -> "Tokenized":
        """The training rows as tokens."""
        return self.data.train_tokens

    @property
    def eval_rows(self) -> "Dataset | None":
        """The golden rows as text."""
        return self.data.golden.rows if self.data.golden is not None else None

    @property
    def eval(self) -> "Tokenized | None":
        """The golden rows as tokens."""
        return self.data.golden_tokens


def build_plan(cfg: DictConfig, run: Run) -> TrainingPlan:
    """Check everything that can be checked without the model's weights, the cheapest first.

    Args:
        cfg: the composed conf/train.yaml.
        run: the run directory; nothing is written to it.

    Raises:
        UserError: bad input.
    """
    pieces = PlanPieces(cfg, run)
    pieces.take_all()
    return TrainingPlan(
        rules=pieces.rules,
        args=pieces.args,
        build_memory=pieces.build_memory,
        lora=pieces.adapter,
        quant=pieces.quant,
        precision=pieces.precision,
        base=pieces.base,
        tokenizer=pieces.tokenizer,
        prompt=pieces.prompt,
        logger=pieces.logger,
        data=pieces.rows,
    )


class piece(Generic[T]):  # a decorator, like property
    """A property that is computed once. An exception is remembered too, and raised on every access without another attempt."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __get__(self, pieces: "PlanPieces", owner: type) -> T:
        name = self._make.__name__
        if name not in pieces.made:
            try:
                pieces.made[name] = self._make(pieces), None
            except Exception as error:  # raised below, and to everything else that reads this piece
                pieces.made[name] = None, error
        value, failure = pieces.made[name]
        if failure is not None:
            raise failure
        return value


class PlanPieces:
    """The pieces of a training plan, each made when it is first read. Reading one raises UserError if its input is bad.

    Args:
        cfg: the composed configuration of a command whose groups are those of conf/train.yaml.
        run: where training would write.
        own_keys: the command's own top-level keys, which conf/train.yaml does not have.
        asks_gpu: whether this machine's GPU counts. False leaves it untouched, and plans nothing that depends on it: whether there is one,
            whether it has bfloat16, and whether the weights fit.
    """

    def __init__(self, cfg: DictConfig, run: Run, own_keys: Collection[str] = (), asks_gpu: bool = True) -> None:
        self.cfg = cfg
        self.run = run
        self.made: dict[str, tuple[Any, Exception | None]] = {}
        self._own_keys = own_keys
        self._asks_gpu = asks_gpu

    def take_all(self) -> None:
        """Make every piece, in ORDER; the first bad one raises UserError."""
        from intern.model.preload import library_output

        with library_output():
            for name in ORDER:
                getattr(self, name)

    def take_configuration(self) -> None:
        """Make the pieces that the configuration alone decides; the first bad one raises UserError."""
        for name in CONFIGURATION:
            getattr(self, name)

    # --- What the configuration alone decides ---

    @piece
    def values(self) -> dict[str, Any]:
        """The groups and top-level keys as built-in types."""
        from intern.config.build import plain

        return {name: value for name, value in plain(self.cfg).items() if name not in self._own_keys}

    @piece
    def value_rules(self) -> None:
        """The rules that the values must keep (intern/training/rules.py)."""
        from intern.config.secrets import check_environment
        from intern.training.rules import check_values

        check_values(self.values)
        check_environment(self.cfg)

    @piece
    def logger(self) -> dict[str, Any]:
        """The values of conf/logger; empty for none."""
        from intern.training.trackers import check_logger

        return check_logger(self.cfg.logger)

    @piece
    def rules(self) -> "StepRules":
        """Our own keys of conf/trainer."""
        from intern.training.arguments import build_rules

        return build_rules(self.cfg.trainer)

    @piece
    def lora(self) -> "LoraConfig":
        """The adapter's configuration."""
        from intern.model.lora import build_lora

        return build_lora(self.cfg.lora)

    @piece
    def quant(self) -> "Quantization | None":
        """The quantization of the base model."""
        from intern.model.quant import build_quant

        return build_quant(self.cfg.quant)

    @piece
    def data(self) -> "DataConfig":
        """The values of conf/data, without any `auto`."""
        from intern.config.build import build, plain
        from intern.data.settings import DataConfig, resolved

        return resolved(build(DataConfig, plain(self.cfg.data), "data"))

    @piece
    def trainer(self) -> dict[str, Any]:
        """The values of conf/trainer."""
        from intern.config.build import plain

        return plain(self.cfg.trainer)

    @piece
    def on_cpu(self) -> bool:
        """Whether training is configured to run on the CPU."""
        return bool(self.trainer.get("use_cpu"))

    @piece
    def configured_args(self) -> "SFTConfig":
        """TRL's arguments as configured; those of a CPU if no precision can be planned, which is an error of `precision` alone."""
        import torch

        from intern.model.precision import Precision
        from intern.training.arguments import build_training_args

        try:
            precision = self.precision
        except UserError:
            precision = Precision("cpu", torch.float32, fp16=False, bf16=False)
        return build_training_args(self.cfg.trainer, self.run, precision, self.cfg.seed, evaluates=self.data.evaluates)

    # --- What files, machine and model decide ---

    @piece
    def located(self) -> "Located":
        """The data files, found but not read."""
        from intern.data.prepare import located

        return located(self.data)

    @piece
    def precision_rules(self) -> None:
        """The rules that the keys of the precision must keep on any machine."""
        from intern.model.precision import check_training_precision

        check_training_precision(*self.precision_keys)

    @piece
    def precision(self) -> "Precision":
        """What training computes in: on this machine, or on a CPU if the GPU does not count."""
        import torch

        from intern.model.precision import Precision, plan_training

        if self._asks_gpu or self.on_cpu:
            return plan_training(*self.precision_keys)
        return Precision("cpu", torch.float32, fp16=False, bf16=False)

    @piece
    def base(self) -> "Base":
        """The base model, found; without weights."""
        from intern.model.base import Base

        return Base(self.cfg.model)

    @piece
    def room_for_weights(self) -> None:
        """Raises UserError if the weights alone are too large for the device."""
        from intern.model.sizes import check_fit

        if self._asks_gpu or self.on_cpu:
            check_fit(self.base, self.quant, self.precision)

    @piece
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base model's tokenizer, with the one chat template that is trained."""
        from intern.data.chat_template import choose_template

        tokenizer = self.base.tokenizer()
        choose_template(tokenizer, self.data.chat_template)
        return tokenizer

    @piece
    def shape(self) -> "Shape":
        """The base model without weights."""
        from intern.training.model_rules import Shape

        return Shape(self.base.config, self.base.skeleton, self.tokenizer)

    @piece
    def model_rules(self) -> None:
        """The rules that the values must keep with this model (intern/training/model_rules.py)."""
        from intern.training.model_rules import check_model_rules

        check_model_rules(self.values, self.shape)

    @piece
    def adapter_rules(self) -> None:
        """The rules that the adapter must keep with this model (intern/training/model_rules.py)."""
        from intern.training.model_rules import check_adapter_rules

        check_adapter_rules(self.shape, self.lora)

    @piece
    def adapter(self) -> "LoraConfig":
        """The adapter's configuration for this model: not in the towers of other senses, and such that the run can be asked."""
        from intern.model.lora import limit_to_text
        from intern.runs.adapter import check_readable, names_of
        from intern.runs.patterns import without_patterns

        check_readable(limit_to_text(self.lora, self.base.skeleton), self.base.skeleton)
        # PEFT would match regular expressions without a time limit.
        modules, parameters = names_of(self.base.skeleton, self.lora)
        return limit_to_text(without_patterns(self.lora, modules, Path("lora"), parameters), self.base.skeleton)

    @piece
    def attention(self) -> "Attention":
        """How this model attends to rows of trainer.max_length tokens."""
        from intern.model.attention import choose_attention

        wanted = self.cfg.model.get("attn_implementation")
        return choose_attention(self.base.config, wanted, int(self.trainer["max_length"]))

    @piece
    def args(self) -> "SFTConfig":
        """TRL's arguments, without packing if this model cannot have it, and without padding if it can do without."""
        from intern.training.model_rules import batches_need_no_padding

        args, attention = copy.copy(self.configured_args), self.attention
        if attention.instead:
            log.info("attention: %s (%s)", attention.name or "the library's choice", attention.instead)
        if args.packing and not attention.packs:
            log.info("rows are not packed: %s cannot keep packed rows apart", self.base.config.model_type)
            args.packing = False
            args.dataset_kwargs = {"skip_prepare_dataset": True}
        args.padding_free = args.padding_free or batches_need_no_padding(self.values, lambda: attention)
        return args

    @piece
    def prompt(self) -> "Prompt":
        """The prompt of the tokenizer's own chat template."""
        from intern.data.prompt import Prompt

        data = self.data
        return Prompt.from_tokenizer(self.tokenizer, data.system_prompt or "", data.context, data.template_kwargs)

    @piece
    def rows(self) -> "Prepared":
        """The training and golden rows, as text and as tokens."""
        from intern.data.prepare import prepare

        return prepare(self.located, self.tokenizer, self.prompt, int(self.trainer["max_length"]))

    @piece
    def build_memory(self) -> "Callable[[Any], FitMemory] | None":
        """Makes, of a trainer, what decides on a GPU which layers recompute; None with trainer.activation_checkpointing=false."""
        from intern.memory.callback import FitMemory
        from intern.training.arguments import AUTO

        if not self.args.activation_checkpointing or self.precision.device != "cuda":
            return None
        every_layer = self.trainer["activation_checkpointing"] != AUTO
        return functools.partial(FitMemory, run=self.run, every_layer=every_layer, cuda_graphs=self.rules.cuda_graphs)

    @property
    def precision_keys(self) -> tuple[bool, bool | None, bool | None, Any]:
        """What decides the precision: whether a CPU trains, trainer.fp16, trainer.bf16 and the dtype of quantized products."""
        compute_dtype = self.quant.compute_dtype if self.quant is not None else None
        return self.on_cpu, self.trainer.get("fp16"), self.trainer.get("bf16"), compute_dtype
