"""python scripts/unbounded.py

Prints the names of all dependencies in pyproject.toml without their version bounds, one per line: `make test-upstream` installs the
newest release of each.
"""

import tomllib

from packaging.requirements import Requirement

from intern.paths import PROJECT

GPU_ONLY = "gpu"  # this extra needs a CUDA device


def main() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [one for name, extra in project["optional-dependencies"].items() if name != GPU_ONLY for one in extra]
    for name in sorted({Requirement(one).name for one in [*project["dependencies"], *extras]}):
        print(name)


if __name__ == "__main__":
    main()
