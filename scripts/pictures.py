"""python scripts/pictures.py

Draw docs/preview.svg and docs/doctor.svg: the output of `python -m intern.preview experiment=tiny_cpu rows=1 lengths=null` and
`python -m intern.doctor experiment=tiny_cpu` in a terminal of 110 columns.
"""

import io
import re
from collections.abc import Callable

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console
from rich.terminal_theme import MONOKAI

from intern.inspection.check import show_checks
from intern.inspection.doctor import diagnose
from intern.inspection.preview import examine
from intern.paths import CONF_DIR, PROJECT

COLUMNS = 110


def draw(name: str, overrides: list[str], tell: Callable[[DictConfig, Console], object]) -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose(name, overrides)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=COLUMNS, record=True)
    console.print(f"[bold]$ python -m intern.{name} {' '.join(overrides)}[/bold]\n", highlight=False)
    tell(cfg, console)
    picture = console.export_svg(title=f"intern.{name}", theme=MONOKAI, unique_id=name)
    # rich would fetch its fonts from the network; the viewer's own monospace font is good enough.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL).replace("Fira Code", "ui-monospace")
    target = PROJECT / "docs" / f"{name}.svg"
    target.write_text(picture, encoding="utf-8")
    print(f"{target.relative_to(PROJECT)}: {target.stat().st_size:,} bytes")


def main() -> None:
    draw("preview", ["experiment=tiny_cpu", "rows=1", "lengths=null"], examine)
    draw("doctor", ["experiment=tiny_cpu"], lambda cfg, console: show_checks(diagnose(cfg), console))


if __name__ == "__main__":
    main()
