"""Nearest-patch matching: which teacher patch lends its pseudo label to a student patch (paper, section 3.3)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Metric = Literal["cosine", "l2"]
Scope = Literal["image", "fold"]


def nearest_patch_ref(
    student: Float[Tensor, "batch masked dim"],
    teacher: Float[Tensor, "batch patches dim"],
    metric: Metric = "cosine",
    scope: Scope = "image",
    fold_sizes: Sequence[int] = (),
) -> Int[Tensor, "batch masked"]:
    """For each student patch the index of the nearest teacher patch of the same image.

    Args:
        student: the decoder's masked tokens, in fold order.
        teacher: the labelling teacher's tokens, in fold order.
        metric: highest cosine, or smallest Euclidean distance.
        scope: among all patches of the image, or only those of the student patch's own fold.
        fold_sizes: patches in each fold; needed by scope "fold", where both sides have the same folds.

    Returns:
        Indices into `patches`, found in fp32 or better; of equally near patches, the lowest.

    Raises:
        ValueError: for an unknown metric or scope, or fold sizes that do not add up to the patches.
    """
    if metric not in ("cosine", "l2"):
        raise ValueError(f"unknown match metric {metric!r}: 'cosine' or 'l2'")
    if student.dtype != torch.float64:
        student, teacher = student.float(), teacher.float()
    # Autocast would take the product in bf16, where patches that are merely near would tie.
    with torch.autocast(student.device.type, enabled=False):
        if metric == "cosine":
            similarity = F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).mT
        else:
            # |s - t|^2 = |s|^2 - 2 s.t + |t|^2, and |s|^2 is the same for every candidate of a row.
            similarity = 2 * student @ teacher.mT - teacher.square().sum(dim=-1).unsqueeze(1)
    if scope == "fold":
        if sum(fold_sizes) != teacher.shape[1] or student.shape[1] != teacher.shape[1]:
            raise ValueError(f"fold sizes {tuple(fold_sizes)} do not add up to {teacher.shape[1]} patches")
        sizes = torch.tensor(fold_sizes, device=student.device)
        fold = torch.arange(len(fold_sizes), device=student.device).repeat_interleave(
            sizes, output_size=teacher.shape[1]
        )
        similarity = similarity.masked_fill(fold[:, None] != fold[None, :], -torch.inf)
    elif scope != "image":
        raise ValueError(f"unknown match scope {scope!r}: 'image' or 'fold'")
    return similarity.argmax(dim=-1)
