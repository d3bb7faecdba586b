"""python -m intern.runs state=finished sort_by=score"""

from pathlib import Path

from omegaconf import DictConfig, ListConfig

from intern.cli.command import command
from intern.errors import UserError


@command("runs", free_text=("runs", "match", "show", "pack", "out"))
def main(cfg: DictConfig) -> None:
    """List runs; show, pack or remove them."""
    from intern.listing.actions import (
        chosen_runs,
        pack_one,
        remove_some,
        show_list,
        show_one,
    )  # not for --help: YAML and rich

    _check(cfg)
    if cfg.show is not None:
        show_one(str(cfg.show))
    elif cfg.pack is not None:
        pack_one(str(cfg.pack), Path(cfg.out).expanduser() if cfg.out is not None else None)
    else:
        runs = list(cfg.runs) if isinstance(cfg.runs, ListConfig) else cfg.runs
        chosen = chosen_runs(runs, _states(cfg.state), cfg.match, str(cfg.sort_by))
        if cfg.remove is not None or cfg.keep_best is not None:
            remove_some(chosen, cfg.remove, cfg.keep_best, cfg.yes)
        else:
            is_filtered = any(cfg[key] is not None for key in ("runs", "state", "match"))
            show_list(chosen, is_filtered)


def _states(given: object) -> list[str]:
    if given is None:
        return []
    if isinstance(given, ListConfig):
        return [str(state) for state in given]
    return [state.strip() for state in str(given).split(",")]


def _check(cfg: DictConfig) -> None:
    """Check that one thing is asked for, with values of the right types."""
    asked = [key for key in ("show", "pack") if cfg[key] is not None]
    asked += ["remove"] if cfg.remove is not None or cfg.keep_best is not None else []
    if len(asked) > 1:
        raise UserError(f"{' and '.join(f'{key}=' for key in asked)}: give one of them at a time")
    if cfg.remove not in (None, "checkpoints", "failed"):
        raise UserError(f"remove={cfg.remove}: must be checkpoints or failed; for whole finished runs, keep_best=N")
    if cfg.keep_best is not None and (
        isinstance(cfg.keep_best, bool) or not isinstance(cfg.keep_best, int) or cfg.keep_best < 1
    ):
        raise UserError(f"keep_best={cfg.keep_best}: must be a number of runs, at least 1")
    if cfg.keep_best is not None and cfg.remove == "failed":
        raise UserError("remove=failed keep_best=...: failed runs have no score: give one of them at a time")
    if not isinstance(cfg.yes, bool):
        raise UserError(f"yes={cfg.yes}: must be true or false")
    if cfg.out is not None and cfg.pack is None:
        raise UserError(f"out={cfg.out}: only pack= writes a file")


if __name__ == "__main__":
    main()
