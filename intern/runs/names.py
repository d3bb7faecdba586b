"""The name that a user gave a run, and what a run is called in tables and messages."""

from pathlib import Path

from intern.display.text import visible
from intern.errors import UserError
from intern.runs.directory import Run
from intern.runs.untrusted import yaml_mapping

MAX_NAME = 100  # characters; W&B allows 128, and the job of a sweep has its number appended
_LONGEST_NOTES = 2000  # characters
_WORDS = ("latest", "best", "null")  # of run_dir=


def words_fault(name: object, notes: object) -> str | None:
    """Return why name= or notes= cannot be what they are given as, as a message; None if they can.

    Args:
        name, notes: values of the keys; None if they are not given.
    """
    for key, value, longest in (("name", name, MAX_NAME), ("notes", notes, _LONGEST_NOTES)):
        if value is None:
            continue
        if not isinstance(value, str):
            return f"{key}={value}: must be text; in a file, put it in quotes"
        if not value.strip() or len(value) > longest:
            return f"{key}={value[:40]}: must have 1 to {longest} characters"
    fault = _name_fault(name) if isinstance(name, str) else None
    return f"name={name}: {fault}" if fault else None


def _name_fault(name: str) -> str | None:
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
    return visible(f"{name} ({folder})" if name else folder)
