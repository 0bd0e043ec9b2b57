"""Sinkhorn's sweeps on the CPU, each thread over a block of rows."""

import numpy as np
import torch
from numpy import float32
from torch import Tensor

from fastpmae_kernels.cpu.compiled import compiled
from fastpmae_kernels.cpu.rows import added, as_fp32, exponential, maximum, row_blocks, share_out


def column_logsumexp(logits: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Of each block of rows and column of logits / epsilon the maximum, and the sum of exp(value - maximum)."""
    rows, prototypes = logits.shape
    blocks = row_blocks(rows)
    peaks = np.full((len(blocks), prototypes), -np.inf, np.float32)
    totals = np.zeros((len(blocks), prototypes), np.float32)

    def work(block: int, start: int, stop: int) -> None:
        column_block(as_fp32(logits[start:stop]), float32(1 / epsilon), peaks[block], totals[block])

    share_out(blocks, work)
    return torch.from_numpy(peaks), torch.from_numpy(totals)


def assigned_sums(logits: Tensor, logv: Tensor, epsilon: float) -> Tensor:
    """softmax(logits / epsilon + logv) over the rows, summed down the columns, in one read."""
    rows, prototypes = logits.shape
    blocks = row_blocks(rows)
    sums = np.zeros((len(blocks), prototypes), np.float32)
    bias = as_fp32(logv)

    def work(block: int, start: int, stop: int) -> None:
        assigned_block(as_fp32(logits[start:stop]), float32(1 / epsilon), bias, sums[block])

    share_out(blocks, work)
    return torch.from_numpy(sums).sum(dim=0)


WIDTH = 512
"""Columns of a block that are read for their maxima and, from the processor's cache, once more for their sums."""


@compiled("contract", "nsz")
def column_block(logits, scale, peak, total):
    for start in range(0, logits.shape[1], WIDTH):
        stop = min(start + WIDTH, logits.shape[1])
        _column_tile(logits, start, stop, scale, peak[start:stop], total[start:stop])


@compiled("contract", "nsz")
def _column_tile(logits, start, stop, scale, peak, total):
    """Two rows at a time, so that maxima and sums are fetched and put back half as often.

    Rows are cut out one by one: of a part of the whole matrix numba does not know that its rows are contiguous, and
    without that nothing here becomes vector instructions, which made the sweep four times slower.
    """
    rows = len(logits)
    for r in range(0, rows, 2):
        one, other = logits[r, start:stop], logits[min(r + 1, rows - 1), start:stop]
        for j in range(peak.size):
            higher = one[j] if one[j] > other[j] else other[j]
            peak[j] = higher if higher > peak[j] else peak[j]
    for j in range(peak.size):
        peak[j] = peak[j] * scale
    for r in range(0, rows - 1, 2):
        one, other = logits[r, start:stop], logits[r + 1, start:stop]
        for j in range(peak.size):
            total[j] += exponential(one[j] * scale - peak[j]) + exponential(other[j] * scale - peak[j])
    if rows % 2:
        one = logits[rows - 1, start:stop]
        for j in range(peak.size):
            total[j] += exponential(one[j] * scale - peak[j])
    for j in range(peak.size):
        if peak[j] == -np.inf:
            total[j] = 0.0


LEAST, MOST = 1e-18, 1e30
"""Sums of exponentials between these have lost nothing that counts, whatever was subtracted from their exponents."""


@compiled("contract", "nsz")
def assigned_block(logits, scale, logv, sums):
    """Each row's exponents less an earlier row's maximum, which is near enough nearly always: one pass, not two."""
    rows, prototypes = logits.shape
    values, bias = np.empty(prototypes, np.float32), logv.copy()
    for r in range(rows):
        row = logits[r]
        total = _exponentials(row, scale, bias, values)
        if not float32(LEAST) < total < float32(MOST):
            for j in range(prototypes):
                values[j] = row[j] * scale + logv[j]
            peak = maximum(values)
            for j in range(prototypes):
                bias[j] = logv[j] - peak
            total = _exponentials(row, scale, bias, values)
        weight = float32(1.0) / total
        for j in range(prototypes):
            sums[j] += values[j] * weight


@compiled("contract", "nsz")
def _exponentials(row, scale, bias, values):
    """Writes exp(row x scale + bias), of at most 87, and returns the sum."""
    for j in range(row.size):
        exponent = row[j] * scale + bias[j]
        values[j] = exponential(float32(87.0) if exponent > float32(87.0) else exponent)
    return added(values)
