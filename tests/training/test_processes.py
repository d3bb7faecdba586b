"""Several processes train one run: with the losses of one process, exactly resumed, and ended together."""

import logging

import pytest
import together
from helpers import GOLDEN, ROOT, composed
from together import in_processes

from intern.errors import UserError
from intern.inspection.resume_check import diff_runs, stop_after
from intern.runs.checkpoints import Kind, examine
from intern.runs.directory import Run
from intern.runs.lock import lock
from intern.training.finetune import finetune

ROWS = 11  # in batches of 2: the third step of an epoch has one batch of 2 rows and one of 1, or none, for the second process
SHORT = [
    *("experiment=tiny_cpu", "logger=none", "data.context=never", "trainer.warmup_steps=0", "trainer.logging_steps=2"),
    *("trainer.packing=false", "trainer.per_device_train_batch_size=2", "trainer.max_steps=8", "trainer.min_steps=8"),
    *("trainer.eval_strategy=steps", "trainer.eval_steps=5", "trainer.save_steps=5"),
    *("trainer.per_device_eval_batch_size=3",),
]
TIMES = ("_runtime", "_per_second", "_seconds")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Those of a short run whose batches cannot be shared evenly, neither of training rows nor of golden ones."""
    folder = tmp_path_factory.mktemp("rows")
    for name, source, count in (("train", ROOT / "data" / "train.jsonl", ROWS), ("golden", GOLDEN, 7)):
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return [*SHORT, f"data.train_file={folder}/train.jsonl", f"data.eval_file={folder}/golden.jsonl"]


@pytest.fixture
def brief(overrides):
    """Those of a run that only trains."""
    return [*overrides, "data.eval_file=null", "trainer.eval_strategy=no"]


@pytest.fixture(scope="module")
def alone(overrides, tmp_path_factory):
    """A run of one process, whose steps have as many rows as those of two processes."""
    run = Run(tmp_path_factory.mktemp("alone"))
    finetune(composed(*overrides, "trainer.gradient_accumulation_steps=2"), run)
    return run


@pytest.fixture(scope="module")
def pair(overrides, tmp_path_factory):
    """The same run of two processes."""
    run = Run(tmp_path_factory.mktemp("pair"))
    scores = in_processes(together.train, run.path, run.path, composed(*overrides))
    assert scores == [pytest.approx(run.score(), abs=1e-12)] * 2
    return run


def timeless(values):
    return {
        name: value
        for name, value in values.items()
        if not name.endswith(TIMES)
        and not name.startswith("peak_")
        and name not in ("eval_entropy", "eval_mean_token_accuracy")
    }


def test_two_processes_train_like_one_with_the_same_rows_in_a_step(alone, pair):
    ours, theirs = pair.read_history(), alone.read_history()
    assert [entry["step"] for entry in ours] == [2, 4, 5, 6, 8, 8]
    for one, other in zip(ours, theirs, strict=True):
        assert timeless(one) == pytest.approx(timeless(other), abs=1e-5), one["step"]
    assert timeless(pair.read_json(pair.metrics)) == pytest.approx(timeless(alone.read_json(alone.metrics)), abs=1e-5)


@pytest.mark.slow
def test_four_processes_train_packs_like_one(overrides, tmp_path):
    packed = [
        *overrides,
        "trainer.packing=true",
        "trainer.eval_answers=2",
        "trainer.per_device_train_batch_size=1",
        "trainer.max_length=200",
    ]
    one, four = Run(tmp_path / "one"), Run(tmp_path / "four")
    one.path.mkdir()
    finetune(composed(*packed, "trainer.gradient_accumulation_steps=4"), one)
    in_processes(together.train, tmp_path / "outcomes", four.path, composed(*packed), count=4)
    for ours, theirs in zip(four.read_history(), one.read_history(), strict=True):
        assert timeless(ours) == pytest.approx(timeless(theirs), abs=1e-5)
    assert timeless(four.read_json(four.metrics)) == pytest.approx(timeless(one.read_json(one.metrics)), abs=1e-5)


def test_one_process_writes_and_the_checkpoint_has_the_random_states_of_all(pair):
    checkpoint = pair.checkpoints / "checkpoint-5"
    assert examine(checkpoint, pair.path).kind is Kind.WHOLE
    assert sorted(file.name for file in checkpoint.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    assert pair.read_config().num_processes == pair.read_json(pair.environment)["processes"] == 2
    assert len(pair.history.read_text().splitlines()) == 6


def test_two_processes_resume_bit_for_bit_in_the_second_epoch(pair, overrides, tmp_path):
    stopped = Run(tmp_path / "stopped")
    stop_after(pair, 5, stopped)
    in_processes(together.train, tmp_path / "outcomes", stopped.path, composed(*overrides))
    parts = list(diff_runs(pair, stopped, 8))
    assert len(parts) == 7 and not any(part.differ for part in parts), parts


def test_another_number_of_processes_resumes_with_the_same_rows_in_a_step_or_is_refused_by_name(
    alone, pair, overrides, tmp_path, caplog
):
    stopped = Run(tmp_path / "stopped")
    stop_after(pair, 5, stopped)
    with pytest.raises(
        UserError,
        match=r"a step would have 1 batches, and .* was started with 2: give trainer.gradient_accumulation_steps=2$",
    ):
        finetune(composed(*overrides), stopped)
    with caplog.at_level(logging.WARNING, "intern"):
        finetune(composed(*overrides, "trainer.gradient_accumulation_steps=2"), stopped)
    assert "the number of processes changed since this run was started" in caplog.text
    ours, theirs = stopped.read_json(stopped.metrics), alone.read_json(alone.metrics)
    assert timeless(ours) == pytest.approx(timeless(theirs), abs=1e-5)


def test_sigterm_to_one_process_saves_one_checkpoint_and_ends_all(brief, tmp_path):
    run = Run(tmp_path / "run")
    assert in_processes(together.train, tmp_path / "outcomes", run.path, composed(*brief), "SIGTERM") == [143, 143]
    # The signal comes after the processes have agreed on this step, so the next one is the last.
    [checkpoint] = run.checkpoints.iterdir()
    assert checkpoint.name == "checkpoint-4" and examine(checkpoint, run.path).kind is Kind.WHOLE
    assert not run.finished


@pytest.mark.parametrize(
    ("event", "outcomes"),
    [
        ("SIGKILL", ["LostProcess: another process of this run has ended: its own message says why", -9]),
        pytest.param(
            "disk on fire",
            [
                "LostProcess: another process of this run has ended: its own message says why",
                "RuntimeError: disk on fire",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "weights",
            [
                "RunError: the processes of this run have different adapter weights at step 3: their gradients were not summed"
            ]
            * 2,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_if_one_process_fails_the_others_end_in_seconds_and_know_that_it_was_not_they(event, outcomes, brief, tmp_path):
    more = ["trainer.save_steps=1"] if event == "weights" else []
    found = in_processes(together.train, tmp_path / "outcomes", tmp_path / "run", composed(*brief, *more), event)
    assert [
        one if isinstance(one, int) else one[: len(wanted)] for one, wanted in zip(found, outcomes, strict=True)
    ] == outcomes


def test_the_lock_is_process_0s_and_refuses_all(brief, tmp_path):
    run = Run(tmp_path / "run")
    with lock(run):
        refused, lost = in_processes(together.train, tmp_path / "outcomes", run.path, composed(*brief))
    assert refused.startswith(f"BusyError: {run.path}: another process trains in it")
    assert lost.startswith("LostProcess")
    assert not run.history.exists()


def test_memory_that_runs_out_in_one_process_runs_out_for_all_and_the_highest_peak_counts(tmp_path):
    assert in_processes(together.peak, tmp_path, 1) == [None, None]
    assert in_processes(together.peak, tmp_path, None) == [101, 101]
