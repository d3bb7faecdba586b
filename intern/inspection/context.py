"""What the checks of a configuration share: the objects that training would build, made when they are first asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from intern.errors import UserError
from intern.inspection.installation import answers, is_installed, missing_weights
from intern.memory.estimate import ModelSizes, TrainingPeak, training_peak

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from intern.data.prompt import Prompt
    from intern.data.settings import DataConfig
    from intern.model.base import Base
    from intern.model.precision import Precision
    from intern.model.quant import Quantization


class NotKnownError(Exception):
    """What a check needs is what another check, named here, has found to be wrong."""


def fact(make: Callable[[Any], Any]) -> Any:
    """A property that is made once; what making it raises is raised each time, without a second try."""
    name = make.__name__

    def get(self: "Facts") -> Any:
        if name not in self.made:
            try:
                self.made[name] = make(self), None
            except Exception as error:  # kept, to be raised to every check that asks
                self.made[name] = None, error
        value, fault = self.made[name]
        if fault is not None:
            raise fault
        return value

    return property(get, doc=make.__doc__)


class Facts:
    """What checks share. An attribute raises what its library or builder raises; `known` turns that into a reference to the check of it."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.made: dict[str, tuple[Any, Exception | None]] = {}
        self._went_offline = False

    def known(self, name: str, check: str) -> Any:
        """The attribute `name`; NotKnownError where it cannot be had, for the reason that `check` tells."""
        try:
            return getattr(self, name)
        except Exception as error:  # whatever it is, the check that is named shows it
            raise NotKnownError(check) from error

    def leave_network(self) -> None:
        """Takes back that the libraries were told not to ask the hub."""
        if self._went_offline:
            from huggingface_hub import constants

            constants.HF_HUB_OFFLINE = False

    @fact
    def logger(self) -> dict[str, Any]:
        from intern.training.trackers import check_logger

        return check_logger(self.cfg.logger)

    @fact
    def trainer(self) -> dict[str, Any]:
        from intern.config.build import plain

        return plain(self.cfg.trainer)

    @fact
    def on_cpu(self) -> bool:
        return bool(self.trainer.get("use_cpu"))

    @fact
    def quant(self) -> "Quantization | None":
        from intern.model.quant import build_quant

        return build_quant(self.cfg.quant)

    @fact
    def data(self) -> "DataConfig":
        from intern.config.build import build, plain
        from intern.data.settings import DataConfig, resolved

        return resolved(build(DataConfig, plain(self.cfg.data), "data"))

    @fact
    def precision(self) -> "Precision":
        from intern.model.precision import plan_training

        compute_dtype = self.quant.compute_dtype if self.quant is not None else None
        return plan_training(self.on_cpu, self.trainer.get("fp16"), self.trainer.get("bf16"), compute_dtype)

    @fact
    def args(self) -> "SFTConfig":
        """The trainer's arguments; those that a CPU would have where no precision can be planned here."""
        import torch

        from intern.model.precision import Precision
        from intern.runs.directory import Run
        from intern.training.arguments import build_training_args

        try:
            precision = self.precision
        except UserError:
            precision = Precision("cpu", torch.float32, fp16=False, bf16=False)
        run = Run(Path(self.cfg.run_dir))
        return build_training_args(self.cfg.trainer, run, precision, self.cfg.seed, evaluates=self.data.evaluates)

    @fact
    def is_folder(self) -> bool:
        """Whether the model is a folder here, for which nobody has to be asked."""
        from intern.paths import find

        folder = find(str(self.cfg.model.get("pretrained_model_name_or_path")))
        return folder is not None and folder.is_dir()

    @fact
    def offline_by_wish(self) -> bool:
        from huggingface_hub import constants

        return bool(constants.HF_HUB_OFFLINE)

    @fact
    def online(self) -> bool:
        """Whether the hub answers; the libraries are not left to find out by trying again and again."""
        from huggingface_hub import constants

        if self.is_folder or self.offline_by_wish:
            return not self.offline_by_wish
        if not answers(constants.ENDPOINT):
            constants.HF_HUB_OFFLINE = self._went_offline = True
        return not self._went_offline

    @fact
    def base(self) -> "Base":
        from intern.model.base import Base

        _ = self.online
        return Base(self.cfg.model)

    @fact
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.base.tokenizer()

    @fact
    def prompt(self) -> "Prompt":
        from intern.data.prompt import Prompt

        return Prompt.from_tokenizer(
            self.tokenizer, self.data.system_prompt or "", self.data.context, self.data.template_kwargs
        )

    @fact
    def adapted(self) -> Any:
        """The model with its adapter, without weights."""
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        from intern.model.lora import build_lora

        with torch.device("meta"):
            return get_peft_model(AutoModelForCausalLM.from_config(self.base.config), build_lora(self.cfg.lora))

    @fact
    def download(self) -> int:
        """Bytes of weights that are still to be fetched."""
        return missing_weights(self.base.name, self.cfg.model.get("revision"))

    @fact
    def state_bytes(self) -> int:
        """Bytes of optimizer states for a trainable parameter."""
        return 2 if "8bit" in str(self.trainer.get("optim", "")) else 8

    @fact
    def peak(self) -> TrainingPeak:
        """What a training step takes on its device."""
        import torch
        from peft.tuners.lora import LoraLayer

        from intern.model.sizes import weight_bytes

        text = self.base.config.get_text_config()
        try:
            dtype, on_gpu = self.precision.dtype, self.precision.device == "cuda"
        except UserError:  # another machine's precision: what the configuration asks for
            dtype, on_gpu = getattr(self.quant, "compute_dtype", None) or torch.float16, True
        weights = weight_bytes(self.base, self.quant, dtype)
        if weights is None:
            raise UserError("model: its own quantization has a size that is not known here")
        heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        inputs = sum(int(layer.in_features or 0) for layer in self.adapted.modules() if isinstance(layer, LoraLayer))
        sizes = ModelSizes(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            key_value=heads * size,
            weights=weights,
            trainable=self.adapted.get_nb_trainable_parameters()[0],
            adapted_inputs=inputs / text.num_hidden_layers,
        )
        tokens = int(self.args.max_length or 0) * self.args.per_device_train_batch_size
        fused = on_gpu and self.trainer.get("use_liger_kernel") is not False and is_installed("liger-kernel")
        return training_peak(sizes, tokens, 2 if on_gpu else dtype.itemsize, fused, self.state_bytes)
