"""What the C library does with the memory of a step on the CPU."""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h."""
LARGE = 32 * 2**20
KEPT = 512 * 2**20


def tune_allocator() -> None:
    """Large tensors on the CPU get pages of their own, huge ones; of what smaller ones leave behind the heap is kept.

    A tensor of 32 MB and more gives its pages back when it is freed, and huge pages make it cheap to fault them in
    again. Smaller ones come from the heap, whose free end glibc would give back over and over within a step, to fault
    it in anew each time: that cost a seventh of a step. torch looks for its setting at its first tensor, so this comes
    before any. Whoever has set one of the variables keeps it. Only Linux with glibc is changed.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        mallopt(MMAP_THRESHOLD, LARGE)
        mallopt(TRIM_THRESHOLD, KEPT)
