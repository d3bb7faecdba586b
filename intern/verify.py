"""python -m intern.verify experiment=tiny_cpu"""

import subprocess
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from intern.cli.arguments import quoted
from intern.cli.command import command
from intern.cli.start import open_logs
from intern.config.secrets import from_environment
from intern.errors import RunError, UserError
from intern.model.preload import importing
from intern.runs.directory import Run
from intern.training.quick_check import check_quickly


@command("verify")
def main(cfg: DictConfig) -> None:
    """Train once straight and once with a stop, each in a process of its own, and compare everything that is left."""
    check_quickly(cfg, asks_gpu=True)
    with importing():
        from intern.display.table import show
        from intern.inspection.resume_check import FEWEST_STEPS, check_plan, diff_runs, short_config, stop_after

    if not isinstance(cfg.steps, int) or cfg.steps < FEWEST_STEPS:
        raise UserError(f"steps={cfg.steps}: must be a whole number, at least {FEWEST_STEPS}")
    folder, half = Path(HydraConfig.get().runtime.output_dir), cfg.steps // 2
    straight, stopped, again = (Run(folder / name) for name in ("straight", "resumed", "again"))
    short = short_config(cfg, cfg.steps, half)
    check_plan(short, straight)
    open_logs()
    straight.path.mkdir()
    straight.write_config(short)
    again_given = [f"{key}={value}" for key, value in from_environment(short).items()]
    _train(straight, again_given)
    stop_after(straight, half, stopped)
    _train(stopped, again_given)
    parts = list(diff_runs(straight, stopped, cfg.steps))
    show(
        ["after the last step", "values", "differ", "by at most"],
        [[part.name, str(part.values), str(part.differ), f"{part.largest:.3g}"] for part in parts],
    )
    if not any(part.differ for part in parts):
        sys.stdout.write(
            f"A run that stops after step {half} and resumes ends bit for bit like one that never stopped.\n"
        )
        return
    # Does this machine repeat itself at all? Resume once more from the same checkpoint.
    stop_after(straight, half, again)
    _train(again, again_given)
    repeats = not any(part.differ for part in diff_runs(stopped, again, cfg.steps))
    reason = (
        "two resumes from the same checkpoint agree, so something is lost at a stop"
        if repeats
        else "two resumes from the same checkpoint differ too, so computation is not deterministic here"
    )
    raise RunError(f"a resumed run differs from a straight one ({reason}): see {folder}")


def _train(run: Run, again_given: list[str]) -> None:
    """Train in a process of its own; its messages go to standard error, so that standard output has only the table.

    Args:
        run: a run to resume.
        again_given: overrides that its configuration does not hold: values from the environment.
    """
    line = [sys.executable, "-m", "intern.train", quoted("resume", str(run.path)), *again_given]
    if (code := subprocess.run(line, check=False, stdout=sys.stderr).returncode) != 0:
        raise RunError(f"training in {run.path} ended with exit code {code}: see its messages above")


if __name__ == "__main__":
    main()
