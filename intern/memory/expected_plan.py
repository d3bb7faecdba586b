"""The estimated peaks of a training step and a card's memory -> the memory plan that a run on this card will most probably measure."""

from intern.memory.estimate import TrainingPeak
from intern.memory.plan import MemoryPlan, room_for_unpacked, usable


def expected_plan(
    peak: TrainingPeak, budget: int, tokens: int, checkpointing: object, dense: float, attends_once: bool
) -> MemoryPlan:
    """Go through the forms in the order in which a run tries them (intern/memory/measure.py), with estimates instead of measured peaks.

    CUDA graphs are left out: whether they pay is known only when they are timed.

    Args:
        peak: of a step on the largest batch.
        budget: bytes of GPU memory that the run may use.
        tokens: of the largest batch.
        checkpointing: trainer.activation_checkpointing: "auto", True (every layer) or False (none).
        dense: bytes of all weights that can be kept dequantized; 0 if none can.
        attends_once: whether results of attention are stored once layer inputs are in host memory.

    Returns:
        The plan; its `peak` is above its usable budget if the run does not fit.
    """
    layers, most = peak.layers, usable(budget)
    if checkpointing is False:
        return MemoryPlan(layers, 0, int(peak.kept), budget, tokens=tokens)
    if checkpointing == "auto":
        if peak.kept <= most:
            unpacked = int(max(0, min(room_for_unpacked(budget, peak.kept), dense)))
            return MemoryPlan(layers, 0, int(peak.kept) + unpacked, budget, unpacked=unpacked, tokens=tokens)
        for kept in range(layers - 1, -1, -1):
            if peak.with_kept(kept) <= most:
                return MemoryPlan(layers, layers - kept, int(peak.with_kept(kept)), budget, tokens=tokens)
    if peak.offloaded <= most or checkpointing is True:
        return MemoryPlan(layers, layers, int(peak.offloaded), budget, True, attends_once, tokens=tokens)
    return MemoryPlan(layers, layers, int(peak.tiled), budget, True, attends_once, tiled=True, tokens=tokens)


def fits(plan: MemoryPlan) -> bool:
    """Whether the plan's peak stays below what a step may use."""
    return plan.peak <= usable(plan.budget)
