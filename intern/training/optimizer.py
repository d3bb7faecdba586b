"""trl.SFTConfig -> whether its optimizer and its schedule can be made here, tried on a small layer before any weights load."""

from typing import Any

import torch
from transformers import Trainer, get_scheduler
from trl import SFTConfig

from intern.errors import UserError

_SIDE = 400  # of the layer: with 160,000 weights it is large enough for optimizers that treat small tensors differently
_STEPS = 4  # of the schedule


def check_optimizer(args: SFTConfig, steps_here: bool) -> None:
    """Make the optimizer and the schedule of a small layer.

    Args:
        args: TRL's arguments.
        steps_here: whether to take a step too, which on a machine with a GPU would have to run there.

    Raises:
        UserError: a package that is missing, or a value that the optimizer or the schedule refuses.
    """
    layer = torch.nn.Linear(_SIDE, _SIDE, bias=False)
    name = getattr(args.optim, "value", args.optim)
    try:
        kind, values = Trainer.get_optimizer_cls_and_kwargs(args, layer)  # type: ignore[arg-type]  # any module has parameters
        values = {key: value for key, value in values.items() if key not in ("params", "model", "optimizer_dict")}
        optimizer = kind(layer.parameters(), **values)
        if steps_here:
            layer(torch.ones(1, _SIDE)).sum().backward()
            optimizer.step()
    except Exception as error:  # optimizers come from many packages
        key = f"trainer.optim_args={args.optim_args}" if args.optim_args else f"trainer.optim={name}"
        raise UserError(f"{key}: {_reason(error)}") from error
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=0,
            num_training_steps=_STEPS,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]  # a text is parsed by its class
        )
    except Exception as error:  # as above
        kind_of = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        key = f"trainer.lr_scheduler_kwargs={args.lr_scheduler_kwargs}" if args.lr_scheduler_kwargs else f"trainer.lr_scheduler_type={kind_of}"  # fmt: skip
        raise UserError(f"{key}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line of a library's message; a missing package is what most of them are about."""
    text: Any = " ".join(str(error).split())[:200] or type(error).__name__
    return f"cannot be made here ({text})" if isinstance(error, ImportError) else f"is refused ({text})"
