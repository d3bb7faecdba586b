"""The pieces of a training plan as the doctor takes them: one by one, with what only the doctor needs to know."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from intern.errors import UserError
from intern.inspection.installation import answers, is_installed, missing_weights
from intern.memory.estimate import ModelSizes, TrainingPeak, training_peak
from intern.runs.directory import Run
from intern.training.plan import PlanPieces, piece

if TYPE_CHECKING:
    import torch

    from intern.model.base import Base

_OWN_KEYS = ("format", "run_dir", "gpu", "price_per_hour")  # of conf/doctor.yaml


class SkippedError(Exception):
    """A check needs something that another check, named here, has found to be bad."""


class DoctorPieces(PlanPieces):
    """What the checks share. Reading a piece raises what its builder or library raises."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg, Run(Path(cfg.run_dir)), _OWN_KEYS)
        self._went_offline = False

    def known(self, name: str, check: str) -> Any:
        """Return the piece `name`, which `check` reports on.

        Raises:
            SkippedError: it cannot be made, for a reason that `check` reports.
        """
        try:
            return getattr(self, name)
        except Exception as error:  # whatever it is, the named check shows it
            raise SkippedError(check) from error

    def restore_network(self) -> None:
        """Undo that the libraries were told to work offline."""
        if self._went_offline:
            from huggingface_hub import constants

            constants.HF_HUB_OFFLINE = False

    @piece
    def is_folder(self) -> bool:
        """Whether the model is a local folder, for which the hub is not needed."""
        from intern.paths import find

        folder = find(str(self.cfg.model.get("pretrained_model_name_or_path")))
        return folder is not None and folder.is_dir()

    @piece
    def offline_by_choice(self) -> bool:
        """Whether the user has set HF_HUB_OFFLINE."""
        from huggingface_hub import constants

        return bool(constants.HF_HUB_OFFLINE)

    @piece
    def online(self) -> bool:
        """Whether the hub answers. If not, the libraries are told so: otherwise each would retry for minutes."""
        from huggingface_hub import constants

        if self.is_folder or self.offline_by_choice:
            return not self.offline_by_choice
        if not answers(constants.ENDPOINT):
            constants.HF_HUB_OFFLINE = self._went_offline = True
        return not self._went_offline

    @piece
    def base(self) -> "Base":
        """The base model, found; asked for only after the network was tried."""
        from intern.model.base import Base

        _ = self.online
        return Base(self.cfg.model)

    @piece
    def adapted(self) -> Any:
        """The model with its adapter, without weights."""
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return get_peft_model(AutoModelForCausalLM.from_config(self.base.config), self.adapter)

    @piece
    def download(self) -> int:
        """Bytes of weights that are still to be downloaded."""
        return missing_weights(self.base.name, self.cfg.model.get("revision"))

    @piece
    def state_bytes(self) -> int:
        """Bytes of optimizer states per trainable parameter."""
        return 2 if "8bit" in str(self.trainer.get("optim", "")) else 8

    @piece
    def stored_dtype(self) -> "torch.dtype":
        """The dtype of weights that are not quantized."""
        import torch

        try:
            return self.precision.dtype
        except UserError:  # there is no such GPU here: assume what the configuration asks for
            return getattr(self.quant, "compute_dtype", None) or torch.float16

    @piece
    def sizes(self) -> ModelSizes:
        """The sizes of the model with its adapter, for estimates."""
        from peft.tuners.lora import LoraLayer

        from intern.model.sizes import weight_bytes

        text = self.base.config.get_text_config()
        weights = weight_bytes(self.base, self.quant, self.stored_dtype)
        if weights is None:
            raise UserError("model: its own quantization has an unknown size")
        heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        adapted = {
            name: int(layer.in_features or 0)
            for name, layer in self.adapted.named_modules()
            if isinstance(layer, LoraLayer)
        }
        return ModelSizes(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            key_value=heads * size,
            weights=weights,
            trainable=self.adapted.get_nb_trainable_parameters()[0],
            adapted_inputs=sum(adapted.values()) / text.num_hidden_layers,
            adapted_in_mlp=sum(size for name, size in adapted.items() if ".mlp." in name) / text.num_hidden_layers,
        )

    @piece
    def peak(self) -> TrainingPeak:
        """The estimated peak of a training step on its device."""
        on_gpu = not self.on_cpu
        tokens = int(self.configured_args.max_length or 0) * self.configured_args.per_device_train_batch_size
        fused = on_gpu and self.trainer.get("use_liger_kernel") is not False and is_installed("liger-kernel")
        return training_peak(self.sizes, tokens, 2 if on_gpu else self.stored_dtype.itemsize, fused, self.state_bytes)
