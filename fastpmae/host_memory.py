"""What the C library does with the memory of a step on the CPU."""

import ctypes
import os
import sys

MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h."""
LARGE = 8 * 2**20


def give_back_at_once() -> None:
    """Large tensors on the CPU get pages of their own, huge ones, and give them back when they are freed.

    glibc keeps what was freed, up to 32 MB at a time, in pieces that the next tensor may not fit: a tenth to a seventh
    of a step's peak. Pages that are given back have to be faulted in again, which huge pages make cheap; torch looks
    for this setting at its first tensor, so this comes before any. Whoever has set either variable keeps it. Only Linux
    with glibc is changed.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(MMAP_THRESHOLD, LARGE)
