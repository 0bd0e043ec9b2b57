"""The labels and the loss straight from features: prototype product and softmax in chunks of rows, or product and loss.

In chunks neither logits matrix exists at full size. Each pass of the Sinkhorn iterations computes the teacher's product
anew, and the loss computes both products once and the gradients with them.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from fastpmae_kernels import backend
from fastpmae_kernels.prototype_loss import check, prototype_cross_entropy_ref
from fastpmae_kernels.sinkhorn import sinkhorn_bias_ref

PROTOTYPES_CHUNK = 4096
"""Rows whose logits exist at a time, unless asked otherwise."""


@torch.no_grad()
def sinkhorn_bias_from_features(
    features: Float[Tensor, "rows bottleneck"],
    prototypes: Float[Tensor, "prototypes bottleneck"],
    epsilon: float = 0.05,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
    prototypes_chunk: int = PROTOTYPES_CHUNK,
) -> Float[Tensor, " prototypes"]:
    """`sinkhorn_bias(features @ prototypes.T)` with the logits of `prototypes_chunk` rows at a time.

    Raises:
        ValueError: for fewer than one iteration or row a chunk, or shapes that do not fit each other.
    """
    _check(features, prototypes, prototypes_chunk)
    if iterations < 1:
        raise ValueError(f"Sinkhorn needs at least one iteration, not {iterations}")
    if backend.runs_plain(features, prototypes):
        return sinkhorn_bias_ref(features @ prototypes.T, epsilon, iterations, group)
    chunks = features.split(prototypes_chunk)
    ops = torch.ops.fastpmae
    own_peak = torch.full((len(prototypes),), -torch.inf, device=features.device)
    total = torch.zeros_like(own_peak)
    for rows in chunks:
        peak, part = ops.column_logsumexp(rows @ prototypes.T, epsilon)
        higher = torch.maximum(own_peak, peak)
        total = _rescaled(total, own_peak, higher) + _rescaled(part, peak, higher)
        own_peak = higher
    peak = own_peak
    if group is not None:
        peak = own_peak.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
        total = _rescaled(total, own_peak, peak)
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
    logv = torch.where(peak == -torch.inf, 0.0, -(peak + total.log()))
    for _ in range(iterations - 1):
        sums = torch.zeros_like(logv)
        for rows in chunks:
            sums += ops.assigned_sums(rows @ prototypes.T, logv, epsilon)
        if group is not None:
            dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        logv = torch.where(sums == 0, logv, logv - sums.log())
    return logv


def prototype_cross_entropy_from_features(
    student: Float[Tensor, "rows bottleneck"],
    student_prototypes: Float[Tensor, "prototypes bottleneck"],
    teacher: Float[Tensor, "labels bottleneck"],
    teacher_prototypes: Float[Tensor, "prototypes bottleneck"],
    logv: Float[Tensor, " prototypes"],
    index: Int[Tensor, " rows"],
    epsilon: float = 0.05,
    temperature: float = 0.1,
    prototypes_chunk: int = PROTOTYPES_CHUNK,
) -> Float[Tensor, ""]:
    """The mean over the rows of `prototype_cross_entropy(student @ student_prototypes.T, teacher @ ..., ...)`.

    Args:
        student, student_prototypes: gradients flow to these two; give normalised ones where logits are cosines.
        teacher, teacher_prototypes: what `sinkhorn_bias_from_features` was given.
        prototypes_chunk: rows whose logits exist at a time.

    Returns:
        A number in fp32. Both gradients are computed with it, so that what waits for backward is of the size of the
        features and the prototypes.

    Raises:
        ValueError: for shapes that do not fit each other, no rows, or chunks of no rows.
    """
    _check(student, student_prototypes, prototypes_chunk)
    _check(teacher, teacher_prototypes, prototypes_chunk)
    if len(student) == 0:
        raise ValueError("the mean over no rows is not defined")
    if backend.runs_plain(student, student_prototypes, teacher, teacher_prototypes):
        logits = student @ student_prototypes.T, teacher @ teacher_prototypes.T
        return prototype_cross_entropy_ref(*logits, logv, index, epsilon, temperature).mean()
    # Detached, so that torch.compile takes it where both sides share a tensor.
    teacher, teacher_prototypes = teacher.detach(), teacher_prototypes.detach()
    return _FromFeatures.apply(
        student, student_prototypes, teacher, teacher_prototypes, logv, index, epsilon, temperature, prototypes_chunk
    )


class _FromFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, prototypes, teacher, teacher_prototypes, logv, index, epsilon, temperature, chunk):
        due = ctx.needs_input_grad[:2]
        loss = torch.zeros((), device=student.device)
        of_student = torch.empty_like(student) if due[0] else None
        # Products of many chunks add up: in fp32, whatever the prototypes are in.
        of_prototypes = torch.zeros(prototypes.shape, device=student.device) if due[1] else None
        expected = 1 / len(student)
        for start in range(0, len(student), chunk):
            rows = slice(start, start + chunk)
            logits = student[rows] @ prototypes.T
            labels = teacher[index[rows]] @ teacher_prototypes.T
            own = torch.arange(len(logits), device=logits.device)
            if not any(due):
                part = torch.ops.fastpmae.prototype_loss(logits, labels, logv, own, epsilon, temperature)
            else:
                # The gradient takes the logits' place.
                part = torch.ops.fastpmae.prototype_loss_over(
                    logits, labels, logv, own, epsilon, temperature, expected * _lift(logits)
                )
            # Not in place: torch 2.11, compiling, would give no gradient to a result that is written to.
            loss = loss + part.sum() * expected
            if of_student is not None:
                of_student[rows] = (logits @ prototypes) / _lift(logits)
            if of_prototypes is not None:
                of_prototypes += (logits.T @ student[rows]).float() / _lift(logits)
        ctx.save_for_backward(of_student, of_prototypes)
        ctx.dtype = prototypes.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        of_student, of_prototypes = ctx.saved_tensors
        gradient = gradients[0]
        if of_student is not None:
            of_student = of_student * gradient.to(of_student.dtype)
        if of_prototypes is not None:
            of_prototypes = (of_prototypes * gradient).to(ctx.dtype)
        return of_student, of_prototypes, None, None, None, None, None, None, None


def prototype_cross_entropy_of_product(
    student: Float[Tensor, "rows bottleneck"],
    student_prototypes: Float[Tensor, "prototypes bottleneck"],
    teacher_logits: Float[Tensor, "labels prototypes"],
    logv: Float[Tensor, " prototypes"],
    index: Int[Tensor, " rows"],
    epsilon: float = 0.05,
    temperature: float = 0.1,
    *,
    expected_gradient: float = 1.0,
) -> Float[Tensor, " rows"]:
    """`prototype_cross_entropy(student @ student_prototypes.T, ..., overwrite=True)`, in the form for torch.compile.

    What a row's loss receives in backward multiplies the features and their gradient, which are small. The other form
    multiplies the gradient of the logits, in place and only where that was not foreseen; torch.compile, which writes
    into nothing that the forward pass has left, copies it whole before.

    Args:
        student, student_prototypes: in one dtype; gradients flow to these two.
        teacher_logits, logv, index, epsilon, temperature, expected_gradient: as in `prototype_cross_entropy`.

    Returns:
        The loss of each row, in fp32.

    Raises:
        ValueError, IndexError: as `prototype_cross_entropy` does.
    """
    _check(student, student_prototypes, 1)
    if backend.runs_plain(student, teacher_logits):
        logits = student @ student_prototypes.T
        check(logits, teacher_logits, logv, index, epsilon, temperature)
        return prototype_cross_entropy_ref(logits, teacher_logits, logv, index, epsilon, temperature)
    return _OfProduct.apply(
        student, student_prototypes, teacher_logits.detach(), logv, index, epsilon, temperature, expected_gradient
    )


class _OfProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, prototypes, teacher, logv, index, epsilon, temperature, expected):
        logits = student @ prototypes.T
        check(logits, teacher, logv, index, epsilon, temperature)
        if not any(ctx.needs_input_grad):
            return torch.ops.fastpmae.prototype_loss(logits, teacher, logv, index, epsilon, temperature)
        # The gradient takes the logits' place.
        loss = torch.ops.fastpmae.prototype_loss_over(logits, teacher, logv, index, epsilon, temperature, expected)
        ctx.save_for_backward(student, prototypes, logits)
        ctx.expected = expected
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        student, prototypes, slope = ctx.saved_tensors
        factor = (gradients[0].float() / ctx.expected).unsqueeze(1)
        of_student = of_prototypes = None
        if ctx.needs_input_grad[0]:
            of_student = ((slope @ prototypes) * factor).to(student.dtype)
        if ctx.needs_input_grad[1]:
            of_prototypes = slope.T @ (student * factor).to(student.dtype)
        return of_student, of_prototypes, None, None, None, None, None, None


def _lift(logits: Tensor) -> float:
    """What the gradient is multiplied with while it is in fp16, where 1 / rows times a probability is too small."""
    return float(2**14) if logits.dtype == torch.float16 else 1.0


def _rescaled(total: Tensor, peak: Tensor, higher: Tensor) -> Tensor:
    return torch.where(total > 0, total * (peak - higher).exp(), total)


def _check(features: Tensor, prototypes: Tensor, chunk: int) -> None:
    if features.ndim != 2 or prototypes.ndim != 2 or features.shape[1] != prototypes.shape[1]:
        raise ValueError(f"features {tuple(features.shape)} and prototypes {tuple(prototypes.shape)} do not fit")
    if chunk < 1:
        raise ValueError(f"a chunk needs at least one row, not {chunk}")
