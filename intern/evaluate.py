"""python -m intern.evaluate run_dir=latest"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from intern.cli.command import command
from intern.runs.directory import Run, resolve

if TYPE_CHECKING:
    from intern.evaluation.evaluate import Evaluation


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Compares base and adapter, or two runs, on the golden rows."""
    run = resolve(cfg.run_dir)
    against = resolve(cfg.against) if cfg.against else None
    from intern.evaluation.evaluate import as_json, evaluate  # heavy: keeps --help and a wrong run_dir fast
    from intern.evaluation.report import write_report

    evaluation = evaluate(cfg, run, against)
    write_report(evaluation)
    run.write_json(Run(evaluation.folder).metrics, as_json(evaluation))
    _show(evaluation)
    if cfg.harness.tasks:
        _standard_tasks(cfg, run, evaluation.folder / "harness.json")


def _standard_tasks(cfg: DictConfig, run: Run, target: Path) -> None:
    from dataclasses import asdict

    from intern.display.table import show
    from intern.evaluation.lm_eval_tasks import score_tasks
    from intern.inference.answer import Intern

    intern = Intern(run, cfg.generation, cfg.base_model)
    tasks = [str(task) for task in cfg.harness.tasks]
    scores = score_tasks(intern, tasks, cfg.harness.limit, cfg.harness.include_path, cfg.batch_size, cfg.seed)
    run.write_json(target, {"limit": cfg.harness.limit, "scores": [asdict(score) for score in scores]})
    sys.stdout.write("\n")
    show(
        ["standard task", "metric", "rows", "base", "adapter", "difference"],
        [
            [
                score.task,
                score.metric,
                str(score.rows),
                _with_error(score.base, score.base_error),
                _with_error(score.adapter, score.adapter_error),
                f"{score.adapter - score.base:+.3f}",
            ]
            for score in scores
        ],
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _show(evaluation: "Evaluation") -> None:
    from intern.display.table import show
    from intern.evaluation.report import notes

    first, second = (side.name for side in evaluation.sides)
    table = []
    for group in evaluation.groups:
        if group.kind == "topic":
            continue
        loss, f1, ended = (group.scores[name] for name in ("loss", "token_f1", "stopped"))
        losses_known = loss.before.value and loss.after.value is not None and loss.difference.value is not None
        table.append(
            [
                group.label,
                *(_number(loss.before.value, ".2f"), _number(loss.after.value, ".2f")),
                f"{(loss.after.value or 0) / loss.before.value - 1:+.0%}"
                if losses_known and loss.before.value
                else "-",
                *(_number(f1.before.value, ".3f"), _number(f1.after.value, ".3f")),
                f"{(f1.after.value or 0) / f1.before.value:.1f} x" if f1.before.value else "-",
                *(_number(ended.before.value, ".0%"), _number(ended.after.value, ".0%")),
            ]
        )
    columns = ["golden rows", f"loss: {first}", second, "", f"token F1: {first}", second, "", f"ended: {first}", second]
    show(columns, table)
    sys.stdout.write(
        "".join(f"\n{note}" for note in notes(evaluation)) + f"\nreport: {evaluation.folder / 'report.html'}\n"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


if __name__ == "__main__":
    main()
