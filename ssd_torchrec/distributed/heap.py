"""Freed memory stays with the process, so that each training step finds the pages of the one before.

glibc hands the top of its heap back to the system when a step frees its activations, and maps large tensors one by one;
the next step then takes some ten thousand page faults, a tenth of its time. Sources: mallopt(3).
"""

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST = 2**30  # bytes of a tensor that still comes from the heap


def keep_freed_memory() -> bool:
    """Tell the allocator of this process to keep what is freed; returns whether it listens, as glibc alone does.

    The process then holds the most memory it has needed so far until it ends, which training does anyway.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(TRIM_THRESHOLD, 2**31 - 1) and mallopt(MMAP_THRESHOLD, MOST))
