"""A mistake that needs no library is reported before torch and transformers load, in the words of the full check."""

import subprocess
import sys

import pytest
from helpers import ROOT, composed

from intern.errors import UserError
from intern.runs.directory import Run
from intern.training import quick_check
from intern.training.plan import build_plan
from intern.training.quick_check import check_quickly

MISTAKES = [
    "data.train_file=nope.jsonl",
    "data.train_file=owner/name",
    "data.eval_file=[data/train.jsonl,nope.jsonl]",
    "lora.r=0",
    "lora.r=abc",
    "trainer.max_steps=many",
    "trainer.learning_rate=fast",
    "trainer.logging_steps=often",
    "trainer.min_steps=300",
    "name=best",
    "seed=x",
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_has_the_words_of_the_full_check(mistake, tmp_path):
    cfg = composed("experiment=tiny_cpu", "logger=none", mistake)
    with pytest.raises(UserError) as quick:
        check_quickly(cfg, asks_gpu=True)
    with pytest.raises(UserError) as full:
        build_plan(cfg, Run(tmp_path))
    assert str(quick.value) == str(full.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.train_file=hub:owner/name", "data.eval_file=null"],
        ["data.train_file=data/*.jsonl"],
        ["data.train_file=data"],
        ["trainer.save_steps=0.5", "trainer.warmup_steps=0.1"],
        ["name=mine", "notes=why"],
    ],
)
def test_what_the_full_check_may_accept_passes(overrides):
    check_quickly(composed("experiment=tiny_cpu", *overrides), asks_gpu=True)
    check_quickly(composed("experiment=tiny_cpu", *overrides, name="preview"), asks_gpu=False)


def test_a_missing_gpu_is_reported_only_where_it_is_needed(monkeypatch):
    monkeypatch.setattr(quick_check, "_may_have_gpu", lambda: False)
    check_quickly(composed(), asks_gpu=False)
    with pytest.raises(UserError, match="no CUDA GPU found, and trainer.use_cpu is false"):
        check_quickly(composed(), asks_gpu=True)


@pytest.mark.parametrize("command", ["train", "preview", "verify"])
def test_no_heavy_library_is_loaded_for_it(command, tmp_path):
    code = (
        f"import sys; sys.argv = ['x', 'data.train_file=nope.jsonl']; import intern.{command} as m\n"
        "try: m.main()\nfinally: print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "data.train_file=nope.jsonl: no such file" in done.stderr, done.stderr
    assert not set(done.stdout.split()) & {"torch", "transformers", "datasets", "peft", "trl", "wandb"}
