"""The list of kernels that replace forward passes during training: in which order they are installed, and how they are undone.

To add a kernel, write its module and add one entry to `KERNELS`. An entry that does not fit a model steps aside.

`InternTrainer` installs the list at the beginning of its training loop and uninstalls everything when the loop ends, however it ends:
evaluation of the trained model and the next job of a sweep see the library's own forward passes.

Everything that replaces a forward pass, from the inside out:

1. transformers: Liger's kernels replace `forward` of norms and MLPs at the beginning of `Trainer.train()`, before the training loop.
   The list must therefore be installed inside the loop: installed earlier, Liger's forms would hide ours.
2. `KERNELS`, in this order.
3. The memory plan (intern/memory/apply.py), which wraps what is there by then: checkpointing functions of layers, then `forward` of
   MLPs (tiled), then `forward` of whole layers (CUDA graphs). It registers its `undo` with `InstalledKernels.on_uninstall`.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from intern.kernels import last_mlp, lm_head, lora_linear, rms_norm

log = logging.getLogger(__name__)


class Installed(Protocol):
    """A kernel that is installed in a model; its other attributes are its own."""

    def undo(self) -> None:
        """Restore the forward passes that were there before. A second call does nothing."""


@dataclass(frozen=True)
class Kernel:
    """One entry of the list.

    Args:
        name: key in `InstalledKernels`.
        applies: whether the kernel fits the model (a PEFT model, or any model with decoder layers).
        install: replaces the forward passes of modules inside the model.
        with_router_loss: False if the kernel must not be used for mixture-of-experts models that add a loss of their routers:
            it would change which positions the routers see, or leave out the output that carries the loss.
    """

    name: str
    applies: Callable[[Any], bool]
    install: Callable[[Any], Installed]
    with_router_loss: bool = True


KERNELS = (
    # Linear4bit.forward and PEFT's lora.Linear4bit.forward: innermost, so the order among the others does not matter to it.
    Kernel("lora_linear", lora_linear.applies, lora_linear.fuse_adapters),
    # forward of the last layer's MLP: around Liger's.
    Kernel("last_mlp", last_mlp.applies, last_mlp.ScoredOnly, with_router_loss=False),
    # forward of the causal language model: around TRL's fused head, which SFTTrainer.__init__ put there.
    Kernel("lm_head", lm_head.applies, lm_head.score_positions, with_router_loss=False),
    # forward of frozen norms: after Liger's, which each falls back to.
    Kernel("rms_norm", rms_norm.applies, rms_norm.fuse_norms),
)


class InstalledKernels:
    """The kernels of `KERNELS` that are installed at the moment, by name; empty outside of training."""

    def __init__(self) -> None:
        self._installed: dict[str, Installed] = {}
        self._undo = contextlib.ExitStack()

    def get(self, name: str) -> Any:
        """Return the installed kernel, or None if it does not fit the model or nothing trains."""
        return self._installed.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._installed

    @contextlib.contextmanager
    def installed(self, model: torch.nn.Module, has_router_loss: bool = False) -> Iterator[None]:
        """Install every kernel that fits `model`; undo them, and what `on_uninstall` was given, when the block ends or fails."""
        with contextlib.ExitStack() as self._undo:
            self._undo.callback(self._installed.clear)
            for kernel in KERNELS:
                if (has_router_loss and not kernel.with_router_loss) or not kernel.applies(model):
                    log.debug("kernel %s steps aside", kernel.name)
                    continue
                self._installed[kernel.name] = installed = kernel.install(model)
                self._undo.callback(installed.undo)
            yield

    def on_uninstall(self, undo: Callable[[], None]) -> None:
        """Call `undo` when the kernels are uninstalled, before them: it belongs to something that wraps their forward passes."""
        self._undo.callback(undo)
