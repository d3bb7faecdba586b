"""Which layers recompute, and what to change if nothing fits, on simulated memory."""

import types
from dataclasses import replace

import pytest

from intern.memory.plan import MemoryPlan, fewest_checkpointed_layers, smallest_change
from intern.units import GIB


def memory(base, layer, budget, tried_kept):
    """Peaks like a GPU's: `base` and the activations of each kept layer, in GiB; above the budget it runs out of memory."""

    def peak_of(kept):
        tried_kept.append(kept)
        peak = int((base + layer * max(kept, 1)) * GIB)
        return peak if peak <= budget * GIB else None

    return peak_of


@pytest.mark.parametrize(
    ("base", "layer", "budget", "kept"),
    [
        (6.0, 0.1, 80.0, 32),  # room for all
        (6.0, 0.5, 14.7, 15),  # 6 + 15 x 0.5 = 13.5 of 13.8 usable
        (6.0, 0.9, 7.4, 0),  # not even two fit into 7.0
        (6.0, 0.3, 7.2, 2),  # two fit, four do not
    ],
)
def test_as_many_layers_are_kept_as_fit_with_a_margin(base, layer, budget, kept):
    tried_kept = []
    made = fewest_checkpointed_layers(32, int(budget * GIB), memory(base, layer, budget, tried_kept))
    assert (made.layers - made.checkpointed) == kept
    assert made.peak <= budget * GIB
    assert len(tried_kept) <= 6


def test_a_plan_that_does_not_fit_is_lowered_until_it_does():
    def peak_of(kept):  # each layer costs more than the first one showed
        return int((6 + 0.1 * kept + 0.02 * kept**2) * GIB)

    made = fewest_checkpointed_layers(32, 14 * GIB, peak_of)
    kept = made.layers - made.checkpointed
    assert peak_of(kept) <= 14 * GIB * 0.94 < peak_of(kept + 4)
    assert made.peak == peak_of(kept)


def test_with_plenty_of_memory_one_try_is_enough():
    tried_kept = []
    assert fewest_checkpointed_layers(32, 80 * GIB, memory(6.0, 0.1, 80.0, tried_kept)).checkpointed == 0
    assert tried_kept == [32]


def test_what_never_fits_has_no_plan():
    assert fewest_checkpointed_layers(32, 5 * GIB, lambda kept: None) is None
    assert fewest_checkpointed_layers(32, 5 * GIB, lambda kept: int(4.9 * GIB)) is None  # nor what leaves no margin


ARGS = types.SimpleNamespace(gradient_accumulation_steps=2)


def test_the_remedy_is_the_first_change_that_fits_when_tried():
    batch = [{"input_ids": list(range(1000)), "labels": list(range(1000)), "seq_lengths": [600, 400]}] * 4
    tried = []

    def fits(most):
        return lambda rows: (tried.append(rows), sum(len(row["input_ids"]) for row in rows) <= most)[1]

    remedy = smallest_change(batch, fits(2100), ARGS)
    assert remedy.startswith("trainer.per_device_train_batch_size=2 was tried and fits")
    assert "trainer.gradient_accumulation_steps=4" in remedy
    remedy = smallest_change(batch, fits(600), ARGS)
    assert remedy.startswith("trainer.max_length=562 with trainer.per_device_train_batch_size=1 was tried and fits")
    [cut] = tried[-1]
    assert cut["seq_lengths"] == [562] and cut["labels"] == list(range(562))
    assert smallest_change(batch, lambda rows: False, ARGS).startswith("take a smaller model")


def test_smaller_batches_keep_more_layers_and_take_no_more_memory():
    made = MemoryPlan(32, 25, 0, 0, tokens=7083)
    assert [made.kept(tokens) for tokens in (7083, 7000, 3927, 1000, 9000)] == [7, 7, 12, 32, 5]
    assert "on up to 25 of 32 layers" in str(made)
    for same in (replace(made, tokens=0), replace(made, replayed=True)):
        assert same.kept(1000) == 7 and "on 25 of 32 layers" in str(same)
    assert replace(made, checkpointed=0).kept(9000) == 25  # larger than any that was tried
    assert replace(made, checkpointed=32).kept(1) == 0
