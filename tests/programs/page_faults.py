"""Page faults of ten tensors of 20 MB, and of four of 64 MB, where as many have just been freed.

`python -m tests.programs.page_faults with|without`: with tune_allocator() or without.
"""

import ctypes
import resource
import sys

import torch

from fastpmae.run.malloc import tune_allocator

PR_SET_THP_DISABLE = 41


def faults(count: int, millions: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(millions << 20) for _ in range(count)]
    assert len(tensors) == count  # all of them at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


if __name__ == "__main__":
    # A huge page is one fault or 512, as the kernel has one free or not: here every page is a small one.
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    if sys.argv[1] == "with":
        tune_allocator(torch.device("cpu"))
    small = [torch.ones(1) for _ in range(1000)]
    del small  # what is small finds room here, and never lies at the heap's end, where it would keep all below it
    faults(10, 5)
    faults(4, 16)
    print(faults(10, 5), faults(4, 16))
