"""Nearest-patch matching on the CPU: tiles of products and a running best, all of an image's work on one thread."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy import float32
from torch import Tensor

from fastpmae_kernels.cpu.compiled import compiled
from fastpmae_kernels.cpu.rows import as_fp32, maximum, share_out
from fastpmae_kernels.cpu.tiles import COLUMNS, LANES, ROWS, tile

BLOCK = 48
"""Teacher tokens gone over at a time: 144 KiB of 768 features, which a core's second cache holds."""
GROUP = 2 * ROWS
"""Student tokens that meet them together: 18 KiB, which its nearest cache holds beside four of the teacher's."""
IMAGES = 4
"""Images that a thread takes at a time."""


def nearest_patch(student: Tensor, teacher: Tensor, cosine: bool, folds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For each student token the nearest teacher token of its image, or of its fold, and how near it is."""
    batch, masked, features = student.shape
    index = torch.zeros(batch, masked, dtype=torch.int64, device="cpu")
    similarity = torch.zeros(batch, masked, dtype=torch.float32, device="cpu")
    places, best = index.numpy(), similarity.numpy()
    sizes = np.array(folds, np.int64)
    if short := -features % LANES:
        student, teacher = F.pad(student, (0, short)), F.pad(teacher, (0, short))

    def work(_block: int, start: int, stop: int) -> None:
        ours, theirs = as_fp32(student[start:stop]), as_fp32(teacher[start:stop])
        _nearest_of_images(ours, theirs, cosine, sizes, best[start:stop], places[start:stop])

    if index.numel():
        share_out([(start, min(start + IMAGES, batch)) for start in range(0, batch, IMAGES)], work)
    return index, similarity


@compiled()
def _nearest_of_images(student, teacher, cosine, folds, best, place):
    for image in range(len(student)):
        if not folds.size:
            _nearest(student[image], teacher[image], cosine, best[image], place[image])
        start = 0
        for size in folds:
            own = slice(start, start + size)
            _nearest(student[image, own], teacher[image, own], cosine, best[image, own], place[image, own])
            place[image, own] += start
            start += size


@compiled()
def _nearest(student, teacher, cosine, best, place):
    """The best of every student token over the teacher's: a group of them against a block of those."""
    best[:], place[:] = -np.inf, 0
    products = np.empty((GROUP, BLOCK), np.float32)
    scale, shift = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for first in range(0, len(teacher), BLOCK):
        tokens = teacher[first : first + BLOCK]
        for j in range(len(tokens)):
            squared = _squared(tokens[j])
            scale[j] = float32(1.0) / max(np.sqrt(squared), float32(1e-12)) if cosine else float32(2.0)
            shift[j] = float32(0.0) if cosine else -squared
        for start in range(0, len(student), GROUP):
            group = student[start : start + GROUP]
            _multiply(group, tokens, products)
            for i in range(len(group)):
                scores = products[i, : len(tokens)]
                _score(scores, scale, shift)
                highest = maximum(scores)
                if highest > best[start + i]:  # of equals the earlier block's stays
                    best[start + i], place[start + i] = highest, first + _first(scores, highest)
    for i in range(len(student)):
        # the student token's own length changes no order
        squared = _squared(student[i])
        best[i] = best[i] / max(np.sqrt(squared), float32(1e-12)) if cosine else best[i] - squared


@compiled("contract", "reassoc", "nsz")
def _squared(token):
    total = float32(0.0)
    for k in range(token.size):
        total += token[k] * token[k]
    return total


@compiled()
def _multiply(student, teacher, products):
    """Up to GROUP student tokens times up to BLOCK teacher tokens; past either end the last one counts again."""
    features, row = student.shape[1], student.shape[1] * 4
    a, b, sums, sums_row = student.ctypes.data, teacher.ctypes.data, products.ctypes.data, 4 * BLOCK
    a_last, b_last = (len(student) - 1) * row, (len(teacher) - 1) * row
    for j in range(0, len(teacher), COLUMNS):
        at = j * row
        b0, b1 = b + at, b + min(at + row, b_last)
        b2, b3 = b + min(at + 2 * row, b_last), b + min(at + 3 * row, b_last)
        for i in range(0, len(student), ROWS):
            at = i * row
            a0, a1, a2 = a + at, a + min(at + row, a_last), a + min(at + 2 * row, a_last)
            tile(a0, a1, a2, b0, b1, b2, b3, features, sums + i * sums_row + 4 * j, sums_row)


@compiled("contract", "nsz")
def _score(products, scale, shift):
    """What is not a number is never the best."""
    for j in range(products.size):
        score = products[j] * scale[j] + shift[j]
        products[j] = score if score == score else float32(-np.inf)


@compiled()
def _first(scores, value):
    for j in range(scores.size):
        if scores[j] == value:
            return j
    return 0
