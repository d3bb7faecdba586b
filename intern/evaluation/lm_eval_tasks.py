"""Standard tasks of lm-evaluation-harness on base and adapter: what fine-tuning made the model forget."""

import functools
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intern.errors import UserError

if TYPE_CHECKING:
    from intern.inference.answer import Intern

_DRAWS = 1000  # of the bootstrap, for metrics without a formula for their standard error


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task: the values of base and adapter, each with its standard error if the harness computes one."""

    task: str
    metric: str
    rows: int
    base: float
    base_error: float | None
    adapter: float
    adapter_error: float | None


def check_tasks(harness: dict[str, Any]) -> None:
    """Check conf/evaluate.yaml's harness group before any model loads.

    Args:
        harness: its keys tasks, limit and include_path.

    Raises:
        UserError: a value of the wrong type, a task that does not exist, or the harness is not installed.
    """
    tasks, limit = harness["tasks"], harness["limit"]
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        example = tasks if isinstance(tasks, str) else "hellaswag,arc_easy"
        raise UserError(f"harness.tasks={tasks}: must be a list: harness.tasks=[{example}]")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise UserError(f"harness.limit={limit}: must be a whole number of at least 1, or null for all rows")
    if tasks:
        _find_tasks(tuple(tasks), harness["include_path"])


@functools.lru_cache(maxsize=1)
def _find_tasks(tasks: tuple[str, ...], include_path: str | None) -> Any:
    """Return the harness's TaskManager, once all tasks are known to exist."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("harness.tasks needs lm-evaluation-harness: pip install 'intern[harness]'")
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"harness.include_path={include_path}: no such folder")
    # The harness's own tasks are thousands of files: they are read only if one of them is named.
    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else TaskManager()
    if include_path and not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise UserError(f"harness.tasks: the harness has no {', '.join(unknown)}: `lm-eval ls tasks` lists its tasks")
    return manager


def score_tasks(
    intern: "Intern", tasks: list[str], limit: int | None, include_path: str | None, batch_size: int, seed: int
) -> list[TaskScore]:
    """Run the tasks without and with the adapter, as the harness defines them: without this project's prompt.

    Args:
        intern: the loaded run.
        tasks: names of tasks.
        limit: rows of each task, None for all.
        include_path: a folder of the user's own task files.
        batch_size: rows scored at once.
        seed: of few-shot examples and the bootstrap.

    Raises:
        UserError: the harness is not installed, a task does not exist, or its data cannot be loaded.
    """
    manager = _find_tasks(tuple(tasks), include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about every model that is loaded already

    def run() -> dict[str, Any]:
        # PEFT's models work but are missing from the parameter's type.
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
        assert found is not None  # None only in processes other than the first
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
