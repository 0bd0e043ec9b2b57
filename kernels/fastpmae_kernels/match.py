"""Nearest-patch matching: which teacher patch lends its pseudo label to a student patch (paper, section 3.3)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastpmae_kernels import backend
from fastpmae_kernels.backend import ceil_div, constexpr, operation, tl, triton
from fastpmae_kernels.cpu import match as on_cpu

Metric = Literal["cosine", "l2"]
Scope = Literal["image", "fold"]


@torch.no_grad()
def nearest_patch(
    student: Float[Tensor, "batch masked dim"],
    teacher: Float[Tensor, "batch patches dim"],
    metric: Metric = "cosine",
    scope: Scope = "image",
    fold_sizes: Sequence[int] = (),
) -> Int[Tensor, "batch masked"]:
    """For each student patch the index of the nearest teacher patch of the same image; no gradient flows.

    Args:
        student: the decoder's masked tokens, in fold order.
        teacher: the labelling teacher's tokens, in fold order. Sums are in fp32 for every dtype; where the two differ
            a GPU rounds the teacher's to the student's for the product.
        metric: highest cosine, or smallest Euclidean distance.
        scope: among all patches of the image, or only those of the student patch's own fold.
        fold_sizes: patches in each fold; needed by scope "fold", where both sides have the same folds.

    Returns:
        Indices into `patches`; of equally near patches, the lowest.

    Raises:
        ValueError: for an unknown metric or scope, shapes that do not fit each other, no patch to choose from, or fold
            sizes that do not add up to the patches.
    """
    return nearest_patch_similarity(student, teacher, metric, scope, fold_sizes)[0]


@torch.no_grad()
def nearest_patch_similarity(
    student: Float[Tensor, "batch masked dim"],
    teacher: Float[Tensor, "batch patches dim"],
    metric: Metric = "cosine",
    scope: Scope = "image",
    fold_sizes: Sequence[int] = (),
) -> tuple[Int[Tensor, "batch masked"], Float[Tensor, "batch masked"]]:
    """`nearest_patch` together with how near it is: the cosine, or minus the squared distance, in fp32."""
    folds = _checked_folds(student, teacher, metric, scope, fold_sizes)
    if backend.runs_plain(student, teacher):
        return _nearest_ref(student, teacher, metric, folds)
    return torch.ops.fastpmae.nearest_patch(student, teacher, metric == "cosine", folds)


def nearest_patch_ref(
    student: Float[Tensor, "batch masked dim"],
    teacher: Float[Tensor, "batch patches dim"],
    metric: Metric = "cosine",
    scope: Scope = "image",
    fold_sizes: Sequence[int] = (),
) -> Int[Tensor, "batch masked"]:
    """The plain form of `nearest_patch`."""
    return _nearest_ref(student, teacher, metric, _checked_folds(student, teacher, metric, scope, fold_sizes))[0]


def _nearest_ref(student: Tensor, teacher: Tensor, metric: Metric, folds: Sequence[int]) -> tuple[Tensor, Tensor]:
    if student.dtype != torch.float64:
        student, teacher = student.float(), teacher.float()
    # Autocast would take the product in bf16, where patches that are merely near would tie.
    with torch.autocast(student.device.type, enabled=False):
        if metric == "cosine":
            similarity = F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).mT
        else:
            lengths = student.square().sum(dim=-1).unsqueeze(2) + teacher.square().sum(dim=-1).unsqueeze(1)
            similarity = 2 * student @ teacher.mT - lengths
    if len(folds) > 1:
        fold = fold_of(folds, student.device)
        similarity = similarity.masked_fill(fold[:, None] != fold[None, :], -torch.inf)
    index = similarity.argmax(dim=-1)
    return index, similarity.gather(2, index.unsqueeze(2)).squeeze(2)


def _checked_folds(
    student: Tensor, teacher: Tensor, metric: str, scope: str, fold_sizes: Sequence[int]
) -> list[int]:  # fmt: skip
    """The folds that a patch may look within: none where it may look anywhere."""
    if metric not in ("cosine", "l2"):
        raise ValueError(f"unknown match metric {metric!r}: 'cosine' or 'l2'")
    if scope not in ("image", "fold"):
        raise ValueError(f"unknown match scope {scope!r}: 'image' or 'fold'")
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[::2] != teacher.shape[::2]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must both be [batch, patches, dim]"
        )
    if teacher.shape[1] == 0 and student.shape[0] * student.shape[1] > 0:
        raise ValueError("there is no teacher patch to choose from")
    if scope == "image":
        return []
    if sum(fold_sizes) != teacher.shape[1] or student.shape[1] != teacher.shape[1]:
        raise ValueError(f"fold sizes {tuple(fold_sizes)} do not add up to {teacher.shape[1]} patches")
    return [size for size in fold_sizes if size > 0]


def fold_of(folds: Sequence[int], device: torch.device) -> Int[Tensor, " patches"]:
    """The number of each patch's fold, int32, written by the device itself: a list of sizes would be copied to it."""
    numbered = enumerate(folds)
    return torch.cat([torch.full((size,), fold, dtype=torch.int32, device=device) for fold, size in numbered])


# The CPU form, and what torch.compile asks of every form.


@operation("nearest_patch")
def nearest_patch_op(student: Tensor, teacher: Tensor, cosine: bool, folds: Sequence[int]) -> tuple[Tensor, Tensor]:
    return on_cpu.nearest_patch(student, teacher, cosine, folds)


@nearest_patch_op.register_fake
def _(student: Tensor, teacher: Tensor, cosine: bool, folds: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape = student.shape[:2]
    return student.new_empty(shape, dtype=torch.int64), student.new_empty(shape, dtype=torch.float32)


# The Triton form.


@nearest_patch_op.register_kernel("cuda")
def nearest_patch_triton(
    student: Tensor, teacher: Tensor, cosine: bool, folds: Sequence[int]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # A bf16 student's teacher comes in fp32 from its last norm. Rounded here once, for every tile of student patches.
    teacher = teacher.to(student.dtype)
    student, teacher = (t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous() for t in (student, teacher))
    batch, masked, dim = student.shape
    index = torch.empty(batch, masked, dtype=torch.int64, device=student.device)
    similarity = torch.empty(batch, masked, dtype=torch.float32, device=student.device)
    fold = fold_of(folds, student.device) if folds else index
    if index.numel():
        # Images go along the grid's first axis: the others end at 65,535.
        nearest_kernel[(batch, ceil_div(masked, 64))](
            student, teacher, fold, index, similarity, masked, teacher.shape[1], dim,
            student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1),
            COSINE=cosine, FOLDS=bool(folds), **nearest_meta(student.dtype),
        )  # fmt: skip
    return index, similarity


def nearest_meta(dtype: torch.dtype) -> dict[str, int]:
    """Tile of `nearest_kernel`: 128 bytes of a token at a time."""
    return {"ROWS": 64, "PATCHES": 64, "FEATURES": 128 // dtype.itemsize, "num_warps": 8, "num_stages": 3}


@triton.jit
def nearest_kernel(
    student, teacher, fold, index, similarity, masked, patches, dim,
    student_image, student_row, teacher_image, teacher_row,
    COSINE: constexpr, FOLDS: constexpr, ROWS: constexpr, PATCHES: constexpr, FEATURES: constexpr,
):  # fmt: skip
    """The nearest patches of ROWS student patches of one image, with a running best over tiles of teacher patches."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    student += image * student_image
    teacher += image * teacher_image
    best = tl.full([ROWS], -float("inf"), tl.float32)
    best_at = tl.zeros([ROWS], tl.int32)
    if FOLDS:
        own_fold = tl.load(fold + row, mask=row < masked, other=-1)
    for start in range(0, patches, PATCHES):
        patch = start + tl.arange(0, PATCHES)
        product = tl.zeros([ROWS, PATCHES], tl.float32)
        length = tl.zeros([PATCHES], tl.float32)
        for first in range(0, dim, FEATURES):
            feature = first + tl.arange(0, FEATURES)
            place = student + row.to(tl.int64)[:, None] * student_row + feature[None, :]
            ours = tl.load(place, mask=(row < masked)[:, None] & (feature < dim)[None, :], other=0.0)
            place = teacher + patch.to(tl.int64)[:, None] * teacher_row + feature[None, :]
            theirs = tl.load(place, mask=(patch < patches)[:, None] & (feature < dim)[None, :], other=0.0)
            # "ieee": fp32 tokens are multiplied in fp32, as in the plain form, not in tf32.
            product = tl.dot(ours, tl.trans(theirs), product, input_precision="ieee")
            length += tl.sum(theirs.to(tl.float32) * theirs.to(tl.float32), axis=1)
        if COSINE:
            score = product / tl.maximum(tl.sqrt(length), 1e-12)[None, :]
        else:
            score = 2.0 * product - length[None, :]
        allowed = (patch < patches)[None, :] & (row < masked)[:, None]
        if FOLDS:
            allowed = allowed & (tl.load(fold + patch, mask=patch < patches, other=-2)[None, :] == own_fold[:, None])
        score = tl.where(allowed, score, -float("inf"))
        highest, at = tl.max(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
        # Only a strictly higher score moves the best: of equals the lowest index stays.
        best_at = tl.where(highest > best, start + at, best_at)
        best = tl.maximum(highest, best)
    # The student's own length changes no order and waits for the end, where registers are free.
    own = tl.zeros([ROWS], tl.float32)
    for first in range(0, dim, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        place = student + row.to(tl.int64)[:, None] * student_row + feature[None, :]
        ours = tl.load(place, mask=(row < masked)[:, None] & (feature < dim)[None, :], other=0.0).to(tl.float32)
        own += tl.sum(ours * ours, axis=1)
    if COSINE:
        best = best / tl.maximum(tl.sqrt(own), 1e-12)
    else:
        best = best - own
    place = image * masked + row
    tl.store(index + place, best_at.to(tl.int64), mask=row < masked)
    tl.store(similarity + place, best, mask=row < masked)
