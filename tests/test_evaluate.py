"""Base against adapter: the scores are right, the table is Markdown in a pipe."""

import math

import pytest
import torch
from conftest import command

from intern.answer import Intern
from intern.generate import answer_losses
from intern.run import Run
from intern.scoring import token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("It rose 18%.", "it rose 18", 1.0),
        ("The revenue was $44 billion", "Revenue: $44 billion", 6 / 7),
        ("Growth", "Decline", 0.0),
        ("", "", 1.0),
        ("", "something", 0.0),
        ("no no no", "no", 2 * 1 / 4),
    ],
)
def test_token_f1_is_squads(answer, reference, expected):
    assert math.isclose(token_f1(answer, reference), expected)


def test_the_answer_loss_is_the_models_own_on_the_answer_alone(trained_run):
    intern = Intern(Run(trained_run), {"max_new_tokens": 8})
    rows = intern.prompt.encode(
        intern.tokenizer, ["Why?", "How much did it grow in the year?"], ["So.", "It grew 18% as reported."]
    )
    inputs = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    together = answer_losses(intern.model, inputs, intern.tokenizer.pad_token_id)
    for row, (loss, tokens) in zip(rows, together, strict=True):
        expected = intern.model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item()
        assert tokens == sum(label != -100 for label in row.labels)
        assert math.isclose(loss / tokens, expected, rel_tol=1e-4)


def test_the_command_compares_base_and_adapter_on_both_halves(trained_run, tmp_path):
    done = command("intern.evaluate", f"run_dir={trained_run}", "generation.max_new_tokens=16", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and done.stderr == ""
    assert [line.split(" |")[0] for line in lines[2:]] == [
        "| all (100)",
        "| on chunks that training saw (50)",
        "| on chunks that it never saw (50)",
    ]
    for line in lines[2:]:
        base, adapter = (float(cell) for cell in line.split(" | ")[1:3])
        assert adapter < base
    metrics = Run(trained_run).read_json(Run(trained_run).metrics)
    assert f"{metrics['eval_loss']:.2f}" == lines[2].split(" | ")[2]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_golden_file_is_named(trained_run):
    done = command("intern.evaluate", f"run_dir={trained_run}", "eval_file=nowhere.jsonl", check=False)
    assert (
        done.returncode == 2
        and done.stderr
        == "eval_file=nowhere.jsonl: no such file, neither in the working directory nor in the project\n"
    )
