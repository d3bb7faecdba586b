"""The plan of which layers recompute their activations, on memory that behaves as told."""

import pytest
import torch

from intern.errors import RunError
from intern.memory import plan

GIB = 2**30


def memory(base, layer, budget, asked):
    """Peaks as a GPU shows them: what is always there, and each kept layer's activations; beyond the budget it runs out."""

    def peak_of(kept):
        asked.append(kept)
        peak = int((base + layer * max(kept, 1)) * GIB)
        return peak if peak <= budget * GIB else None

    return peak_of


@pytest.mark.parametrize(
    ("base", "layer", "budget", "kept"),
    [
        (6.0, 0.1, 80.0, 32),  # room for all
        (6.0, 0.5, 14.7, 15),  # 6 + 15 x 0.5 = 13.5 of 13.8 usable
        (6.0, 0.9, 7.2, 0),  # not even two fit into 6.8
        (6.0, 0.3, 7.2, 2),  # two fit, four do not
    ],
)
def test_as_many_layers_are_kept_as_fit_with_a_margin(base, layer, budget, kept):
    asked = []
    made = plan(32, int(budget * GIB), memory(base, layer, budget, asked))
    assert (made.layers - made.checkpointed) == kept
    assert made.peak <= budget * GIB
    assert len(asked) <= 5


def test_a_plan_that_does_not_hold_is_lowered_until_it_does():
    def peak_of(kept):  # each layer costs more than the first one showed
        return int((6 + 0.1 * kept + 0.02 * kept**2) * GIB)

    made = plan(32, 14 * GIB, peak_of)
    kept = made.layers - made.checkpointed
    assert peak_of(kept) <= 14 * GIB * 0.94 < peak_of(kept + 4)
    assert made.peak == peak_of(kept)


def test_what_never_fits_is_said_with_the_remedy():
    with pytest.raises(RunError, match="lower trainer.per_device_train_batch_size, then trainer.max_length"):
        plan(32, 5 * GIB, lambda kept: None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: a CPU's memory has no such limit")
def test_the_plan_is_measured_and_kept(tmp_path):
    from test_finetune import train

    run = train(
        tmp_path / "run",
        "trainer.use_cpu=false",
        "trainer.fp16=true",
        "trainer.activation_checkpointing=auto",
        "quant.bnb_4bit_compute_dtype=float16",
    )
    assert run.read_json(run.metrics)["checkpointed_layers"] == 0
