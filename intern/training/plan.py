"""A composed configuration -> everything that a training run needs, checked before weights load."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from omegaconf import DictConfig
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from intern.config.build import build, plain
from intern.data.files import DataFile
from intern.data.prepare import Prepared, located, prepare
from intern.data.prompt import Prompt
from intern.data.settings import DataConfig
from intern.data.tokenize import Tokenized
from intern.memory.callback import FitMemory
from intern.model.attention import choose_attention
from intern.model.base import Base
from intern.model.lora import build_lora, limit_to_text
from intern.model.precision import Precision, plan_training
from intern.model.quant import Quantization, build_quant
from intern.model.sizes import check_fit
from intern.runs.directory import Run
from intern.training.arguments import AUTO, StepRules, build_rules, build_training_args
from intern.training.rules import Shape, batches_need_no_padding, check_shape, check_values
from intern.training.trackers import check_logger

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that is known to be right before the model's weights are touched."""

    rules: StepRules
    args: SFTConfig
    build_memory: (
        Callable[[Any], FitMemory] | None
    )  # of a trainer; on a GPU, unless trainer.activation_checkpointing=false
    lora: LoraConfig
    quant: Quantization | None
    precision: Precision
    base: Base
    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt
    logger: dict[str, Any]
    data: Prepared

    @property
    def files(self) -> list[DataFile]:
        """The data files that the run depends on."""
        return self.data.files

    @property
    def train(self) -> Tokenized:
        """The training rows as tokens."""
        return self.data.train_tokens

    @property
    def eval_rows(self) -> Dataset | None:
        """The golden rows as text."""
        return self.data.golden.rows if self.data.golden is not None else None

    @property
    def eval(self) -> Tokenized | None:
        """The golden rows as tokens."""
        return self.data.golden_tokens


def build_plan(cfg: DictConfig, run: Run) -> TrainingPlan:
    """Checks everything that can be checked without the model's weights, the cheapest first."""
    values = plain(cfg)
    check_values(values)
    logger = check_logger(cfg.logger)
    rules = build_rules(cfg.trainer)
    lora = build_lora(cfg.lora)
    quant = build_quant(cfg.quant)
    data = located(build(DataConfig, plain(cfg.data), "data"))
    trainer = values["trainer"]
    compute_dtype = quant.compute_dtype if quant is not None else None
    precision = plan_training(bool(trainer.get("use_cpu")), trainer.get("fp16"), trainer.get("bf16"), compute_dtype)
    args = build_training_args(cfg.trainer, run, precision, cfg.seed, evaluates=data.data.evaluates)
    base = Base(cfg.model)
    check_fit(base, quant, precision)
    tokenizer = base.tokenizer()
    shape = Shape(base.config, base.skeleton, tokenizer)
    check_shape(values, shape, lora)
    lora = limit_to_text(lora, base.skeleton)
    base.longest = int(trainer["max_length"])
    attention = choose_attention(base.config, cfg.model.get("attn_implementation"), base.longest)
    if attention.instead:
        log.info("attention: %s (%s)", attention.name or "the library's choice", attention.instead)
    if args.packing and not attention.packs:
        log.info("rows are not packed: %s cannot keep packed rows apart", base.config.model_type)
        args.packing = False
        args.dataset_kwargs = {"skip_prepare_dataset": True}
    args.padding_free = args.padding_free or batches_need_no_padding(values, lambda: shape)
    prompt = Prompt.from_tokenizer(
        tokenizer, data.data.system_prompt or "", data.data.context, data.data.template_kwargs
    )
    prepared = prepare(data, tokenizer, prompt, int(trainer["max_length"]))
    build_memory = None
    if args.activation_checkpointing and precision.device == "cuda":
        every_layer = trainer["activation_checkpointing"] != AUTO
        build_memory = functools.partial(FitMemory, run=run, every_layer=every_layer, cuda_graphs=rules.cuda_graphs)
    return TrainingPlan(
        rules=rules,
        args=args,
        build_memory=build_memory,
        lora=lora,
        quant=quant,
        precision=precision,
        base=base,
        tokenizer=tokenizer,
        prompt=prompt,
        logger=logger,
        data=prepared,
    )
