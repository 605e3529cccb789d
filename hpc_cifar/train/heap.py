"""What becomes of memory that tensors on a CPU give back.

glibc returns large blocks to the kernel, which gives the next step other pages, zeroed, with a fault for each of 4 KiB
(tests/train/test_heap.py counts them). Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt, in malloc.h
NEVER = -1
CHOSEN = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Whether freed memory now stays with the process for the next step; what a user has chosen for glibc is left alone."""
    if any(name in os.environ for name in CHOSEN) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, NEVER))
