"""python -m intern.compare runs=multirun/2025-01-31/12-00-00"""

import sys
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from intern.cli.command import command
from intern.errors import UserError

_MOST_OTHERS = 10  # runs that cannot be compared, in the terminal


@command("compare", free_text=("runs",))
def main(cfg: DictConfig) -> None:
    """Compares runs: table, plots, and the best one."""
    from rich.console import Console

    from intern.display.table import show
    from intern.evaluation.run_report import advice, narrowed, notes, others, table, write_overview
    from intern.evaluation.run_table import given_paths, read_runs  # not for --help: YAML, matplotlib and rich

    if not isinstance(cfg.top, int) or cfg.top < 1:
        raise UserError(f"top={cfg.top}: must be at least 1")
    paths = given_paths(list(cfg.runs) if isinstance(cfg.runs, ListConfig) else cfg.runs)
    runs = read_runs(paths, str(cfg.sort_by), cfg.evaluation)
    folder = Path(cfg.output_dir).expanduser() if cfg.output_dir else _default_folder(paths)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={folder}: cannot be made ({error.strerror})") from error
    said = [*notes(runs), *advice(runs, paths, everything=cfg.runs is None)]
    write_overview(runs, folder, said, str(cfg.sort_by))
    if runs.finished:
        columns, rows = table(runs, runs.finished[: cfg.top], brief=True)
        console = Console()
        show(*(narrowed(columns, rows, console.width) if console.is_terminal else (columns, rows)))
    if len(runs.finished) > cfg.top:
        sys.stdout.write(f"\n{len(runs.finished) - cfg.top} more runs in {folder / 'compare.md'}\n")
    if runs.others:
        total, shown = len(runs.others), min(len(runs.others), _MOST_OTHERS)
        some = f"; {shown} of them" if shown < total else ""
        sys.stdout.write(f"\n{total} of {total + len(runs.finished)} runs cannot be compared{some}:\n\n")
        show(*others(runs, shown), texts=3)
    sys.stdout.write("".join(f"\n{line}" for line in [*said, f"files: {folder}"]) + "\n")


def _default_folder(paths: list[str]) -> Path:
    """In the sweep itself, where it is the only folder; never in a run."""
    if len(paths) == 1 and (only := Path(paths[0]).expanduser()).is_dir() and not (only / "config.yaml").is_file():
        return only / "comparison"
    return Path("comparison")


if __name__ == "__main__":
    main()
