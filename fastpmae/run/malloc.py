"""What the C library does with the memory of a step on the CPU."""

import ctypes
import os
import sys

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h."""
LARGE = 128 * 2**20
NEVER = -1


def tune_allocator(device: torch.device) -> None:
    """The pages of a step's tensors on a CPU stay for the next step; with another device nothing is changed.

    glibc would give those of tensors of 32 MB and more, and what is free at the end of its heap, back to the system
    when they are freed, and take them anew, filled with zeros, at the next tensor: several times within each step, for
    a tenth of its time. Here tensors of up to 128 MB come from the heap, whose end is never given back. Whoever has set
    one of the variables keeps it. Only Linux with glibc is changed.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGE)
        mallopt(TRIM_THRESHOLD, NEVER)
