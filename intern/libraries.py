"""What the libraries print, put where our own messages go."""

import logging
import sys
import warnings

import datasets
import transformers


def route_messages() -> None:
    """Warnings of transformers and TRL go through logging (so into train.log too); what only their developers can act on goes nowhere."""
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
