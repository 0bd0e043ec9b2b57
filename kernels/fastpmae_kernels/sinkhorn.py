"""Sinkhorn-Knopp pseudo labels: a balanced soft assignment of rows (tokens) to prototypes.

The iterations of SwAV and DINOv2 divide the columns (prototypes) by their sums over the rows of all ranks, then each
row by its own sum. In logarithms all column divisions add up to one number a prototype, and the last row division is
a softmax, so nothing of size rows x prototypes has to be kept: one pass finds each column's log-sum-exp, and each
further iteration is one pass that sums the rows' softmax. The sums cannot underflow: where every column's
log-sum-exp over N rows is 0, some entry of it is at least -log(N), and no row's sum exceeds the P prototypes, so a
column's sum of row-normalised entries is at least 1 / (N P).
"""

import functools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from fastpmae_kernels import backend
from fastpmae_kernels.backend import ceil_div, constexpr, next_power_of_two, operation, tl, triton
from fastpmae_kernels.cpu import sinkhorn as on_cpu
from fastpmae_kernels.long_rows import LONGEST_ROW, long_assigned_sums


def sinkhorn_bias(
    logits: Float[Tensor, "rows prototypes"],
    epsilon: float = 0.05,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, " prototypes"]:
    """One bias a prototype, `logv`, such that `softmax(logits / epsilon + logv)` is the pseudo label of a row.

    Args:
        logits: the labelling teacher's, in fp32, fp16 or bf16 (float64 takes the plain form); no gradient flows. On
            several ranks each passes its own rows, and the number of rows may differ. Any finite logits are safe.
        epsilon: the temperature of the assignment.
        iterations: how many times columns and rows are normalised; at least 1.
        group: the ranks whose rows are assigned together; None means this process alone.

    Returns:
        `logv` in fp32, the same on every rank and on any number of threads. A prototype whose logits are all -inf,
        or without any row at all, gets 0.

    Raises:
        ValueError: for logits that are not a matrix, fewer than one iteration, or an epsilon that is not positive.

    Source: SwAV (`distributed_sinkhorn`) and DINOv2 (`sinkhorn_knopp_teacher`) define the iterations.
    """
    return sinkhorn_biases([logits], epsilon, iterations, group)[0]


@torch.no_grad()
def sinkhorn_biases(
    logits: Sequence[Float[Tensor, "_rows _prototypes"] | Sequence[Float[Tensor, "_rows _prototypes"]]],
    epsilon: float | Sequence[float] = 0.05,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> list[Float[Tensor, " _prototypes"]]:
    """`sinkhorn_bias` of several matrices, each balanced apart, whose sums travel between the ranks in one message.

    On several ranks that is one message of maxima and `iterations` messages of sums, whatever the number of matrices.

    Args:
        logits: each a matrix, or the blocks of rows that one consists of, which are read where they lie.
        epsilon: of all of them, or one for each.
    """
    matrices = [[matrix] if isinstance(matrix, Tensor) else matrix for matrix in logits]
    epsilons = list(epsilon) if isinstance(epsilon, Sequence) else [epsilon] * len(matrices)
    if len(epsilons) != len(matrices):
        raise ValueError(f"{len(epsilons)} values of epsilon for {len(matrices)} matrices of logits")
    every = [block for blocks in matrices for block in blocks]
    for each in epsilons:
        _check(every, each, iterations)
    if backend.runs_plain(*every):
        return [
            sinkhorn_bias_ref(torch.cat(list(blocks)), each, iterations, group)
            for blocks, each in zip(matrices, epsilons, strict=True)
        ]
    sizes = [blocks[0].shape[1] for blocks in matrices]
    logsumexp, assigned = torch.ops.fastpmae.column_logsumexp, torch.ops.fastpmae.assigned_sums
    first = [
        _merged([logsumexp(block, each) for block in blocks]) for blocks, each in zip(matrices, epsilons, strict=True)
    ]
    own_peak, total = (torch.cat([pair[k] for pair in first]) for k in (0, 1))
    peak = own_peak
    if group is not None:
        peak = own_peak.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
        total = torch.where(total > 0, total * (own_peak - peak).exp(), total)
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
    logv = torch.where(peak == -torch.inf, 0.0, -(peak + total.log()))
    for _ in range(iterations - 1):
        sums = [
            functools.reduce(torch.add, [assigned(block, bias, each) for block in blocks])
            for blocks, bias, each in zip(matrices, logv.split(sizes), epsilons, strict=True)
        ]
        sums = torch.cat(sums)
        if group is not None:
            dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        logv = torch.where(sums == 0, logv, logv - sums.log())
    return [bias.clone() for bias in logv.split(sizes)]


@torch.no_grad()
def sinkhorn(
    logits: Float[Tensor, "rows prototypes"],
    epsilon: float = 0.05,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "rows prototypes"]:
    """The pseudo labels themselves, each row a distribution over the prototypes (see `sinkhorn_bias`)."""
    logv = sinkhorn_bias(logits, epsilon, iterations, group)
    return torch.softmax(torch.add(logv, _at_least_fp32(logits), alpha=1 / epsilon), dim=1)


@torch.no_grad()
def label_bias(
    logits: Float[Tensor, "rows prototypes"],
    method: Literal["sinkhorn", "center", "softmax"] = "sinkhorn",
    epsilon: float = 0.05,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
    center: Float[Tensor, " prototypes"] | None = None,
    momentum: float = 0.9,
) -> Float[Tensor, " prototypes"]:
    """The bias of one of three kinds of pseudo labels, all read as `softmax(logits / epsilon + bias)`.

    Args:
        method: "sinkhorn" balances (SwAV, DINOv2); "center" subtracts a running mean of the logits (DINO, iBOT);
            "softmax" sharpens alone, and collapses in training.
        center: for "center", the running mean. It is read first and then moved, in place, towards this batch's mean
            over the rows of all ranks.
        momentum: of the running mean.

    Raises:
        ValueError: for an unknown method, or "center" without `center`.
    """
    if method == "sinkhorn":
        return sinkhorn_bias(logits, epsilon, iterations, group)
    _check([logits], epsilon, iterations)
    if method == "softmax":
        return torch.zeros(logits.shape[1], device=logits.device)
    if method != "center":
        raise ValueError(f"unknown pseudo labels {method!r}: 'sinkhorn', 'center' or 'softmax'")
    if center is None:
        raise ValueError("centred pseudo labels need `center`, the running mean of the logits")
    bias = -center.float() / epsilon
    sums = torch.cat([logits.sum(dim=0, dtype=torch.float32), bias.new_full((1,), len(logits))])
    if group is not None:
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    center.lerp_((sums[:-1] / sums[-1]).to(center.dtype), 1 - momentum)
    return bias


def sinkhorn_bias_ref(
    logits: Float[Tensor, "rows prototypes"],
    epsilon: float = 0.05,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, " prototypes"]:
    """The plain form of `sinkhorn_bias`; in float64 for float64 logits."""
    _check([logits], epsilon, iterations)
    scaled = _at_least_fp32(logits) / epsilon
    logv = -_logsumexp_over_ranks(scaled, group)
    for _ in range(iterations - 1):
        assigned = torch.log_softmax(scaled + logv, dim=1)
        logv = logv - _logsumexp_over_ranks(assigned, group)
    return logv


def sinkhorn_ref(
    logits: Float[Tensor, "rows prototypes"],
    epsilon: float = 0.05,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "rows prototypes"]:
    """The plain form of `sinkhorn`."""
    logv = sinkhorn_bias_ref(logits, epsilon, iterations, group)
    return torch.softmax(_at_least_fp32(logits) / epsilon + logv, dim=1)


def _check(logits: Sequence[Tensor], epsilon: float, iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"Sinkhorn needs at least one iteration, not {iterations}")
    if not epsilon > 0:
        raise ValueError(f"epsilon, the temperature of the assignment, must be positive, not {epsilon}")
    for matrix in logits:
        if matrix.ndim != 2:
            raise ValueError(f"logits must be a matrix, rows by prototypes, not of shape {tuple(matrix.shape)}")


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _logsumexp_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log(sum(exp(values))) down the rows of every rank, 0 for a column of nothing or of -inf alone.

    The maximum travels first, so no logit can overflow.
    """
    peak = values.new_full(values.shape[1:], -torch.inf) if len(values) == 0 else values.amax(dim=0)
    if group is not None:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    empty = peak == -torch.inf
    total = (values - peak.masked_fill(empty, 0)).exp().sum(dim=0)
    if group is not None:
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return (peak + total.log()).masked_fill(empty, 0)


# The CPU form, and what torch.compile asks of every form.


@operation("column_logsumexp")
def column_logsumexp(logits: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Of each column of logits / epsilon the maximum, and the sum of exp(value - maximum), in one read."""
    return _merge(*on_cpu.column_logsumexp(logits, epsilon))


@operation("assigned_sums")
def assigned_sums(logits: Tensor, logv: Tensor, epsilon: float) -> Tensor:
    """softmax(logits / epsilon + logv) over the rows, summed down the columns, in one read."""
    return on_cpu.assigned_sums(logits, logv, epsilon)


@column_logsumexp.register_fake
def _(logits: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return tuple(logits.new_empty(logits.shape[1], dtype=torch.float32) for _ in range(2))  # pyright: ignore


@assigned_sums.register_fake
def _(logits: Tensor, logv: Tensor, epsilon: float) -> Tensor:
    return logits.new_empty(logits.shape[1], dtype=torch.float32)


def _merge(
    peaks: Float[Tensor, "parts prototypes"], totals: Float[Tensor, "parts prototypes"]
) -> tuple[Tensor, Tensor]:
    """Maxima of parts of the rows, and their sums relative to them, to those of all rows."""
    if len(peaks) == 0:
        return peaks.new_full(peaks.shape[1:], -torch.inf), totals.new_zeros(totals.shape[1:])
    peak = peaks.amax(dim=0)
    return peak, (totals * (peaks - peak.clamp_min(torch.finfo(peak.dtype).min)).exp()).sum(dim=0)


def _merged(blocks: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Maxima and sums of blocks of rows to those of all rows."""
    if len(blocks) == 1:
        return blocks[0]
    peaks, totals = (torch.stack(values) for values in zip(*blocks, strict=True))
    return _merge(peaks, totals)


# The Triton form.


@column_logsumexp.register_kernel("cuda")
def column_logsumexp_triton(logits: Tensor, epsilon: float, parts: int = 64) -> tuple[Tensor, Tensor]:
    logits = _unit_stride(logits)
    rows, prototypes = logits.shape
    parts = min(parts, max(ceil_div(rows, 32), 1))
    peaks = logits.new_empty((parts, prototypes), dtype=torch.float32)
    totals = torch.empty_like(peaks)
    block = min(256, max(16, next_power_of_two(prototypes)))
    if prototypes:
        column_kernel[(ceil_div(prototypes, block), parts)](
            logits, peaks, totals, rows, prototypes, logits.stride(0), ceil_div(rows, parts), 1 / epsilon,
            ROWS=16, COLUMNS=block, num_warps=4,
        )  # fmt: skip
    return _merge(peaks, totals)


@assigned_sums.register_kernel("cuda")
def assigned_sums_triton(logits: Tensor, logv: Tensor, epsilon: float, parts: int = 512) -> Tensor:
    logits = _unit_stride(logits)
    rows, prototypes = logits.shape
    if prototypes > LONGEST_ROW:
        return long_assigned_sums(logits, logv.contiguous(), epsilon)
    parts = min(parts, max(rows, 1))
    sums = logits.new_empty((parts, prototypes), dtype=torch.float32)
    if prototypes:
        assigned_kernel[(parts,)](
            logits, logv, sums, rows, prototypes, logits.stride(0), ceil_div(rows, parts), 1 / epsilon,
            **assigned_meta(prototypes),
        )  # fmt: skip
    return sums.sum(dim=0)


def assigned_meta(prototypes: int) -> dict[str, int]:
    """Tile and warps of `assigned_kernel`: two rows at a time hide each other's latency while registers allow it."""
    columns = max(16, next_power_of_two(prototypes))
    return {"ROWS": 2 if columns <= 8192 else 1, "COLUMNS": columns, "num_warps": min(16, max(4, columns // 512))}


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] <= 1 else logits.contiguous()


@triton.jit
def column_kernel(
    logits, peaks, totals, rows, prototypes, stride, rows_each, scale, ROWS: constexpr, COLUMNS: constexpr
):
    """A block of columns over one part of the rows. Each lane keeps a maximum and a sum of its own until the end."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    first = part * rows_each
    last = tl.minimum(first + rows_each, rows)
    peak = tl.full([ROWS, COLUMNS], -3e38, tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < prototypes)[None, :]
        place = logits + row.to(tl.int64)[:, None] * stride + column[None, :]
        value = tl.load(place, mask=inside, other=-float("inf")).to(tl.float32) * scale
        # One exponential serves both cases: either the new value or the sum so far is scaled down.
        smaller = tl.exp(-tl.abs(value - peak))
        total = tl.where(value > peak, total * smaller + 1.0, total + smaller)
        peak = tl.maximum(peak, value, propagate_nan=tl.PropagateNan.ALL)
    highest = tl.max(peak, axis=0)
    total = tl.sum(total * tl.exp(peak - highest[None, :]), axis=0)
    highest = tl.where(total == 0.0, -float("inf"), highest)
    place = part.to(tl.int64) * prototypes + column
    tl.store(peaks + place, highest, mask=column < prototypes)
    tl.store(totals + place, total, mask=column < prototypes)


@triton.jit
def assigned_kernel(
    logits, logv, sums, rows, prototypes, stride, rows_each, scale, ROWS: constexpr, COLUMNS: constexpr
):
    """Whole rows of one part, read once: softmax in registers, column sums in registers until the end."""
    column = tl.arange(0, COLUMNS)
    known = column < prototypes
    part = tl.program_id(0)
    first = part * rows_each
    last = tl.minimum(first + rows_each, rows)
    bias = tl.load(logv + column, mask=known, other=-float("inf"))
    assigned = tl.zeros([COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        place = logits + row.to(tl.int64)[:, None] * stride + column[None, :]
        value = tl.load(place, mask=(row < last)[:, None] & known[None, :], other=0.0).to(tl.float32)
        value = value * scale + bias[None, :]
        value = tl.exp(value - tl.max(value, axis=1)[:, None])
        weight = tl.where(row < last, 1.0 / tl.sum(value, axis=1), 0.0)
        assigned += tl.sum(value * weight[:, None], axis=0)
    tl.store(sums + part.to(tl.int64) * prototypes + column, assigned, mask=known)
