"""A run that stops and resumes ends bit for bit like one that never stopped."""

import os
import shutil
import signal
import types

import pytest
from helpers import GOLDEN, ROOT, command, composed, train
from omegaconf import OmegaConf

from intern.errors import UserError
from intern.inspection.resume_check import diff_runs, stop_after
from intern.runs.checkpoints import seal
from intern.runs.directory import Run
from intern.runs.find import find_unfinished
from intern.training.finetune import finetune
from intern.training.resume import MAY_CHANGE, resumed_config
from intern.training.trainer import InternTrainer

# A checkpoint after 5 steps, a log line every 2: the stop falls between two lines. Gradients are summed over 2 batches.
STEPS, HALF = 9, 5
BRIEF = (
    "data.eval_file=null",
    f"trainer.max_steps={STEPS}",
    "trainer.min_steps=0",
    f"trainer.save_steps={HALF}",
    "trainer.save_total_limit=null",
    "trainer.gradient_accumulation_steps=2",
)


def train_briefly(path, *overrides):
    return train(path, *BRIEF, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.packing=false", "lora.lora_dropout=0.1"),
        (),
        ("data.context=mixed", "lora.lora_dropout=0.1", "trainer.max_length=512"),
    ],
    ids=["unpacked", "packed", "mixed"],
)
def test_a_stop_changes_nothing(tmp_path, overrides):
    straight = train_briefly(tmp_path / "straight", *overrides)
    stop_after(straight, HALF, Run(tmp_path / "resumed"))
    resumed = train_briefly(tmp_path / "resumed", *overrides)
    parts = {part.name: part for part in diff_runs(straight, resumed, STEPS)}
    assert {name: part.differ for name, part in parts.items()} == dict.fromkeys(parts, 0)
    assert parts["adapter"].values > 50_000 and parts["optimizer"].values > 100_000
    assert parts["history"].values > 20 and "random states" in parts
    assert (straight.read_json(straight.environment)["run_id"]) == resumed.read_json(resumed.environment)["run_id"]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run that was killed right after its checkpoint of step 5 (of 9)."""
    folder = tmp_path_factory.mktemp("resume")
    straight = train_briefly(folder / "straight")
    stop_after(straight, HALF, Run(folder / "half"))
    return Run(folder / "half"), straight


def copied(run, path):
    shutil.copytree(run.path, path)
    return Run(path)


def test_the_command_resumes_with_the_runs_own_configuration_from_anywhere(half, tmp_path):
    run, straight = copied(half[0], tmp_path / "a run's own [folder]"), half[1]
    done = command("intern.train", f"resume={run.path}", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert f"resuming from {run.checkpoints}/checkpoint-{HALF}" in done.stderr
    assert not any(part.differ for part in diff_runs(straight, run, STEPS))
    assert sorted(path.name for path in tmp_path.iterdir()) == [run.path.name]  # no other output folder
    assert "saved" in (run.path / "train.log").read_text()


def test_a_finished_run_can_be_trained_longer_and_keeps_its_history(half, tmp_path):
    run = copied(half[1], tmp_path / "run")
    before = run.read_history()
    with pytest.raises(UserError, match="holds a finished run: .*raise trainer.max_steps to train it longer"):
        finetune(resumed_config(run, composed(), []), run)
    longer = composed("trainer.max_steps=11", "resume=x")
    finetune(resumed_config(run, longer, ["resume=x", "trainer.max_steps=11"]), run)
    assert run.read_json(run.metrics)["optimizer_steps"] == 11
    assert run.read_history()[: len(before)] == before and len(run.read_history()) > len(before)


def test_overrides_may_repeat_the_configuration_but_not_change_it(half, tmp_path):
    run = half[0]
    cfg = composed("lora.r=4", "+trainer.neftune_noise_alpha=5", "trainer.save_steps=3", "trainer.max_steps=9")
    assert resumed_config(run, cfg, ["trainer.save_steps=3", "trainer.max_steps=9"]).trainer.save_steps == 3
    for override in ("lora.r=4", "lora=qkvo", "experiment=tiny_cpu", "+trainer.neftune_noise_alpha=5"):
        with pytest.raises(
            UserError, match=rf"{override.partition('=')[0].lstrip('+')} differs from what .* was started with"
        ):
            resumed_config(run, cfg, [override])
    for most in (4, -1):
        cfg = resumed_config(run, composed(f"trainer.max_steps={most}"), [f"trainer.max_steps={most}"])
        with pytest.raises(UserError, match="was started with 9, and can only be trained longer"):
            finetune(cfg, run)
    assert not run.finished and set(MAY_CHANGE) > {"trainer.max_steps"}


def test_latest_is_the_newest_run_that_is_unfinished(half, tmp_path):
    import os

    with pytest.raises(UserError, match="resume=latest: no unfinished run"):
        find_unfinished("latest", tmp_path)
    for age, name in enumerate(("outputs/day/new", "multirun/day/old")):
        run = copied(half[0], tmp_path / name)
        (run.path / ".hydra").mkdir()
        shutil.copy(run.config, run.path / ".hydra")
        for file in (run.config, run.history):
            os.utime(file, (1e9 - age, 1e9 - age))
    copied(half[1], tmp_path / "outputs/day/finished")
    assert find_unfinished("latest", tmp_path).path == tmp_path / "outputs/day/new"
    assert find_unfinished("multirun/day/old", tmp_path).path == tmp_path / "multirun/day/old"
    with pytest.raises(UserError, match="resume=nowhere: no run there"):
        find_unfinished("nowhere", tmp_path)


def test_a_checkpoint_cut_short_by_a_full_disk_is_passed_over(half, tmp_path):
    run = copied(half[1], tmp_path / "run")
    last = run.checkpoints / f"checkpoint-{STEPS}"
    for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth"):
        whole = (last / name).read_bytes()
        (last / name).write_bytes(whole[: len(whole) // 2])
        assert run.last_checkpoint() == run.checkpoints / f"checkpoint-{HALF}", name
        (last / name).write_bytes(whole)
    assert run.last_checkpoint() == last


def test_the_memory_plan_of_a_run_is_repeated_and_not_measured_again(tmp_path):
    from transformers import LlamaConfig, LlamaModel, TrainerState

    from intern.kernels.decoder_layers import decoder_layers
    from intern.kernels.install import InstalledKernels
    from intern.memory.callback import FitMemory

    model = LlamaModel(LlamaConfig(num_hidden_layers=4, hidden_size=8, num_attention_heads=2, vocab_size=10))
    run = Run(tmp_path)
    run.write_json(run.memory, {"layers": 4, "checkpointed": 3, "peak": 5, "budget": 6})
    fit = FitMemory(types.SimpleNamespace(model=model, kernels=InstalledKernels()), run)  # all that a stored plan needs
    args = types.SimpleNamespace(activation_checkpointing_kwargs=None)
    fit.on_train_begin(args, TrainerState(global_step=5, stateful_callbacks=[]), None, train_dataloader=None)
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [True, True, True, False]
    assert (fit.plan.checkpointed, fit.plan.peak) == (3, 5)


def test_a_damaged_checkpoint_and_a_changed_history_are_passed_over(half, tmp_path, caplog):
    straight, run = half[1], copied(half[1], tmp_path / "run")
    run.metrics.unlink()
    weights = run.checkpoints / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    lines = run.history.read_text().splitlines(keepends=True)
    run.history.write_text("".join(['{"step": 1, "loss": 99.0}\n', *lines[::-1], lines[0]]))
    train_briefly(run.path)
    said = [message for message in caplog.messages if str(run.path) in message]
    assert said[0] == (
        f"{run.checkpoints}: checkpoint-{STEPS}/adapter_model.safetensors has other bytes than were written; "
        f"resuming from checkpoint-{HALF} instead"
    )
    assert said[1].startswith(f"{run.history}: differs from what was logged up to step {HALF}")
    assert not any(part.differ for part in diff_runs(straight, run, STEPS))
    assert run.read_json(run.metrics)["train_loss"] == straight.read_json(straight.metrics)["train_loss"]
    assert (run.checkpoints / f"damaged-checkpoint-{STEPS}" / "manifest.json").is_file()


def test_a_run_whose_only_checkpoint_is_damaged_is_refused_and_not_changed(half, tmp_path):
    run = copied(half[0], tmp_path / "run")
    (run.checkpoints / f"checkpoint-{HALF}" / "scheduler.pt").unlink()
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=rf"no checkpoint is as it was written \(checkpoint-{HALF}/scheduler.pt is missing\)"
    ):
        train_briefly(run.path)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_kill_before_the_manifest_leaves_the_checkpoint_before_whatever_the_limit_is(half, tmp_path, monkeypatch):
    seals = []

    def kill(checkpoint, root):
        seals.append(checkpoint)
        if len(seals) == 2:
            raise KeyboardInterrupt
        seal(checkpoint, root)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("intern.training.trainer.seal", kill)
        train_briefly(tmp_path / "run", "trainer.save_total_limit=1")
    run = Run(tmp_path / "run")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [f"checkpoint-{HALF}", f"checkpoint-{STEPS}"]
    assert run.last_checkpoint() == run.checkpoints / f"checkpoint-{HALF}"
    train_briefly(run.path, "trainer.save_total_limit=1")
    assert [path.name for path in run.checkpoints.iterdir()] == [f"checkpoint-{STEPS}"]
    assert not any(part.differ for part in diff_runs(half[1], run, STEPS))


@pytest.mark.slow
def test_verify_proves_it_on_this_machine_and_finds_what_is_lost(tmp_path):
    overrides = ("experiment=tiny_cpu", "steps=6")
    done = command("intern.verify", *overrides, f"hydra.run.dir={tmp_path}/good")
    lines = done.stdout.splitlines()
    assert lines[0] == "| after the last step | values | differ | by at most |"
    assert [line.split("|")[1].strip() for line in lines[2:-1]] == [
        "adapter", "optimizer", "learning rate schedule", "random states", "position in the data, counts", "history",
    ]  # fmt: skip
    assert all(line.split("|")[3].strip() == "0" for line in lines[2:-1])
    assert lines[-1] == "A run that stops after step 3 and resumes ends bit for bit like one that never stopped."
    straight, resumed = Run(tmp_path / "good/straight"), Run(tmp_path / "good/resumed")
    state = resumed.checkpoints / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text().replace('"taken": 6', '"taken": 5'))
    resumed.write_history([entry for entry in resumed.read_history() if entry["step"] <= 3])
    weights = resumed.adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    differ = {part.name: part.differ for part in diff_runs(straight, resumed, 6) if part.differ}
    assert differ["adapter"] == 1 and differ["position in the data, counts"] == 1 and differ["history"] > 3


@pytest.mark.parametrize("override", ["lora.r=400", "steps=5", "steps=many"])
def test_what_verify_cannot_do_is_said(override, tmp_path):
    done = command("intern.verify", "experiment=tiny_cpu", override, f"hydra.run.dir={tmp_path}/run", check=False)
    assert done.returncode == 2 and override in done.stderr and done.stderr.count("\n") == 1


def test_the_stored_configuration_is_the_one_that_ran(half):
    cfg = half[1].read_config()
    assert "resume" not in cfg and OmegaConf.to_container(cfg) == OmegaConf.to_container(half[0].read_config())


def test_an_interruption_keeps_its_checkpoint_whatever_the_evaluation_of_that_step_says(tmp_path, monkeypatch):
    rows = GOLDEN.read_text().splitlines(keepends=True)[:2]
    (tmp_path / "golden.jsonl").write_text("".join(rows))
    overrides = (
        *BRIEF, f"data.eval_file={tmp_path}/golden.jsonl", "trainer.max_steps=5", "trainer.logging_steps=100",
        "trainer.save_strategy=best", "trainer.eval_strategy=steps", "trainer.eval_steps=1", "trainer.save_total_limit=1",
        "trainer.learning_rate=0",  # the first evaluation stays the best
    )  # fmt: skip
    straight = train(tmp_path / "straight", *overrides)
    tokens, calls = InternTrainer.get_batch_samples, []

    def interrupting(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return tokens(self, *arguments)

    monkeypatch.setattr(InternTrainer, "get_batch_samples", interrupting)
    with pytest.raises(SystemExit, match="143"):
        train(tmp_path / "stopped", *overrides)
    stopped = Run(tmp_path / "stopped")
    assert sorted(path.name for path in stopped.checkpoints.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    assert stopped.last_checkpoint() == stopped.checkpoints / "checkpoint-3"
    resumed = train(tmp_path / "stopped", *overrides)
    losses = [run.read_json(run.metrics)["train_loss"] for run in (straight, resumed)]
    assert losses[0] == losses[1] > 1  # without a log line before the stop
