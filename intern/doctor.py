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
    from intern.inspection.doctor import diagnose

    with importing():  # each check imports what it looks at
        checks = diagnose(cfg)
    if cfg.format == "json":
        sys.stdout.write(as_json(checks) + "\n")
    else:
        show_checks(checks, Console())
    raise_if_red(checks, "doctor")


if __name__ == "__main__":
    main()
