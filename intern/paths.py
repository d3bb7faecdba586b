"""Where conf/ and the shipped data are, in a checkout and in an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries conf/ and data/ in a folder of its own inside the package; in a checkout they are the package's neighbours.
PROJECT = _PACKAGE / "_project" if (_PACKAGE / "_project").is_dir() else _PACKAGE.parent
CONF_DIR = PROJECT / "conf"


def find(path: str | Path) -> Path | None:
    """The existing file or folder that `path` means, absolute: in the working directory first, then in the project; None if in neither."""
    for base in (Path.cwd(), PROJECT):
        try:
            if (candidate := base / Path(path).expanduser()).exists():
                return candidate.resolve()
        except (OSError, RuntimeError, ValueError):  # a name that is too long, a ring of links, an unknown ~user, a NUL
            return None
    return None
