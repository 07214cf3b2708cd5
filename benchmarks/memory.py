"""Outputs in memory that the process already holds, for every contender alike.

The C library gives large blocks back to the system when they are freed; the next output of the size then costs page
faults and zeroing, as much as the op itself. Told to keep them, it hands the same pages out again: what remains is
what a caller with preallocated outputs pays.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's malloc.h
_KEEP_ALL = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask the C library to reuse freed memory. False where it cannot be asked (not glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _KEEP_ALL))
