"""Row-wise work on the CPU: blocks of rows shared out over threads, and the arithmetic that all of it needs.

The blocks depend on the shape alone, never on the number of threads, and each writes to a place of its own: the
result has the same bits on any number of threads.
"""

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import float32, int32
from torch import Tensor

from fastpmae_kernels.cpu.compiled import compiled

BLOCK = 64
"""Rows a thread takes at a time, at least."""


def row_blocks(rows: int) -> list[tuple[int, int]]:
    """First row and end of each block: few enough that one partial result a block costs little memory."""
    size = max(BLOCK, -(-rows // 256))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _team() -> Any:
    """GNU OpenMP's entry to the threads that torch's own operators run on; None where torch has others.

    For some milliseconds after an operator these wait at full speed: threads of our own would have to share the cores
    with them, which made a call of 20 milliseconds a quarter slower.
    """
    for library in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        run = ctypes.CDLL(str(library)).GOMP_parallel
        run.argtypes, run.restype = (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return run
    return None


def share_out(blocks: list[tuple[int, int]], work: Callable[[int, int, int], None]) -> None:
    """Call `work(block, start, stop)` for every block, on as many threads as torch uses: its own where they can be."""
    turns, failures = itertools.count(), []

    def take_turns(_: object = None) -> None:
        try:
            while not failures and (turn := next(turns)) < len(blocks):
                work(turn, *blocks[turn])
        except BaseException as failure:
            failures.append(failure)

    threads = min(torch.get_num_threads(), len(blocks))
    if threads > 1 and (run := _team()):
        run(_BODY(take_turns), None, threads, 0)
    else:
        helpers = [threading.Thread(target=take_turns) for _ in range(threads - 1)]
        for helper in helpers:
            helper.start()
        take_turns()
        for helper in helpers:
            helper.join()
    if failures:
        raise failures[0]


def as_fp32(rows: Tensor) -> np.ndarray:
    """The rows themselves where they are fp32 and contiguous, else a copy."""
    return rows.detach().to(torch.float32).contiguous().numpy()


@compiled("contract")
def exponential(x):
    """exp(x) for x <= 88 to 1.5 units in the last place, in steps that LLVM turns into vector instructions.

    x = n log(2) + r with |r| <= log(2) / 2; a polynomial of degree 7 for exp(r); 2^n by the exponent bits. Adding
    1.5 x 2^23 rounds to an integer and leaves it in the low bits, which unlike a conversion is sound for NaN too:
    NaN gives NaN. Below -87 (exp: 1.6e-38) the result is 0.
    """
    vanishes = x < float32(-87.0)
    x = float32(-87.0) if vanishes else x
    shifted = float32(x * float32(1.4426950408889634) + float32(12582912.0))
    n = shifted - float32(12582912.0)
    r = x - n * float32(0.693145751953125)
    r = r - n * float32(1.428606765330187e-06)
    p = float32(1.0 / 5040.0)
    p = p * r + float32(1.0 / 720.0)
    p = p * r + float32(1.0 / 120.0)
    p = p * r + float32(1.0 / 24.0)
    p = p * r + float32(1.0 / 6.0)
    p = p * r + float32(0.5)
    p = p * (r * r) + r + float32(1.0)
    power = int32((float32(shifted).view(int32) + int32(127)) << int32(23))
    return float32(0.0) if vanishes else p * int32(power).view(float32)


@compiled("nnan", "nsz", "reassoc")
def maximum(row):
    """The row's maximum; with a NaN in the row, any of its values."""
    peak = float32(-np.inf)
    for j in range(row.size):
        peak = max(peak, row[j])
    return peak


@compiled("reassoc", "nsz")
def added(row):
    """The row's sum, in the order of vector instructions.

    A function that may reorder a sum reads one array and writes none: where it wrote one and read another, LLVM would
    compare their addresses as it runs and add one by one when they lie within a few vectors of each other, so that the
    bits depended on where the memory allocator had put them.
    """
    total = float32(0.0)
    for j in range(row.size):
        total += row[j]
    return total
