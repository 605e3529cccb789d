"""What becomes of memory that tensors on a CPU give back.

glibc returns large blocks to the kernel, which gives the next step other pages, zeroed, one fault for each of 4 KiB: up to a
third of a step of large batches. Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of mallopt, in malloc.h
NEVER = -1
MIB = 2**20


def keep_freed_memory(keep: bool = True) -> bool:
    """Whether freed memory now stays with the process for the next step; a user's own ``MALLOC_`` variables are left alone.

    Args:
        keep: False goes back to what glibc comes to by itself after some large blocks.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    if keep:
        return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, NEVER))
    mallopt(MMAP_MAX, 65536)
    mallopt(MMAP_THRESHOLD, 32 * MIB)
    mallopt(TRIM_THRESHOLD, 64 * MIB)
    return False
