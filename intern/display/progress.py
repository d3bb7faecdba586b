"""The progress bars of the datasets library: shown for work that takes long, hidden otherwise, and left as they were."""

import contextlib
from collections.abc import Iterator

LONG_DATA = 20_000  # rows from which tokenizing and packing take long enough for a progress bar


@contextlib.contextmanager
def hidden_bars(hide: bool) -> Iterator[None]:
    """Hide the bars within the block, then restore the process's own setting.

    Args:
        hide: False leaves the setting as it is.
    """
    import datasets  # not at the top: the doctor runs where this library does not load

    were_hidden = datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_hidden:
            datasets.enable_progress_bars()


def progress_bars(rows: int) -> contextlib.AbstractContextManager[None]:
    """Hide the bars within the block if it works on fewer than LONG_DATA rows.

    Args:
        rows: how many rows are processed.
    """
    return hidden_bars(rows < LONG_DATA)
