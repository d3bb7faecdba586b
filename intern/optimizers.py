"""What bitsandbytes' optimizers leave in lists of the whole process."""

import bitsandbytes as bnb


def forget_optimizers() -> None:
    """Empties these lists once training is over: nothing that they hold would ever be freed.

    They hold the states of paged optimizers, which each later one would move to the GPU again, and the embeddings of every model that
    transformers has trained with an 8-bit one: 1 GiB of Llama-3-8B's.
    """
    bnb.functional.GlobalPageManager.get_instance().paged_tensors.clear()
    bnb.optim.GlobalOptimManager.get_instance().initialize()
