"""Units of size."""

MIB = 2**20  # bytes
GIB = 2**30  # bytes


def in_words(size: int) -> str:
    """Return a number of bytes with a unit: "1.2 GiB", "31 MiB", "740 KiB"."""
    if size >= GIB:
        return f"{size / GIB:.1f} GiB"
    return f"{size / MIB:.0f} MiB" if size >= MIB else f"{-(-size // 1024)} KiB"
