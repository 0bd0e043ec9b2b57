"""Sinkhorn-Knopp pseudo labels: a balanced soft assignment of rows (tokens) to prototypes."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def sinkhorn_bias_ref(
    logits: Float[Tensor, "rows prototypes"],
    epsilon: float = 0.05,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, " prototypes"]:
    """One bias a prototype, `logv`, such that `softmax(logits / epsilon + logv)` is the pseudo label of a row.

    The iterations of SwAV and DINOv2 divide the columns (prototypes) by their sums over the rows of all ranks, then
    each row by its own sum. Written in logarithms, all column divisions add up to one number a prototype and the
    last row division is the softmax, so nothing of size rows x prototypes has to be kept.

    Args:
        logits: the labelling teacher's, cosines between -1 and 1 for weight-normed prototypes. On several ranks each
            passes its own rows, and the number of rows may differ.
        epsilon: the temperature of the assignment.
        iterations: how many times columns and rows are normalised; at least 1.
        group: the ranks whose rows are assigned together; None means this process alone.

    Returns:
        `logv` in fp32 (float64 for float64 logits), the same on every rank.

    Raises:
        ValueError: for fewer than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"Sinkhorn needs at least one iteration, not {iterations}")
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
    """The pseudo labels themselves, each row a distribution over the prototypes (see `sinkhorn_bias_ref`)."""
    logv = sinkhorn_bias_ref(logits, epsilon, iterations, group)
    return torch.softmax(_at_least_fp32(logits) / epsilon + logv, dim=1)


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _logsumexp_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log(sum(exp(values))) down the rows of every rank: the maximum travels first, so no logit can overflow."""
    peak = values.new_full(values.shape[1:], -torch.inf) if len(values) == 0 else values.amax(dim=0)
    if group is not None:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    total = (values - peak).exp().sum(dim=0)
    if group is not None:
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return peak + total.log()
