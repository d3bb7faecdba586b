"""python -m intern.doctor model=llama3_8b quant=nf4_fp16"""

import sys

from omegaconf import DictConfig

from intern.cli.command import command
from intern.errors import UserError
from intern.model.preload import importing


@command("doctor")
def main(cfg: DictConfig) -> None:
    """Says whether the training run of the same groups can run here, and what to do where it cannot."""
    if cfg.format not in ("table", "json"):
        raise UserError(f"format={cfg.format}: must be table or json")
    from rich.console import Console

    from intern.inspection.check import as_json, raise_if_red, show_checks
    from intern.inspection.doctor import diagnose, plan_for_card
    from intern.inspection.planned_run import read_own_keys

    card, _ = read_own_keys(cfg)
    with importing():  # each check imports what it looks at
        checks, run = plan_for_card(cfg, card) if card is not None else (diagnose(cfg), None)
    from intern.inspection.plan_display import plan_values, show_plan

    if cfg.format == "json":
        sys.stdout.write(as_json(checks, plan_values(run) if run is not None else None) + "\n")
    else:
        show_checks(checks, Console())
        if run is not None:
            show_plan(run)
    raise_if_red(checks, "doctor")


if __name__ == "__main__":
    main()
