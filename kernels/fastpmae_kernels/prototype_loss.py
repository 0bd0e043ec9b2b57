"""Cross-entropy between a teacher's pseudo label and a student's prediction over the prototypes (equations 3 and 4).

A label is never written down: it is the softmax of a teacher's row of logits, read by its index. The gradient over a
student's row, `(softmax(student / t) - label) / t`, needs the very numbers that the loss needs, so one pass computes
both, and can write the gradient where the student's logits were.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastpmae_kernels import backend
from fastpmae_kernels.backend import constexpr, next_power_of_two, operation, tl, triton
from fastpmae_kernels.cpu import prototype_loss as on_cpu
from fastpmae_kernels.long_rows import LONGEST_ROW, long_cross_entropy


def prototype_cross_entropy(
    student_logits: Float[Tensor, "rows prototypes"],
    teacher_logits: Float[Tensor, "labels prototypes"],
    logv: Float[Tensor, " prototypes"],
    index: Int[Tensor, " rows"],
    epsilon: float = 0.05,
    temperature: float = 0.1,
    *,
    overwrite: bool = False,
    expected_gradient: float = 1.0,
) -> Float[Tensor, " rows"]:
    """H(pseudo label of teacher row `index[r]`, student row r) for every row.

    Args:
        student_logits: the student's, in fp32, fp16 or bf16 (float64 takes the plain form); gradients flow to these
            alone, in their dtype.
        teacher_logits: what `sinkhorn_bias` was given on this rank.
        logv: its result; a label is `softmax(teacher_logits / epsilon + logv)`.
        index: the teacher row whose label student row r should predict.
        epsilon: the temperature that `logv` was computed with.
        temperature: the student's.
        overwrite: write the gradient over the student's logits, which must not be read again: they are lost once
            this function returns. Backward can then run once. A leaf's own values are not overwritten: an error.
        expected_gradient: the gradient that each row's loss will receive, for instance `1 / rows` for a mean. The
            right number saves a pass over the gradient, a wrong one costs nothing but that pass.

    Returns:
        The loss of each row, in fp32.

    Raises:
        ValueError: for shapes that do not fit each other, temperatures that are not positive, or `overwrite` on a leaf.
        IndexError: on the CPU, for an index outside the teacher's rows; on a GPU, which is not waited for, such a
            row's loss and gradient are NaN.
    """
    check(student_logits, teacher_logits, logv, index, epsilon, temperature)
    if overwrite and student_logits.is_leaf and student_logits.requires_grad:
        raise ValueError("overwrite=True would put the gradient over a leaf's own values")
    if backend.runs_plain(student_logits, teacher_logits):
        return prototype_cross_entropy_ref(student_logits, teacher_logits, logv, index, epsilon, temperature)
    if not (torch.is_grad_enabled() and student_logits.requires_grad):
        return torch.ops.fastpmae.prototype_loss(student_logits, teacher_logits, logv, index, epsilon, temperature)
    # Detached, so that torch.compile takes it where both sides are one tensor.
    return _CrossEntropy.apply(
        student_logits, teacher_logits.detach(), logv, index, epsilon, temperature, overwrite, expected_gradient
    )


def prototype_cross_entropy_ref(
    student_logits: Float[Tensor, "rows prototypes"],
    teacher_logits: Float[Tensor, "labels prototypes"],
    logv: Float[Tensor, " prototypes"],
    index: Int[Tensor, " rows"],
    epsilon: float = 0.05,
    temperature: float = 0.1,
) -> Float[Tensor, " rows"]:
    """The plain form of `prototype_cross_entropy`; in float64 for float64 logits."""
    if student_logits.dtype != torch.float64:
        student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    with torch.no_grad():
        label = torch.softmax(teacher_logits[index] / epsilon + logv, dim=1)
    return -(label * torch.log_softmax(student_logits / temperature, dim=1)).sum(dim=1)


def check(
    student: Tensor, teacher: Tensor, logv: Tensor, index: Tensor, epsilon: float, temperature: float
) -> None:  # fmt: skip
    """Raise ValueError where these make no loss."""
    if (
        student.ndim != 2
        or teacher.ndim != 2
        or student.shape[1:] != teacher.shape[1:]
        or logv.shape != student.shape[1:]
    ):
        raise ValueError(
            f"student logits {tuple(student.shape)}, teacher logits {tuple(teacher.shape)} and logv "
            f"{tuple(logv.shape)} must agree on the prototypes"
        )
    if index.shape != student.shape[:1] or index.dtype.is_floating_point:
        raise ValueError(f"index must hold one integer a student row, not {index.dtype} {tuple(index.shape)}")
    if not (epsilon > 0 and temperature > 0):
        raise ValueError(f"temperatures must be positive, not {epsilon} and {temperature}")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, logv, index, epsilon, temperature, overwrite, expected):
        if overwrite:
            gradient = student.detach()
            loss = torch.ops.fastpmae.prototype_loss_over(
                gradient, teacher, logv, index, epsilon, temperature, expected
            )
        else:
            loss, gradient = torch.ops.fastpmae.prototype_loss_gradient(
                student.detach(), teacher, logv, index, epsilon, temperature, expected
            )
        # A second backward, or another reader of overwritten logits, meets torch's error about changed tensors.
        ctx.save_for_backward(gradient)
        ctx.expected = expected
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        (gradient,) = ctx.saved_tensors
        factor = gradients[0].float() / ctx.expected
        torch.ops.fastpmae.scale_rows(gradient, factor)
        return gradient, None, None, None, None, None, None, None


# The CPU form, and what torch.compile asks of every form.


@operation("prototype_loss")
def prototype_loss(
    student: Tensor, teacher: Tensor, logv: Tensor, index: Tensor, epsilon: float, temperature: float
) -> Tensor:  # fmt: skip
    return on_cpu.cross_entropy(student, teacher, logv, index, epsilon, temperature, 0.0, None)


@operation("prototype_loss_gradient")
def prototype_loss_gradient(
    student: Tensor, teacher: Tensor, logv: Tensor, index: Tensor, epsilon: float, temperature: float, expected: float
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty(student.shape, dtype=student.dtype, device="cpu")
    return on_cpu.cross_entropy(student, teacher, logv, index, epsilon, temperature, expected, gradient), gradient


@operation("prototype_loss_over", mutates=("student",))
def prototype_loss_over(
    student: Tensor, teacher: Tensor, logv: Tensor, index: Tensor, epsilon: float, temperature: float, expected: float
) -> Tensor:
    return on_cpu.cross_entropy(student, teacher, logv, index, epsilon, temperature, expected, student)


@operation("scale_rows", mutates=("rows",))
def scale_rows(rows: Tensor, factor: Tensor) -> None:
    if not bool((factor == 1).all()):
        rows.mul_(factor.unsqueeze(1))


@prototype_loss.register_fake
def _(student, teacher, logv, index, epsilon, temperature):
    return student.new_empty(student.shape[0], dtype=torch.float32)


@prototype_loss_gradient.register_fake
def _(student, teacher, logv, index, epsilon, temperature, expected):
    return student.new_empty(student.shape[0], dtype=torch.float32), student.new_empty(student.shape)


@prototype_loss_over.register_fake
def _(student, teacher, logv, index, epsilon, temperature, expected):
    return student.new_empty(student.shape[0], dtype=torch.float32)


@scale_rows.register_fake
def _(rows, factor):
    return None


# The Triton form.


@prototype_loss.register_kernel("cuda")
def prototype_loss_triton(student, teacher, logv, index, epsilon, temperature):
    return on_gpu(student, teacher, logv, index, epsilon, temperature, 0.0, None)


@prototype_loss_gradient.register_kernel("cuda")
def prototype_loss_gradient_triton(student, teacher, logv, index, epsilon, temperature, expected):
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    return on_gpu(student, teacher, logv, index, epsilon, temperature, expected, gradient), gradient


@prototype_loss_over.register_kernel("cuda")
def prototype_loss_over_triton(student, teacher, logv, index, epsilon, temperature, expected):
    return on_gpu(student, teacher, logv, index, epsilon, temperature, expected, student)


@scale_rows.register_kernel("cuda")
def scale_rows_triton(rows, factor):
    if rows.numel() == 0:
        return
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows.mul_(factor.unsqueeze(1))
        return
    scale_kernel[(len(rows),)](
        rows, factor.contiguous(), rows.shape[1], rows.stride(0), COLUMNS=min(4096, next_power_of_two(rows.shape[1]))
    )


def on_gpu(
    student: Tensor, teacher: Tensor, logv: Tensor, index: Tensor, epsilon: float, temperature: float,
    expected: float, gradient: Tensor | None,
) -> Tensor:  # fmt: skip
    """The loss of each row; with `gradient`, which may be `student` itself, the gradient goes there."""
    rows, prototypes = student.shape
    if gradient is not None and gradient.stride(1) != 1:
        return _in_chunks(student, teacher, logv, index, epsilon, temperature, expected, gradient)
    student, teacher = (t if t.stride(1) == 1 else t.contiguous() for t in (student, teacher))
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    bias, index = logv.float().contiguous(), index.contiguous()
    if rows and prototypes > LONGEST_ROW:
        long_cross_entropy(student, teacher, bias, index, loss, gradient, epsilon, temperature, expected)
    elif rows:
        written = loss if gradient is None else gradient
        cross_entropy_kernel[(rows,)](
            student, teacher, bias, index, loss, written, len(teacher), prototypes,
            student.stride(0), teacher.stride(0), written.stride(0),
            1 / epsilon, 1 / temperature, expected / temperature,
            GRADIENT=gradient is not None, **cross_entropy_meta(prototypes),
        )  # fmt: skip
    return loss


def cross_entropy_meta(prototypes: int) -> dict[str, int]:
    """Tile and warps of `cross_entropy_kernel`: 16 to 32 numbers of each row a thread."""
    columns = max(16, next_power_of_two(prototypes))
    return {"COLUMNS": columns, "num_warps": min(16, max(4, columns // 512))}


def _in_chunks(student, teacher, logv, index, epsilon, temperature, expected, gradient):
    losses = []
    for start in range(0, len(student), 1024):
        rows = slice(start, start + 1024)
        label = torch.softmax(teacher[index[rows]].float() / epsilon + logv, dim=1)
        score = torch.log_softmax(student[rows].float() / temperature, dim=1)
        losses.append(-(label * score).sum(dim=1))
        if gradient is not None:
            gradient[rows] = (score.exp_() - label) * (expected / temperature)
    return torch.cat(losses) if losses else logv.new_empty(0)


@triton.jit
def cross_entropy_kernel(
    student, teacher, logv, index, loss, gradient, labels, prototypes, student_stride, teacher_stride, gradient_stride,
    label_scale, scale, expected, GRADIENT: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    """One student row: its label from the matched teacher row, the loss, and the gradient from the same registers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    known = column < prototypes
    match = tl.load(index + row).to(tl.int64)
    exists = (match >= 0) & (match < labels)
    label = tl.load(teacher + match * teacher_stride + column, mask=known & exists, other=0.0).to(tl.float32)
    value = tl.load(student + row * student_stride + column, mask=known, other=0.0).to(tl.float32) * scale
    label = label * label_scale + tl.load(logv + column, mask=known, other=0.0)
    label = tl.where(known, label, -float("inf"))
    value = tl.where(known, value, -float("inf"))
    label = tl.exp(label - tl.max(label, axis=0))
    label = label / tl.sum(label, axis=0)
    value = value - tl.max(value, axis=0)
    # A label of exactly nothing counts nothing, however impossible the student holds that prototype to be.
    dot = tl.sum(tl.where(label == 0.0, 0.0, label * value), axis=0)
    value = tl.exp(value)
    total = tl.sum(value, axis=0)
    broken = tl.where(exists, 0.0, float("nan"))
    tl.store(loss + row, tl.log(total) - dot + broken)
    if GRADIENT:
        slope = (value / total - label) * expected + broken
        tl.store(gradient + row * gradient_stride + column, slope.to(gradient.dtype.element_ty), mask=known)


@triton.jit
def scale_kernel(rows, factor, prototypes, stride, COLUMNS: constexpr):
    """One row times its factor in place; a row whose factor is 1 is not touched."""
    row = tl.program_id(0).to(tl.int64)
    by = tl.load(factor + row)
    if by != 1.0:
        for start in range(0, prototypes, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            place = rows + row * stride + column
            value = tl.load(place, mask=column < prototypes, other=0.0).to(tl.float32)
            tl.store(place, (value * by).to(rows.dtype.element_ty), mask=column < prototypes)
