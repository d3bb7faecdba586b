"""python -m intern.evaluate run_dir=latest"""

from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from intern.cli.command import command
from intern.errors import UserError
from intern.runs.directory import Run
from intern.runs.find import resolve, resolve_all


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Compare base and adapter, or two runs, on the golden rows."""
    if not isinstance(cfg.best_only, bool):
        raise UserError(f"best_only={cfg.best_only}: must be true or false")
    is_one = cfg.best_only or cfg.run_dir in ("latest", "best")
    runs = [resolve(cfg.run_dir)] if is_one else resolve_all(cfg.run_dir)
    against = resolve(cfg.against) if cfg.against else None
    from intern.evaluation.many import (  # heavy from here on: keeps a wrong run_dir fast
        evaluate_all,
        evaluate_and_store,
    )
    from intern.evaluation.terminal import show_evaluation

    if len(runs) > 1:
        if cfg.harness.tasks:
            raise UserError("harness.tasks: for one run at a time: add best_only=true, or give a run's folder")
        evaluate_all(cfg, runs, against, str(cfg.run_dir))
        return
    evaluation = evaluate_and_store(cfg, runs[0], against)
    show_evaluation(evaluation)
    if cfg.harness.tasks:
        _score_tasks(cfg, runs[0], evaluation.folder)


def _score_tasks(cfg: DictConfig, run: Run, folder: Path) -> None:
    """Score base and adapter on standard tasks, store the scores in an evaluation's folder and print them."""
    from intern.evaluation.lm_eval_tasks import score_tasks
    from intern.evaluation.terminal import show_tasks
    from intern.inference.answer import Intern
    from intern.runs.disk import explain_disk_errors

    intern = Intern(run, cfg.generation, cfg.base_model)
    harness, tasks = cfg.harness, list(cfg.harness.tasks)
    scores = score_tasks(intern, tasks, harness.limit, harness.include_path, cfg.batch_size, cfg.seed)
    with explain_disk_errors(run.evaluation, "make it writable or free some space, then run the same command again"):
        content = {"limit": harness.limit, "scores": [asdict(score) for score in scores]}
        run.write_json(folder / "harness.json", content)
    show_tasks(scores)


if __name__ == "__main__":
    main()
