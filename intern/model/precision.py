"""The device and the dtypes that a run computes in on this machine."""

import logging
from dataclasses import dataclass

import torch

from intern.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """Device and dtypes of one run.

    Adapters are always float32: GradScaler cannot unscale 16-bit gradients, and small updates vanish in bfloat16.

    Attributes:
        device: "cuda" or "cpu".
        dtype: of weights that are not quantized, and of matmuls with quantized ones.
        fp16, bf16: SFTConfig's switches (autocast; fp16 with loss scaling).
    """

    device: str
    dtype: torch.dtype
    fp16: bool
    bf16: bool

    def __str__(self) -> str:
        threads = torch.get_num_threads()
        cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        name = torch.cuda.get_device_name() if self.device == "cuda" else cpu
        return f"{name}: {self.in_words}"

    @property
    def in_words(self) -> str:
        """The dtypes for a person, without the device."""
        mixed = "fp16 with loss scaling" if self.fp16 else "bf16" if self.bf16 else "full"
        return f"{mixed} precision, computing in {str(self.dtype).removeprefix('torch.')}, adapters in float32"


def plan_training(use_cpu: bool, fp16: bool | None, bf16: bool | None, compute_dtype: torch.dtype | None) -> Precision:
    """Return the precision of a training run on this machine.

    Args:
        use_cpu: trainer.use_cpu.
        fp16, bf16: trainer.fp16 and trainer.bf16. None: the GPU decides; both False: full precision.
        compute_dtype: quant.bnb_4bit_compute_dtype; None if the quantization chooses none.

    Raises:
        UserError: no GPU, a precision that the GPU lacks, or keys that contradict each other.
    """
    check_training_precision(use_cpu, fp16, bf16, compute_dtype)
    if use_cpu:
        dtype = torch.bfloat16 if bf16 else compute_dtype or torch.float32
        return Precision("cpu", dtype, fp16=False, bf16=bool(bf16))
    if not torch.cuda.is_available():
        raise UserError("no CUDA GPU found, and trainer.use_cpu is false: experiment=tiny_cpu runs everything on a CPU")
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # with emulation, a T4 would have it too
    return plan_for_gpu(torch.cuda.get_device_name(), has_bf16, fp16, bf16, compute_dtype)


def plan_for_gpu(
    name: str, has_bf16: bool, fp16: bool | None, bf16: bool | None, compute_dtype: torch.dtype | None
) -> Precision:
    """Return the precision of a training run on a GPU, which need not be in this machine.

    Args:
        name: of the GPU, for messages.
        has_bf16: whether it computes in bfloat16.
        fp16, bf16, compute_dtype: as for `plan_training`.

    Raises:
        UserError: a precision that the GPU lacks, or keys that contradict each other.
    """
    if bf16 and not has_bf16:
        raise UserError(f"trainer.bf16=true, but {name} has no bfloat16: use trainer=t4_min100 quant=nf4_fp16")
    if not fp16 and not bf16 and None in (fp16, bf16):
        bf16 = has_bf16 and bf16 is None
        fp16 = not bf16 and fp16 is None
    dtype = torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32
    _check_agreement(fp16, bf16, compute_dtype)  # what the GPU decided must agree too
    return Precision("cuda", dtype, fp16=bool(fp16), bf16=bool(bf16))


def check_training_precision(
    use_cpu: bool, fp16: bool | None, bf16: bool | None, compute_dtype: torch.dtype | None
) -> None:
    """Raise UserError for keys that contradict each other on any machine. The arguments are those of `plan_training`."""
    if fp16 and bf16:
        raise UserError("trainer.fp16 and trainer.bf16 are both true: set one of them to false")
    if not use_cpu:
        _check_agreement(fp16, bf16, compute_dtype)
        return
    if fp16:
        raise UserError("trainer.fp16=true needs a GPU: use trainer=cpu_min100 on a CPU")
    if compute_dtype == torch.float16:
        raise UserError(
            "quant.bnb_4bit_compute_dtype=float16 would train without loss scaling on a CPU: "
            "set it to float32 (experiment=tiny_cpu does)"
        )


def _check_agreement(fp16: bool | None, bf16: bool | None, compute_dtype: torch.dtype | None) -> None:
    """Raise UserError if quantized matmuls would compute in another dtype than the rest."""
    dtype = torch.float16 if fp16 else torch.bfloat16 if bf16 else None
    if None not in (compute_dtype, dtype) and compute_dtype != dtype:
        wanted, quant = ("fp16", "nf4_fp16") if fp16 else ("bf16", "nf4_bf16")
        name = str(compute_dtype).removeprefix("torch.")
        raise UserError(f"quant.bnb_4bit_compute_dtype={name} contradicts trainer.{wanted}=true: use quant={quant}")


def plan_inference(compute_dtype: torch.dtype | None) -> Precision:
    """Return the precision to answer in: the run's own if this machine has it, float32 without a GPU.

    Args:
        compute_dtype: quant.bnb_4bit_compute_dtype of the run; None if its quantization chooses none.
    """
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if compute_dtype is None or (compute_dtype == torch.bfloat16 and not has_bf16):
            compute_dtype = torch.bfloat16 if has_bf16 else torch.float16
        return Precision("cuda", compute_dtype, fp16=False, bf16=False)
    return Precision("cpu", torch.float32, fp16=False, bf16=False)
