"""A real model, trained and asked here and in an independent loop of plain transformers and PEFT: the same losses, the same answers.

`make test-real` fetches the model and runs this; it is not part of the ordinary suite.
"""

import json
import sys

import pytest
import torch
from helpers import ROOT, composed
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from intern.evaluation.evaluate import evaluate
from intern.inference.answer import Intern
from intern.runs.directory import Run
from intern.training.finetune import finetune

BASE = ROOT / "data" / "smollm2_135m"
STEPS, ROWS, WARMUP, RATE = 24, 2, 4, 5e-4  # ROWS of a batch
SYSTEM = "You answer questions about Uber in 2024."
QUESTIONS = [
    "How much did Uber's gross bookings grow in 2024?",
    "Which large markets are missing from Uber's map?",
    "What is Uber One?",
]


def show(text):
    """Figures for a person who runs this with -s."""
    sys.stdout.write(f"{text}\n")


pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (BASE / "model.safetensors").is_file(), reason="python scripts/get_smollm2.py fetches it"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, source, count in (("train", "train", STEPS * ROWS), ("golden", "golden_test_set", 8)):
        lines = (ROOT / "data" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:count]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def trained(path, files, steps, rate):
    """A run in 32 bits, without packing and with the rows in the order of the file, so that a plain loop can do the same."""
    path.mkdir()
    cfg = composed(
        "experiment=smollm2_cpu", "quant=none", "logger=none", f"model.pretrained_model_name_or_path={BASE}",
        f"data.train_file={files}/train.jsonl", f"data.eval_file={files}/golden.jsonl", f"data.system_prompt='{SYSTEM}'",
        "data.context=never", f"trainer.max_steps={steps}", f"trainer.min_steps={steps}", f"trainer.learning_rate={rate}",
        "trainer.packing=false", f"trainer.per_device_train_batch_size={ROWS}", f"trainer.warmup_steps={WARMUP}",
        "trainer.logging_steps=1", "+trainer.train_sampling_strategy=sequential",
    )  # fmt: skip
    run = Run(path)
    finetune(cfg, run)
    return run


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """The run, and one step at learning rate 0, whose adapter is the one that the run began with."""
    folder = tmp_path_factory.mktemp("real")
    return trained(folder / "run", files, STEPS, RATE), trained(folder / "start", files, 1, 0.0)


def encoded(tokenizer, file):
    """Rows by the library's own rendering: ids up to the end of the answer, labels on the answer."""
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
        whole = [*asked, {"role": "assistant", "content": row["answer"]}]
        start = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
        yield torch.tensor([ids]), torch.tensor([-100] * len(start) + ids[len(start) :])


def summed_loss(model, ids, labels):
    """The sum of one row's token losses, and how many tokens carry loss."""
    logits = model(input_ids=ids).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"), int((labels[1:] != -100).sum())


def plain_model(adapter, trainable=False):
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter, is_trainable=trainable)


def test_losses_are_those_of_a_plain_loop(runs, files):
    run, start = runs
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), plain_model(start.adapter, trainable=True)
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, WARMUP, STEPS)
    rows = list(encoded(tokenizer, files / "train.jsonl"))
    losses = []
    for step in range(STEPS):
        sums = [summed_loss(model, *row) for row in rows[step * ROWS : (step + 1) * ROWS]]
        loss = sum(one for one, _ in sums) / sum(count for _, count in sums)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        losses.append(loss.item())
    ours = [line["loss"] for line in run.read_history() if "loss" in line]
    with torch.no_grad():
        golden = [summed_loss(model.eval(), *row) for row in encoded(tokenizer, files / "golden.jsonl")]
    scored = sum(one.item() for one, _ in golden) / sum(count for _, count in golden)
    reported = run.read_json(run.metrics)["eval_loss"]
    worst = max(abs(one - other) / other for one, other in zip(ours, losses, strict=True))
    show(
        f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, worst step differs by {worst:.1e}, golden {reported:.4f} and {scored:.4f}"
    )
    assert ours == pytest.approx(losses, rel=1e-3)
    assert reported == pytest.approx(scored, rel=1e-3)


def test_greedy_answers_are_those_of_the_plain_libraries(runs):
    run, _ = runs
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), plain_model(run.adapter).eval()
    intern = Intern(run, {"max_new_tokens": 32})
    for question in QUESTIONS:
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**ids, max_new_tokens=32, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        plain = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        show(repr(plain))
        assert intern.answer(question) == plain


def test_the_adapter_is_better_on_golden_rows_than_its_base(runs):
    run, _ = runs
    found = evaluate(composed("generation.max_new_tokens=32", "resamples=100", name="evaluate"), run, None)
    before, after = (sum(getattr(row, side).prediction.loss for row in found.rows) for side in ("before", "after"))
    show(f"summed loss of {len(found.rows)} golden rows: base {before:.1f}, adapter {after:.1f}")
    assert after < before
