"""memory.json: what a resume repeats, and what it plans again."""

import json

import pytest

from intern.errors import UserError
from intern.memory.plan import MemoryPlan
from intern.memory.stored_plan import read_plan, write_plan
from intern.runs.directory import Run

PLAN = MemoryPlan(4, 3, 5, 6, offloaded=True, unpacked=7, cudnn=True, tokens=8)
FIRST_FORM = {"layers": 4, "checkpointed": 3, "peak": 5, "budget": 6}  # without a schema version, and with fewer fields


def test_a_plan_is_read_as_it_was_written(tmp_path):
    run = Run(tmp_path)
    assert read_plan(run, layers=4) is None
    write_plan(run, PLAN)
    assert read_plan(run, layers=4) == PLAN
    assert json.loads(run.memory.read_text())["schema_version"] == 1


def test_the_form_without_a_schema_version_is_still_read(tmp_path):
    run = Run(tmp_path)
    run.write_json(run.memory, FIRST_FORM)
    assert read_plan(run, layers=4) == MemoryPlan(4, 3, 5, 6)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"rank": 3}, "plan.rank"),
        ({"schema_version": 2}, "schema_version=2, and this version of intern reads 1"),
        ({"budget": None}, "plan.budget"),
        ({"checkpointed": "all"}, "plan.checkpointed='all'"),
        ({"checkpointed": 5}, "5 of 4 layers checkpointed, and the model has 4"),
        ({"layers": 2, "checkpointed": 1}, "1 of 2 layers checkpointed, and the model has 4"),
        ({"layers": ...}, "plan.layers: is missing"),
    ],
)
def test_a_plan_of_another_version_is_made_again_with_one_line(changed, reason, tmp_path, caplog):
    run = Run(tmp_path)
    run.write_json(run.memory, {name: value for name, value in (FIRST_FORM | changed).items() if value is not ...})
    assert read_plan(run, layers=4) is None
    [record] = caplog.records
    assert reason in record.getMessage() and "\n" not in record.getMessage()
    assert str(run.memory) in record.getMessage() and "memory is planned again" in record.getMessage()


def test_a_file_that_is_no_json_ends_in_one_line(tmp_path):
    run = Run(tmp_path)
    run.memory.write_text("{")
    with pytest.raises(UserError, match="memory.json"):
        read_plan(run, layers=4)
