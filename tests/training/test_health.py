"""Training that goes wrong ends with advice, before bad weights become a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from helpers import train
from transformers import TrainerControl, TrainerState
from trl import SFTTrainer

from intern.errors import RunError
from intern.runs.directory import Run
from intern.training.health import EXPLOSION, Health
from intern.training.steps import OptimizerSteps

BRIEF = ("data.eval_file=null", "trainer.max_steps=6", "trainer.min_steps=0", "trainer.save_steps=2")


def test_weights_that_do_not_change_end_the_run(tmp_path):
    with pytest.raises(
        RunError, match="no adapter weight has changed in 10 optimizer steps: raise trainer.learning_rate"
    ):
        train(tmp_path / "run", *BRIEF, "trainer.learning_rate=1e-60", "trainer.max_steps=12")


def test_rows_without_labels_end_the_run(tmp_path, monkeypatch):
    collate = SFTTrainer.get_batch_samples

    def masked(self, *arguments):
        samples, tokens = collate(self, *arguments)
        for sample in samples:
            sample["labels"].fill_(-100)
        return samples, tokens

    monkeypatch.setattr(SFTTrainer, "get_batch_samples", masked)
    with pytest.raises(RunError, match="no token of the first batch carries loss"):
        train(tmp_path / "run", *BRIEF)


def health(run, **steps):
    model = torch.nn.Linear(2, 2)
    counted = OptimizerSteps(0, 5)
    for name, value in steps.items():
        setattr(counted, name, value)
    watch = Health(run, counted)
    watch.on_train_begin(None, TrainerState(), TrainerControl(), model=model)
    return watch, model


def test_nan_weights_never_become_a_checkpoint(tmp_path):
    watch, model = health(Run(tmp_path))
    with torch.no_grad():
        model.bias[0] = float("nan")
    watch.on_step_end(None, TrainerState(), TrainerControl(), model=model)  # nothing is saved at this step
    with pytest.raises(
        RunError,
        match="adapter weights are NaN or infinite at step 7: lower trainer.learning_rate; there is no checkpoint before it",
    ):
        watch.on_step_end(None, TrainerState(global_step=7), TrainerControl(should_save=True), model=model)


def test_infinite_gradients_end_a_run_without_loss_scaling(tmp_path):
    watch, _ = health(Run(tmp_path))
    logs = {"grad_norm": float("inf")}
    scaled = type("Optimizer", (), {"scaler": object()})()
    watch.on_log(None, TrainerState(), TrainerControl(), logs=logs, optimizer=scaled)  # fp16 skips the step
    with pytest.raises(RunError, match="the gradient norm is inf at step 3"):
        watch.on_log(None, TrainerState(global_step=3), TrainerControl(), logs=logs, optimizer=None)


def test_exploding_gradients_are_a_warning_once(tmp_path, caplog):
    watch, _ = health(Run(tmp_path))
    for step, norm in enumerate([1.0, 2.0, 1.0, 1.0, 1.0, EXPLOSION * 0.9, EXPLOSION * 1.1, EXPLOSION * 2.0]):
        watch.on_log(None, TrainerState(global_step=step), TrainerControl(), logs={"grad_norm": norm})
    assert (
        caplog.text.count("the gradient norm is") == 1
        and "at step 6, over 100 times its median so far (1)" in caplog.text
    )


def test_a_nan_loss_leaves_the_last_good_checkpoint(tmp_path):
    with pytest.raises(RunError, match="(loss|norm|weights)"):
        train(
            tmp_path / "run",
            "trainer.learning_rate=1e30",
            "trainer.max_grad_norm=0",
            "trainer.warmup_steps=3",
            "trainer.save_steps=1",
        )
    run = Run(tmp_path / "run")
    state = json.loads((run.last_checkpoint() / "trainer_state.json").read_text())
    from safetensors.torch import load_file

    weights = load_file(run.last_checkpoint() / "adapter_model.safetensors")
    assert state["global_step"] >= 1 and all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert not run.finished and not Path(run.adapter).exists()


def test_a_nan_loss_ends_a_run_without_loss_scaling_whatever_the_optimizer_is(tmp_path):
    watch, _ = health(Run(tmp_path))
    logs = {"loss": float("nan"), "grad_norm": float("nan")}
    scaled = type("Optimizer", (), {"scaler": object()})()
    watch.on_log(None, TrainerState(), TrainerControl(), logs=logs, optimizer=scaled)  # fp16 skips the step
    plain = type("Optimizer", (), {})()  # one that accelerate has not wrapped
    for optimizer in (None, plain):
        with pytest.raises(
            RunError, match="the loss is nan at step 3: lower trainer.learning_rate; there is no checkpoint"
        ):
            watch.on_log(None, TrainerState(global_step=3), TrainerControl(), logs=logs, optimizer=optimizer)
