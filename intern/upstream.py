"""What other libraries leave behind in the process or print, put in order in one place."""

import logging
import sys
import warnings


def route_messages() -> None:
    """Warnings of transformers and TRL go through logging (so into train.log too); what only their developers can act on goes nowhere."""
    import datasets
    import transformers

    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    for module in ("transformers", "trl", "peft"):  # deprecations between these libraries
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    warnings.filterwarnings("ignore", message=".*use_liger_kernel.*", category=FutureWarning)
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # which of its backends for other hardware are not here
    # Said at every batch of the last step of a resumed run; nothing is gathered that had a remainder to drop.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def forget_optimizers() -> None:
    """Empties bitsandbytes' process-wide lists once training is over: nothing that they hold would ever be freed.

    They hold the states of paged optimizers, which each later one would move to the GPU again, and the embeddings of every model that
    transformers has trained with an 8-bit one: 1 GiB of Llama-3-8B's.
    """
    import bitsandbytes as bnb

    bnb.functional.GlobalPageManager.get_instance().paged_tensors.clear()
    bnb.optim.GlobalOptimManager.get_instance().initialize()
