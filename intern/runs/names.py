"""The name that a user gave a run, and what a run is called in tables and messages."""

from pathlib import Path

from intern.errors import UserError
from intern.runs.directory import Run
from intern.runs.untrusted import yaml_mapping

MAX_NAME = 100  # characters; W&B allows 128, and the job of a sweep has its number appended
_WORDS = ("latest", "best", "null")  # of run_dir=


def name_fault(name: str) -> str | None:
    """Return why a text cannot be a run's name, as the end of a message; None if it can.

    Args:
        name: of at least one character.
    """
    if not name.isprintable():
        return "must be one line of printable characters"
    if name != name.strip() or name.startswith(("-", "~", ".", "/")) or name.endswith("/"):
        return "must begin with a letter, a digit or another sign than - ~ . and /, and end with neither a slash nor a space"
    return f"{name} is a word that run_dir= has a meaning for: choose another name" if name in _WORDS else None


def given_name(run: Run) -> str | None:
    """Return the name that a run was given with name=, None if it has none or its configuration cannot be read."""
    try:
        name = yaml_mapping(run.config, run.path).get("name")
    except (UserError, OSError):
        return None
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= 2 * MAX_NAME else None


def called(run: Run, root: Path | None = None) -> str:
    """Return what messages call a run: its folder, with its name before it if it has one.

    Args:
        run: the run.
        root: a folder below it is shown without this part; None: the whole path is shown.
    """
    folder = str(run.path.relative_to(root) if root is not None and run.path.is_relative_to(root) else run.path)
    name = given_name(run)
    return f"{name} ({folder})" if name else folder
