"""python -m intern.evaluate run_dir=latest"""

from dataclasses import asdict

from omegaconf import DictConfig

from intern.cli.command import command
from intern.runs.directory import Run
from intern.runs.find import resolve


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Compare base and adapter, or two runs, on the golden rows."""
    run = resolve(cfg.run_dir)
    against = resolve(cfg.against) if cfg.against else None
    from intern.evaluation.evaluate import as_json, evaluate
    from intern.evaluation.report import write_report
    from intern.evaluation.terminal import show_evaluation, show_tasks
    from intern.runs.disk import explain_disk_errors  # heavy from here on: keeps --help and a wrong run_dir fast

    remedy = "make it writable or free some space, then run the same command again: finished answers are kept"
    with explain_disk_errors(run.evaluation, remedy):
        evaluation = evaluate(cfg, run, against)
        write_report(evaluation)
        run.write_json(Run(evaluation.folder).metrics, as_json(evaluation))
        show_evaluation(evaluation)
        if cfg.harness.tasks:
            from intern.evaluation.lm_eval_tasks import score_tasks
            from intern.inference.answer import Intern

            intern = Intern(run, cfg.generation, cfg.base_model)
            harness, tasks = cfg.harness, list(cfg.harness.tasks)
            scores = score_tasks(intern, tasks, harness.limit, harness.include_path, cfg.batch_size, cfg.seed)
            content = {"limit": harness.limit, "scores": [asdict(score) for score in scores]}
            run.write_json(evaluation.folder / "harness.json", content)
            show_tasks(scores)


if __name__ == "__main__":
    main()
