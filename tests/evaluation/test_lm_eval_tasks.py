"""Standard tasks of lm-evaluation-harness, with a task file of our own and the tiny base: no network."""

import json

import pytest
from helpers import command

from intern.errors import UserError
from intern.evaluation.lm_eval_tasks import score_tasks
from intern.inference.answer import Intern
from intern.runs.directory import Run

TASK = """
task: segments
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def tasks(tmp_path):
    """A folder with one task: four questions, the last of which asks for nonsense."""
    rows = [{"question": "Uber's largest segment is", "choices": [" Mobility", " xq"], "answer": 0}] * 3
    rows.append({"question": "Uber's largest segment is", "choices": [" Mobility", " xq"], "answer": 1})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "segments.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    return tmp_path


def test_base_and_adapter_are_scored_and_the_adapter_is_the_one_that_was_trained(trained_run, tasks):
    intern = Intern(Run(trained_run), {"max_new_tokens": 4})
    [score] = score_tasks(intern, ["segments"], None, str(tasks), 4, seed=1)
    assert (score.task, score.metric, score.rows) == ("segments", "acc", 4)
    assert (score.base, score.adapter) == (0.75, 0.75)
    for name, parameter in intern.model.named_parameters():
        if "lora_B" in name:  # an adapter that has forgotten everything
            parameter.data += 5 * parameter.data.new_ones(()).expand_as(parameter).cumsum(0).sin()
    [broken] = score_tasks(intern, ["segments"], 2, str(tasks), 4, seed=1)
    assert broken.rows == 2 and broken.base == 1.0


def test_the_command_prints_a_table_and_keeps_the_scores(trained_run, tasks, rows_file):
    golden = rows_file({"question": "What?", "answer": "That."}, name="golden.jsonl")
    done = command(
        "intern.evaluate", f"run_dir={trained_run}", f"eval_file={golden}", "name=standard", "generation.max_new_tokens=2",
        "harness.tasks=[segments]", f"harness.include_path={tasks}",
    )  # fmt: skip
    assert done.stdout.splitlines()[-1].startswith("| segments | acc | 4 | 0.750 ± 0.250 | 0.750 ± 0.250 | +0.000 |")
    [kept] = json.loads((trained_run / "evaluation" / "standard" / "harness.json").read_text())["scores"]
    assert kept["base"] == 0.75


@pytest.mark.parametrize(
    ("wanted", "folder", "said"),
    [(["segmants"], True, "has no segmants"), (["segments"], False, "include_path=/nowhere: no such folder")],
)
def test_what_is_not_there_is_named(trained_run, tasks, wanted, folder, said):
    intern = Intern(Run(trained_run), {"max_new_tokens": 4})
    with pytest.raises(UserError, match=said):
        score_tasks(intern, wanted, None, str(tasks) if folder else "/nowhere", 4, seed=1)
