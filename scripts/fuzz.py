"""python scripts/fuzz.py --minutes 10

Tries the properties of tests/fuzz_properties.py with random inputs and prints how many there were; a failure is shrunk and shown. Inputs that
failed are kept in .hypothesis/ and tried first the next time.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from fuzz_properties import PROPERTIES

_SLOW = [HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large, HealthCheck.filter_too_much]
_ROUND = {"template": 20, "run": 100}  # examples of a property before the next one has its turn


def _counted(check: Callable[[Any], None], tried: dict[str, int], name: str) -> Callable[[Any], None]:
    def counted(found: Any) -> None:
        tried[name] += 1
        check(found)

    return counted


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    end, tried, failed, number = time.monotonic() + 60 * asked.minutes, dict.fromkeys(PROPERTIES, 0), set(), asked.seed
    while time.monotonic() < end:
        for name, (check, inputs) in PROPERTIES.items():
            if name in failed or time.monotonic() > end:
                continue

            number += 1
            database = DirectoryBasedExampleDatabase(Path(".hypothesis") / "fuzz" / name.replace(" ", "_"))
            chosen = settings(
                max_examples=_ROUND.get(name, 300),
                deadline=None,
                database=database,
                suppress_health_check=_SLOW,
                phases=[Phase.reuse, Phase.generate, Phase.shrink],
            )
            try:
                seed(number)(chosen(given(inputs)(_counted(check, tried, name))))()
            except Exception:  # of any kind: that is what is looked for
                failed.add(name)
                print(f"== {name} (seed {number})\n{traceback.format_exc()}", flush=True)
    total = ", ".join(f"{name} {count:,}" for name, count in tried.items())
    print(
        f"seed {asked.seed}, {asked.minutes:g} minutes, inputs: {total}; failed: {', '.join(sorted(failed)) or 'none'}"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
