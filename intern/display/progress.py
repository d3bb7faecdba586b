"""The progress bars of the datasets library: shown for work that takes long, hidden otherwise, and left as they were."""

import contextlib
from collections.abc import Iterator

LONG_DATA = 20_000  # rows from which tokenizing and packing take long enough for a progress bar


@contextlib.contextmanager
def progress_bars(rows: int) -> Iterator[None]:
    """Hide the bars within the block if it works on fewer than LONG_DATA rows, then restore the process's own setting.

    Args:
        rows: how many rows are processed.
    """
    import datasets  # not at the top: the doctor runs where this library does not load

    hidden = datasets.are_progress_bars_disabled()
    if rows < LONG_DATA:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
