"""python -m intern.preview experiment=tiny_cpu row=17"""

from omegaconf import DictConfig

from intern.cli.command import command
from intern.model.preload import importing
from intern.training.quick_check import check_quickly


@command("preview")
def main(cfg: DictConfig) -> None:
    """Shows training rows as the model will see them, and checks all of them."""
    from rich.console import Console

    from intern.inspection.check import raise_if_red

    check_quickly(cfg, asks_gpu=False)
    with importing():
        from intern.inspection.preview import examine  # heavy: keeps --help fast

    raise_if_red(examine(cfg, Console()), "preview")


if __name__ == "__main__":
    main()
