"""A composed training configuration and a card that is not here -> what the run would take on it: memory, steps, hours, price."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from intern.cards import Card, find_card
from intern.errors import UserError
from intern.inspection.doctor_pieces import DoctorPieces
from intern.inspection.planned_rows import PlannedRows, count_batches
from intern.inspection.published_shapes import SHAPES
from intern.memory.estimate import TrainingPeak, saved_elements, training_peak
from intern.training.plan import piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from intern.data.sources import RowSet
    from intern.memory.plan import MemoryPlan
    from intern.memory.speed import Weights
    from intern.model.base import Base
    from intern.model.precision import Precision

_TOY = "data/tiny_llama3"  # its chat template is Llama 3's
_HOUR = 3600  # seconds


@dataclass(frozen=True)
class PlannedRun:
    """What a run would take on a card.

    Args:
        card: the card.
        memory: the expected memory plan.
        is_enough: whether it fits into the card's memory.
        rows: the batches of one epoch.
        steps: optimizer steps.
        per_epoch: optimizer steps of one epoch.
        batches: batches per optimizer step.
        seconds: of a batch; None where nothing was measured that an estimate could stand on.
        price_per_hour: what an hour costs; None if nobody said.
    """

    card: Card
    memory: "MemoryPlan"
    is_enough: bool
    rows: PlannedRows
    steps: int
    per_epoch: int
    batches: int
    seconds: float | None
    price_per_hour: float | None

    @property
    def hours(self) -> float | None:
        """Hours of training, without start-up and scoring; None if the run does not fit or its speed is unknown."""
        return self.steps * self.batches * self.seconds / _HOUR if self.is_enough and self.seconds else None


def read_own_keys(cfg: DictConfig) -> tuple[Card | None, float | None]:
    """Return the card of `gpu` and the price of `price_per_hour`.

    Raises:
        UserError: an unknown card, a price that is none or that has no card, or a run on the CPU.
    """
    price = cfg.price_per_hour
    if price is not None and (
        isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < float("inf")
    ):
        raise UserError(f"price_per_hour={price}: must be what an hour of the card costs, such as 0.35")
    if cfg.gpu is None:
        if price is not None:
            raise UserError("price_per_hour: needs the card that it is the price of, as in gpu=t4")
        return None, None
    card = find_card(cfg.gpu)
    if cfg.trainer.get("use_cpu") is True:
        raise UserError(
            f"gpu={card.key} plans a run on a GPU, but trainer.use_cpu is true: leave gpu out, or use trainer=t4_min100"
        )
    return card, price


class CardPieces(DoctorPieces):
    """The pieces of a run on a card that need not be in this machine. Neither this machine's GPU nor any weights are looked at.

    Args:
        cfg: the composed conf/doctor.yaml.
        card: the card.
    """

    def __init__(self, cfg: DictConfig, card: Card) -> None:
        super().__init__(cfg)
        self.card = card

    @piece
    def precision(self) -> "Precision":
        """What training computes in on the card."""
        from intern.model.precision import plan_for_gpu

        _, *keys = self.precision_keys
        return plan_for_gpu(f"{self.card.name} (gpu={self.card.key})", self.card.has_bf16, *keys)

    @piece
    def configured_args(self) -> "SFTConfig":
        """TRL's arguments as configured, without a precision or kernels that this machine may lack."""
        import torch
        from omegaconf import OmegaConf

        from intern.model.precision import Precision
        from intern.training.arguments import build_training_args

        node = OmegaConf.create(self.trainer | {"use_liger_kernel": False})
        precision = Precision("cuda", torch.float32, fp16=False, bf16=False)
        return build_training_args(node, self.run, precision, self.cfg.seed, evaluates=self.data.evaluates)

    @piece
    def found_base(self) -> "tuple[Base, str]":
        """The base model, and why its configuration cannot be read here if its published shape stands in for it, else an empty text."""
        from intern.model.base import Base

        _ = self.online
        try:
            return Base(self.cfg.model), ""
        except UserError as error:
            name = str(self.cfg.model.get("pretrained_model_name_or_path"))
            if name not in SHAPES:
                raise
            from transformers import AutoConfig

            return Base(self.cfg.model, AutoConfig.for_model(**SHAPES[name])), str(error).partition(": ")[2]

    @piece
    def base(self) -> "Base":
        """The base model: its files' configuration, or the shape that it was published with."""
        return self.found_base[0]

    @piece
    def own_tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The base's tokenizer; None if its files are not here and its published shape is used."""
        try:
            return self.base.tokenizer()
        except UserError:
            if self.base.name not in SHAPES:
                raise
        return None

    @piece
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base's tokenizer, or the toy model's, for the form of a row only."""
        from omegaconf import OmegaConf

        from intern.data.chat_template import choose_template
        from intern.model.base import Base

        tokenizer = self.own_tokenizer or Base(OmegaConf.create({"pretrained_model_name_or_path": _TOY})).tokenizer()
        choose_template(tokenizer, self.data.chat_template)
        return tokenizer

    @piece
    def read_rows(self) -> "tuple[RowSet, RowSet | None]":
        """The training rows and the golden rows, as text."""
        return self.located.read()

    @piece
    def planned_rows(self) -> PlannedRows:
        """The batches of the run."""
        own = self.own_tokenizer is not None
        return count_batches(self.read_rows[0], self.data, self.tokenizer, self.prompt, self.args, own)

    @piece
    def fused(self) -> bool:
        """Whether Liger's kernels are used: on the machine with the card they are taken to be installed."""
        return self.trainer.get("use_liger_kernel") is not False

    @piece
    def peak(self) -> TrainingPeak:
        """The estimated peak of a step on the largest batch."""
        tokens = self.planned_rows.largest
        return training_peak(
            self.sizes, tokens, self.stored_dtype.itemsize, self.fused, self.state_bytes, cudnn=self.card.is_hopper
        )

    @piece
    def weights(self) -> "Weights":
        """What a token is multiplied with."""
        from intern.memory.speed import Weights
        from intern.model.quant import FourBit, stored_quantization

        skeleton, sizes = self.base.skeleton, self.sizes
        embedded: Any = skeleton.get_input_embeddings()
        head: Any = skeleton.get_output_embeddings()
        outside = {id(one.weight) for one in (embedded, head) if one is not None}
        quant = stored_quantization(self.base.config) or self.quant
        quantized = 0
        if isinstance(quant, FourBit):
            quantized = sum(one.in_features * one.out_features for one in quant.layers(quant.converted(skeleton)))
        text = self.base.config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return Weights(
            layers=sizes.layers,
            matrices=sum(p.numel() for p in skeleton.parameters() if p.ndim == 2 and id(p) not in outside),
            quantized=quantized,
            head=embedded.weight.numel(),
            trainable=sizes.trainable,
            queries=text.num_attention_heads * size,
            elements=saved_elements(sizes, self.fused),
        )

    @piece
    def planned(self) -> PlannedRun:
        """The run on the card."""
        from intern.memory.expected_plan import expected_plan, fits
        from intern.memory.plan import LONG_ROW_TOKENS
        from intern.memory.speed import Batch, Rates, batch_seconds
        from intern.training.steps import steps_of_run

        card, rows, args = self.card, self.planned_rows, self.args
        checkpointing = self.trainer.get("activation_checkpointing")
        attends_once = card.is_hopper and rows.row >= LONG_ROW_TOKENS
        dense = self.stored_dtype.itemsize * self.weights.quantized
        plan = expected_plan(self.peak, card.budget, rows.largest, checkpointing, dense, attends_once)
        seconds = None
        rate = card.fp16 if self.precision.fp16 else card.bf16 if self.precision.bf16 else None
        if rate is not None and not self.has_experts:
            rates = Rates(rate * 1e12, card.bandwidth * 1e9, card.is_hopper)
            seconds = batch_seconds(self.weights, Batch(rows.batch, rows.row, rows.scored), plan, rates)
        steps, per_epoch = steps_of_run(rows.units, args, self.rules.min_steps)
        _, price = read_own_keys(self.cfg)
        batches = args.gradient_accumulation_steps
        return PlannedRun(card, plan, fits(plan), rows, steps, per_epoch, batches, seconds, price)

    @piece
    def has_experts(self) -> bool:
        """Whether the base is a mixture of experts, whose speed was never measured."""
        text = self.base.config.get_text_config()
        return any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
