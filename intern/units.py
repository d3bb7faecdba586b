"""Units of size."""

MIB = 2**20  # bytes
GIB = 2**30  # bytes
