"""Rows of more prototypes than one program's registers hold, in the Triton form: tile after tile of prototypes.

Short rows are read once and kept (`sinkhorn.py`, `prototype_loss.py`). Here a row is read twice, by Sinkhorn's sweep
as by the loss: for its maximum and sum, then for what is made of them. Any number of prototypes will do.
"""

import torch
from torch import Tensor

from fastpmae_kernels.backend import ceil_div, constexpr, tl, triton

LONGEST_ROW = 16384
"""Prototypes that one program holds in registers."""
TILE = 2048
"""Prototypes of a long row that a program looks at at a time."""
ROWS, COLUMNS = 16, 256
"""Rows and prototypes that a program of the column sums looks at at a time."""
PARTS = 128
"""Of the rows, whose column sums are added up at the end."""


def long_assigned_sums(logits: Tensor, logv: Tensor, epsilon: float, parts: int = PARTS) -> Tensor:
    """`assigned_sums` of rows of any length whose numbers lie side by side."""
    rows, prototypes = logits.shape
    parts = min(parts, max(ceil_div(rows, ROWS), 1))
    peaks = torch.empty(rows, dtype=torch.float32, device=logits.device)
    totals = torch.empty_like(peaks)
    sums = torch.empty((parts, prototypes), dtype=torch.float32, device=logits.device)
    if rows:
        row_peak_kernel[(rows,)](
            logits, logv, peaks, totals, prototypes, logits.stride(0), 1 / epsilon, COLUMNS=TILE, num_warps=4
        )
    column_sums_kernel[(ceil_div(prototypes, COLUMNS), parts)](
        logits, logv, peaks, totals, sums, rows, prototypes, logits.stride(0), ceil_div(rows, parts), 1 / epsilon,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return sums.sum(dim=0)


def long_cross_entropy(
    student: Tensor, teacher: Tensor, logv: Tensor, index: Tensor, loss: Tensor, gradient: Tensor | None,
    epsilon: float, temperature: float, expected: float,
) -> None:  # fmt: skip
    """Fills `loss` and, where there is one, `gradient`, which may be `student` itself; as `cross_entropy_kernel`."""
    written = loss if gradient is None else gradient
    long_cross_entropy_kernel[(len(student),)](
        student, teacher, logv, index, loss, written, len(teacher), student.shape[1],
        student.stride(0), teacher.stride(0), written.stride(0), 1 / epsilon, 1 / temperature, expected / temperature,
        GRADIENT=gradient is not None, COLUMNS=TILE, num_warps=4,
    )  # fmt: skip


@triton.jit
def _taken_in(peak, total, value):
    """A running maximum and the sum relative to it, in each lane, after one more value, by one exponential."""
    smaller = tl.exp(-tl.abs(value - peak))
    total = tl.where(value > peak, total * smaller + 1.0, total + smaller)
    return tl.maximum(peak, value), total


@triton.jit
def _joined(peak, total):
    """The maximum of all lanes, and the sum relative to it."""
    highest = tl.max(peak, axis=0)
    return highest, tl.sum(total * tl.exp(peak - highest), axis=0)


@triton.jit
def row_peak_kernel(logits, logv, peaks, totals, prototypes, stride, scale, COLUMNS: constexpr):
    """Of one row of logits * scale + logv the maximum, and the sum of exp(value - maximum)."""
    row = tl.program_id(0).to(tl.int64)
    peak = tl.full([COLUMNS], -3e38, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, prototypes, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        known = column < prototypes
        value = tl.load(logits + row * stride + column, mask=known, other=0.0).to(tl.float32)
        value = value * scale + tl.load(logv + column, mask=known, other=-float("inf"))
        peak, total = _taken_in(peak, total, value)
    highest, whole = _joined(peak, total)
    tl.store(peaks + row, highest)
    tl.store(totals + row, whole)


@triton.jit
def column_sums_kernel(
    logits, logv, peaks, totals, sums, rows, prototypes, stride, rows_each, scale, ROWS: constexpr, COLUMNS: constexpr
):
    """Column sums of the softmax of one part of the rows, whose maxima and sums are known."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < prototypes
    part = tl.program_id(1)
    first = part * rows_each
    last = tl.minimum(first + rows_each, rows)
    bias = tl.load(logv + column, mask=known, other=0.0)
    assigned = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < last
        place = logits + row.to(tl.int64)[:, None] * stride + column[None, :]
        value = tl.load(place, mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)
        peak = tl.load(peaks + row, mask=inside, other=0.0)
        weight = tl.where(inside, 1.0 / tl.load(totals + row, mask=inside, other=1.0), 0.0)
        value = tl.where(inside[:, None], value * scale + bias[None, :] - peak[:, None], -float("inf"))
        assigned += tl.exp(value) * weight[:, None]
    tl.store(sums + part.to(tl.int64) * prototypes + column, tl.sum(assigned, axis=0), mask=known)


@triton.jit
def long_cross_entropy_kernel(
    student, teacher, logv, index, loss, gradient, labels, prototypes, student_stride, teacher_stride, gradient_stride,
    label_scale, scale, expected, GRADIENT: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    """One student row: both softmaxes' maxima and sums in a first pass, loss and gradient in a second."""
    row = tl.program_id(0).to(tl.int64)
    match = tl.load(index + row).to(tl.int64)
    exists = (match >= 0) & (match < labels)
    student += row * student_stride
    teacher += match * teacher_stride
    gradient += row * gradient_stride
    label_peak = tl.full([COLUMNS], -3e38, tl.float32)
    label_total = tl.zeros([COLUMNS], tl.float32)
    peak = tl.full([COLUMNS], -3e38, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, prototypes, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        known = column < prototypes
        label = tl.load(teacher + column, mask=known & exists, other=0.0).to(tl.float32)
        label = label * label_scale + tl.load(logv + column, mask=known, other=-float("inf"))
        label_peak, label_total = _taken_in(label_peak, label_total, label)
        value = tl.load(student + column, mask=known, other=-float("inf")).to(tl.float32) * scale
        peak, total = _taken_in(peak, total, value)
    label_highest, mass = _joined(label_peak, label_total)
    highest, whole = _joined(peak, total)
    broken = tl.where(exists, 0.0, float("nan"))
    dot = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, prototypes, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        known = column < prototypes
        label = tl.load(teacher + column, mask=known & exists, other=0.0).to(tl.float32)
        label = label * label_scale + tl.load(logv + column, mask=known, other=-float("inf"))
        label = tl.exp(label - label_highest) / mass
        value = tl.load(student + column, mask=known, other=-float("inf")).to(tl.float32) * scale - highest
        # A label of exactly nothing counts nothing, however impossible the student holds that prototype to be.
        dot += tl.where(label == 0.0, 0.0, label * value)
        if GRADIENT:
            slope = (tl.exp(value) / whole - label) * expected + broken
            # The gradient may take the student's place, whose tile all threads have read by then.
            tl.debug_barrier()
            tl.store(gradient + column, slope.to(gradient.dtype.element_ty), mask=known)
    tl.store(loss + row, tl.log(whole) - tl.sum(dot, axis=0) + broken)
