"""conf/COMMAND.yaml -> what --help says about the command's own keys: the comments next to them."""

import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

from intern.paths import CONF_DIR

_LINE = re.compile(r'^(?P<indent> *)"?(?P<key>[\w/]+)"?:(?: +(?P<value>[^#]*?))?(?: +# (?P<comment>.*))?$')
_NOT_OWN = ("defaults", "hydra")  # blocks of a primary configuration that hold no keys of the command
_WIDEST_KEY = 24  # characters


def own_keys(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the keys of a primary configuration with their values and comments; those of a nested group as group.key.

    Args:
        file: conf/COMMAND.yaml. A comment on a line of its own belongs to the key below it if that has none.
    """
    group, above = "", ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("# "):
            above = line.lstrip()[2:]
            continue
        found = _LINE.match(line)
        if found is None:
            above = above if line else ""
            continue
        key, value, comment = found["key"], (found["value"] or "").strip(), found["comment"] or above
        if not found["indent"]:
            group = key if not value else ""
        if group not in _NOT_OWN and value:
            yield f"{group}.{key}" if found["indent"] else key, value, comment
        above = ""


def help_text(name: str, summary: str, example: str) -> str:
    """Return what --help says before Hydra's own text.

    Args:
        name: of the command.
        summary: what it does, in one sentence.
        example: a command line.
    """
    file = CONF_DIR / f"{name}.yaml"
    has_training_keys = name == "train" or bool(
        re.search(r"^  - train$", file.read_text(encoding="utf-8"), re.MULTILINE)
    )
    keys = list(own_keys(file))
    width = min(max(len(key) for key, _, _ in keys), _WIDEST_KEY) + 2
    room = max(40, min(shutil.get_terminal_size().columns, 140) - width - 2)
    lines = [
        f"intern.{name}: {summary}",
        "",
        f"  {example}",
        "",
        "Its own keys, as key=value, with their defaults in brackets:",
        "",
    ]
    for key, value, comment in keys:
        first, *rest = textwrap.wrap(f"{comment} [{value}]", room)
        lines.append(f"  {key:<{width}}{first}")
        lines += [" " * (width + 2) + line for line in rest]
    if has_training_keys:
        lines += [
            "",
            "and every key of the groups below, such as lora.r or trainer.max_steps (conf/GROUP/*.yaml say what each does).",
        ]
    return "\n".join(lines) + "\n\n"
