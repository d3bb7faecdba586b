"""A memory plan that ran out of GPU memory -> the next one, which needs less."""

from dataclasses import replace

from intern.errors import RunError
from intern.memory.plan import MemoryPlan


def safer_plan(plan: MemoryPlan, can_offload: bool) -> MemoryPlan:
    """Return the plan that gives up one more thing.

    In this order: CUDA graphs, dequantized weights, half of the layers that keep their activations (again and again), then inputs in
    host memory, then tiled MLPs.

    Args:
        plan: the plan in whose effect memory ran out.
        can_offload: False for models whose layers must run in the library's form of checkpointing.

    Raises:
        RunError: nothing is left to give up.
    """
    kept = plan.layers - plan.checkpointed
    if plan.replayed:
        return replace(plan, replayed=False)
    if plan.unpacked:
        return replace(plan, unpacked=0)
    if kept:
        return replace(plan, checkpointed=plan.layers - kept // 2)
    if not plan.offloaded and can_offload:
        return replace(plan, offloaded=True)
    if plan.offloaded and not plan.tiled:
        return replace(plan, tiled=True)
    raise RunError(
        "GPU memory ran out although every memory-saving option is in use: lower trainer.per_device_train_batch_size, "
        "then trainer.max_length, or stop other programs that use the GPU"
    )
