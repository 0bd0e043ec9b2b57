"""Cross-entropy with a pseudo label on the CPU: label, loss and gradient of a row while it is in the cache."""

import torch
from numpy import empty, float32, log
from torch import Tensor

from fastpmae_kernels.cpu.compiled import compiled
from fastpmae_kernels.cpu.rows import added, as_fp32, exponential, maximum, row_blocks, share_out


def cross_entropy(
    student: Tensor, teacher: Tensor, logv: Tensor, index: Tensor, epsilon: float, temperature: float,
    expected: float, gradient: Tensor | None,
) -> Tensor:  # fmt: skip
    """The loss of each row; with `gradient`, which may be `student` itself, the gradient goes there."""
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(teacher):
        raise IndexError(
            f"index reaches from {int(index.min())} to {int(index.max())}, there are {len(teacher)} labels"
        )
    loss = torch.empty(len(student), dtype=torch.float32, device="cpu")
    bias, places, losses = as_fp32(logv), index.long().contiguous().numpy(), loss.numpy()
    whole = as_fp32(teacher) if teacher.dtype == torch.float32 else None

    def work(block: int, start: int, stop: int) -> None:
        ours = as_fp32(student[start:stop])
        place = places[start:stop]
        if whole is not None:
            theirs = whole
        else:
            # 16-bit labels are widened for the block's rows alone, in the order they are read.
            theirs, place = as_fp32(teacher[index[start:stop]]), empty(0, places.dtype)
        if gradient is None:
            written, plain = empty((0, 0), float32), True
        else:
            rows = gradient[start:stop]
            plain = rows.dtype == torch.float32 and rows.is_contiguous()
            written = rows.numpy() if plain else empty(ours.shape, float32)
        _cross_entropy_block(
            ours, theirs, bias, place, float32(1 / epsilon), float32(1 / temperature), float32(expected / temperature),
            losses[start:stop], written,
        )  # fmt: skip
        if gradient is not None and not plain:
            gradient[start:stop].copy_(torch.from_numpy(written))

    share_out(row_blocks(len(student)), work)
    return loss


@compiled("contract", "nsz")
def _cross_entropy_block(student, teacher, logv, index, label_scale, scale, expected, loss, gradient):
    rows, prototypes = student.shape
    label, value = empty(prototypes, float32), empty(prototypes, float32)
    for r in range(rows):
        row = teacher[index[r]] if index.size else teacher[r]
        for j in range(prototypes):
            label[j] = row[j] * label_scale + logv[j]
        peak = maximum(label)
        for j in range(prototypes):
            label[j] = exponential(label[j] - peak)
        mass = added(label)
        row = student[r]
        for j in range(prototypes):
            value[j] = row[j] * scale
        peak = maximum(value)
        for j in range(prototypes):
            value[j] = value[j] - peak
        dot = _expected(label, value)
        for j in range(prototypes):
            value[j] = exponential(value[j])
        total = added(value)
        loss[r] = log(total) - dot / mass
        if gradient.size:
            row = gradient[r]
            for j in range(prototypes):
                row[j] = (value[j] / total - label[j] / mass) * expected


@compiled("contract", "reassoc", "nsz")
def _expected(label, value):
    """The sum of label x value, where a label of 0 counts as nothing beside a value of minus infinity."""
    total = float32(0.0)
    for j in range(label.size):
        total += label[j] * value[j] if label[j] != float32(0.0) else float32(0.0)
    return total
