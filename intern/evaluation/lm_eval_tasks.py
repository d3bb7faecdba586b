"""Standard tasks of lm-evaluation-harness on base and adapter: what fine-tuning has made the model forget."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intern.errors import UserError
from intern.inference.answer import Intern

_DRAWS = 1000  # of the bootstrap, for metrics that have no formula for their standard error


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task: its value for base and adapter, each with its standard error where the harness knows one."""

    task: str
    metric: str
    rows: int
    base: float
    base_error: float | None
    adapter: float
    adapter_error: float | None


def score_tasks(
    intern: Intern, tasks: list[str], limit: int | None, include_path: str | None, batch_size: int, seed: int
) -> list[TaskScore]:
    """Runs the tasks twice, without and with the adapter, as the harness defines them: without this project's prompt.

    Args:
        limit: rows of each task, None for all.
        include_path: a folder of task files beside the harness's own.

    Raises:
        UserError: the harness is not installed, a task does not exist, or its data cannot be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("harness.tasks needs lm-evaluation-harness: pip install 'intern[harness]'") from error
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"harness.include_path={include_path}: no such folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is loaded already
    # The harness's own tasks are thousands of files: they are read only where one of them is meant.
    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else TaskManager()
    if include_path and not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise UserError(f"harness.tasks: the harness has no {', '.join(unknown)}: `lm-eval ls tasks` lists its own")

    def run() -> dict[str, Any]:
        # The type of its parameter leaves out PEFT's models, which it takes.
        model: Any = HFLM(pretrained=intern.model, tokenizer=intern.tokenizer, batch_size=batch_size)
        try:
            found = simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=_DRAWS,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (OSError, ValueError) as error:
            raise UserError(f"harness.tasks={','.join(tasks)}: {' '.join(str(error).split())[:300]}") from error
        assert found is not None  # only other processes than the first get nothing
        return found

    with intern.model.disable_adapter():
        base = run()
    return list(_paired(base, run()))


def _paired(base: dict[str, Any], adapter: dict[str, Any]) -> Iterator[TaskScore]:
    for task, values in base["results"].items():
        for key, value in values.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            errors = [found["results"][task].get(f"{metric}_stderr,{how}") for found in (base, adapter)]
            first, second = (error if isinstance(error, float) else None for error in errors)
            rows = base["n-samples"].get(task, {}).get("effective", 0)
            yield TaskScore(task, metric, rows, value, first, adapter["results"][task][key], second)
