"""Every family of models with no override of its own: previewed, trained, resumed, asked and evaluated, with the losses of plain
transformers and PEFT. docs/models.md has a table of it."""

import json
import shutil

import pytest
import torch
from helpers import ROOT, SHORT, composed, train
from peft import PeftModel
from rich.console import Console
from tiny_families import FAMILIES, write_family
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from intern.data.prompt import IGNORED
from intern.evaluation.evaluate import evaluate
from intern.inference.answer import query_intern
from intern.inspection.preview import examine
from intern.runs.directory import Run

STEPS, STOP = 4, 2
ROWS = 12
# One of each kind of attention, position, norm, expert, scaled output and layout; `make test-slow` runs the others.
IN_SUITE = {
    *("llama", "qwen3_5", "gemma2", "gemma3_vision", "phi3", "granitemoehybrid", "cohere2", "falcon", "gpt2", "bloom"),
    "mixtral",
}


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A training and a golden file that fit into one batch."""
    folder = tmp_path_factory.mktemp("rows")
    for name, source, count in (("train", "train", ROWS), ("golden", "golden_test_set", 4)):
        lines = (ROOT / "data" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return folder


def overrides(base, rows):
    return (
        f"model.pretrained_model_name_or_path={base}",
        f"data.train_file={rows}/train.jsonl",
        f"data.eval_file={rows}/golden.jsonl",
        f"trainer.max_steps={STEPS}",
        f"trainer.min_steps={STEPS}",
        f"trainer.save_steps={STOP}",
        "trainer.logging_steps=1",
        "trainer.per_device_train_batch_size=16",
        "trainer.gradient_accumulation_steps=1",
    )


def plain_loss(base, adapter, encoded):
    """Mean loss of the labelled tokens by transformers and PEFT alone: one row at a time, full logits, the model's own forward."""
    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quant, dtype=torch.float32, device_map={"": "cpu"}, attn_implementation="eager"
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its repacked weights compute in bfloat16
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in encoded:
            ids = torch.tensor([row.input_ids])
            targets = torch.tensor(row.labels)[1:]
            logits = model(input_ids=ids).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item()
            count += int((targets != IGNORED).sum())
    return total / count


def encoded(run, name):
    """The rows of a file as the run's own prompt encodes them."""
    from transformers import AutoTokenizer

    from intern.data.prompt import Prompt

    lines = [json.loads(line) for line in (name).read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    prompt = Prompt.from_json(run.read_json(run.prompt))
    return prompt.encode(tokenizer, [line["question"] for line in lines], [line["answer"] for line in lines])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_SUITE else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_previews_trains_resumes_answers_and_evaluates_with_the_losses_of_the_plain_libraries(
    name, rows, tmp_path, capsys
):
    base = write_family(name, tmp_path)
    shown = examine(
        composed(*SHORT, *overrides(base, rows), "rows=1", "lengths=null", name="preview"), Console(quiet=True)
    )
    assert {check.name for check in shown} >= {"BOS", "packing"} and capsys.readouterr().out.startswith(
        "train.jsonl: 12 rows"
    )
    run = train(tmp_path / "run", *overrides(base, rows))
    history = {line["step"]: line["loss"] for line in run.read_history() if "loss" in line}
    trained = encoded(run, rows / "train.jsonl")
    assert history[1] == pytest.approx(plain_loss(base, None, trained), rel=1e-5)
    checkpoint = run.checkpoints / f"checkpoint-{STOP}"
    assert history[STOP + 1] == pytest.approx(plain_loss(base, checkpoint, trained), rel=1e-5)
    scored = plain_loss(base, run.adapter, encoded(run, rows / "golden.jsonl"))
    metrics = run.read_json(run.metrics)
    assert metrics["eval_loss"] == pytest.approx(scored, rel=1e-5)

    shutil.copytree(run.path, tmp_path / "stopped")
    stopped = Run(tmp_path / "stopped")
    stopped.metrics.unlink()
    shutil.rmtree(stopped.checkpoints / f"checkpoint-{STEPS}")
    train(stopped.path, *overrides(base, rows))
    assert stopped.read_json(stopped.metrics)["eval_loss"] == metrics["eval_loss"]

    answer = query_intern("How much did Uber's gross bookings grow in 2024?", run_dir=str(run.path))
    assert isinstance(answer, str)
    scores = evaluate(composed("generation.max_new_tokens=2", "resamples=100", name="evaluate"), run, None)
    losses, tokens = zip(
        *((row.after.prediction.loss, row.after.prediction.loss_tokens) for row in scores.rows), strict=True
    )
    assert sum(losses) / sum(tokens) == pytest.approx(scored, rel=1e-5)
