"""When memory runs out, one thing after the other is given up."""

import pytest

from intern.errors import RunError
from intern.memory.plan import MemoryPlan
from intern.memory.recover import safer_plan


def given_up(plan, can_offload):
    """Every plan until nothing is left."""
    plans = []
    with pytest.raises(RunError, match="lower trainer.per_device_train_batch_size"):
        while True:
            plan = safer_plan(plan, can_offload)
            plans.append(plan)
    return plans


def test_each_plan_gives_up_one_more_thing_and_the_cheapest_comes_first():
    plans = given_up(MemoryPlan(8, 3, 5, 6, unpacked=7, replayed=True, tokens=9), can_offload=True)
    found = [(one.replayed, one.unpacked, one.checkpointed, one.offloaded, one.tiled) for one in plans]
    assert found == [
        (False, 7, 3, False, False),
        (False, 0, 3, False, False),
        (False, 0, 6, False, False),  # half of the five layers that kept their activations
        (False, 0, 7, False, False),
        (False, 0, 8, False, False),
        (False, 0, 8, True, False),
        (False, 0, 8, True, True),
    ]
    assert {(one.layers, one.peak, one.budget, one.tokens) for one in plans} == {(8, 5, 6, 9)}


def test_layers_in_the_librarys_form_keep_their_inputs_on_the_gpu():
    assert given_up(MemoryPlan(8, 7, 5, 6), can_offload=False) == [MemoryPlan(8, 8, 5, 6)]
