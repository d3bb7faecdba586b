"""python -m intern.compare runs=multirun/2025-01-31/12-00-00"""

from pathlib import Path

from omegaconf import DictConfig, ListConfig

from intern.cli.command import command
from intern.errors import UserError


@command("compare", free_text=("runs",))
def main(cfg: DictConfig) -> None:
    """Compare runs: table, plots, and the best one."""
    from intern.comparison.files import write_overview
    from intern.comparison.groups import given_paths, read_runs  # not for --help: YAML, matplotlib and rich
    from intern.comparison.table import advice, notes
    from intern.comparison.terminal import show_runs
    from intern.runs.disk import explain_disk_errors

    if isinstance(cfg.top, bool) or not isinstance(cfg.top, int) or cfg.top < 1:
        raise UserError(f"top={cfg.top}: must be at least 1")
    paths = given_paths(list(cfg.runs) if isinstance(cfg.runs, ListConfig) else cfg.runs)
    runs = read_runs(paths, str(cfg.sort_by), cfg.evaluation)
    folder = Path(cfg.output_dir).expanduser() if cfg.output_dir else _default_folder(paths)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={folder}: cannot be created ({error.strerror})") from error
    said = [*notes(runs), *advice(runs, paths, everything=cfg.runs is None)]
    with explain_disk_errors(folder, "free some space there, or name another folder with output_dir=..."):
        write_overview(runs, folder, said, str(cfg.sort_by))
    show_runs(runs, cfg.top, folder, said)


def _default_folder(paths: list[str]) -> Path:
    """Return the sweep's own folder if it is the only one given; never a run's."""
    if len(paths) == 1 and (only := Path(paths[0]).expanduser()).is_dir() and not (only / "config.yaml").is_file():
        return only / "comparison"
    return Path("comparison")


if __name__ == "__main__":
    main()
