"""Nearest-patch matching: which teacher patch lends its pseudo label to a student patch (paper, section 3.3)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy import float32, int32
from torch import Tensor

from fastpmae_kernels import backend
from fastpmae_kernels.backend import ceil_div, constexpr, operation, tl, triton
from fastpmae_kernels.rows import as_fp32, compiled, share_out

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
        fold = _fold_of(folds, student.device)
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


def _fold_of(folds: Sequence[int], device: torch.device) -> Int[Tensor, " patches"]:
    sizes = torch.tensor(folds, device=device)
    return torch.arange(len(folds), device=device).repeat_interleave(sizes, output_size=sum(folds))


# The CPU form: products of a few tokens at a time and a running best, all of an image's work on one thread.

NEAR = 230_000
"""Bytes of student tokens that are gone over again and again: they stay in a core's second cache."""


@operation("nearest_patch")
def nearest_patch_op(student: Tensor, teacher: Tensor, cosine: bool, folds: Sequence[int]) -> tuple[Tensor, Tensor]:
    batch, masked, _ = student.shape
    index = torch.zeros(batch, masked, dtype=torch.int64)
    similarity = torch.zeros(batch, masked)
    places, best = index.numpy(), similarity.numpy()
    ends = np.cumsum(folds or [masked])
    rows = 3 * max(1, NEAR // (12 * max(1, student.shape[2])))

    def work(image: int, _start: int, _stop: int) -> None:
        ours, theirs = as_fp32(student[image]), as_fp32(teacher[image])
        scale, shift = _judged(theirs, cosine)
        for end, size in zip(ends, folds or [masked], strict=True):
            mine = slice(end - size, end)
            among = mine if folds else slice(0, len(theirs))
            for first in range(mine.start, mine.stop, rows):
                some = slice(first, min(first + rows, mine.stop))
                _nearest(ours[some], theirs[among], scale[among], shift[among], best[image, some], places[image, some])
            places[image, mine] += among.start
        _finish(ours, cosine, best[image])

    if index.numel():
        share_out([(image, image + 1) for image in range(batch)], work)
    return index, similarity


@compiled("contract", "reassoc", "nsz")
def _squared(token):
    total = float32(0.0)
    for k in range(token.size):
        total += token[k] * token[k]
    return total


@compiled()
def _judged(teacher, cosine):
    """What a product with each teacher token is multiplied with, and what is added, to give its score."""
    scale, shift = np.full(len(teacher), 2, np.float32), np.zeros(len(teacher), np.float32)
    for j in range(len(teacher)):
        squared = _squared(teacher[j])
        if cosine:
            scale[j] = float32(1.0) / max(np.sqrt(squared), float32(1e-12))
        else:
            shift[j] = -squared
    return scale, shift


@compiled()
def _finish(student, cosine, best):
    """The student token's own length, which changes no order."""
    for i in range(len(student)):
        squared = _squared(student[i])
        best[i] = best[i] / max(np.sqrt(squared), float32(1e-12)) if cosine else best[i] - squared


@compiled("contract", "reassoc", "nsz")
def _products(student, i, teacher, j):
    """Three student tokens from `i` on times four teacher tokens from `j` on; past the end the last token counts again.

    Read along the features, the twelve sums fill the vector registers of AVX2 and nothing has to be packed. Every sum
    is formed in the same order, so equal tokens give equal products, whichever place they take.
    """
    rows, patches = len(student) - 1, len(teacher) - 1
    a0, a1, a2 = student[i], student[min(i + 1, rows)], student[min(i + 2, rows)]
    b0, b1, b2, b3 = (
        teacher[j],
        teacher[min(j + 1, patches)],
        teacher[min(j + 2, patches)],
        teacher[min(j + 3, patches)],
    )
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = s20 = s21 = s22 = s23 = float32(0.0)
    for k in range(a0.size):
        x0, x1, x2 = a0[k], a1[k], a2[k]
        y = b0[k]
        s00, s10, s20 = s00 + x0 * y, s10 + x1 * y, s20 + x2 * y
        y = b1[k]
        s01, s11, s21 = s01 + x0 * y, s11 + x1 * y, s21 + x2 * y
        y = b2[k]
        s02, s12, s22 = s02 + x0 * y, s12 + x1 * y, s22 + x2 * y
        y = b3[k]
        s03, s13, s23 = s03 + x0 * y, s13 + x1 * y, s23 + x2 * y
    return s00, s01, s02, s03, s10, s11, s12, s13, s20, s21, s22, s23


@compiled()
def _nearest(student, teacher, scale, shift, best, place):
    """The running best of every student token over the teacher's, four of them at a time.

    Those four stay in the nearest cache while the student's pass by.
    """
    rows, patches = len(student), len(teacher)
    score, at = np.empty((4, rows + 2), np.float32), np.zeros(rows, np.int32)
    best[:] = -np.inf
    for j in range(0, patches, 4):
        for i in range(0, rows, 3):
            (
                score[0, i], score[1, i], score[2, i], score[3, i],
                score[0, i + 1], score[1, i + 1], score[2, i + 1], score[3, i + 1],
                score[0, i + 2], score[1, i + 2], score[2, i + 2], score[3, i + 2],
            ) = _products(student, i, teacher, j)  # fmt: skip
        for c in range(min(4, patches - j)):
            _improve(score[c], scale[j + c], shift[j + c], int32(j + c), best, at)
    place[:] = at


@compiled("contract", "nsz")
def _improve(score, by, plus, here, best, at):
    """Only what is strictly better: of equals the lowest place stays."""
    for i in range(at.size):
        value = score[i] * by + plus
        at[i] = here if value > best[i] else at[i]
        best[i] = value if value > best[i] else best[i]


@nearest_patch_op.register_fake
def _(student: Tensor, teacher: Tensor, cosine: bool, folds: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape = student.shape[:2]
    return student.new_empty(shape, dtype=torch.int64), student.new_empty(shape, dtype=torch.float32)


# The Triton form.


@nearest_patch_op.register_kernel("cuda")
def nearest_patch_triton(
    student: Tensor, teacher: Tensor, cosine: bool, folds: Sequence[int]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    student, teacher = (t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous() for t in (student, teacher))
    batch, masked, dim = student.shape
    index = torch.empty(batch, masked, dtype=torch.int64, device=student.device)
    similarity = torch.empty(batch, masked, dtype=torch.float32, device=student.device)
    fold = _fold_of(folds, student.device).to(torch.int32) if folds else index
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
            theirs = theirs.to(ours.dtype)
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
