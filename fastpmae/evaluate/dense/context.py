"""Labels of patches by their nearest neighbours, and what a mask says of its patches: k-NN in context (Hummingbird).

Balazevic et al., "Towards In-Context Scene Understanding", NeurIPS 2023: patches of training images lie in a memory
with the labels of their pixels; a patch of another image takes the labels of its nearest ones, weighted by a softmax.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastpmae.evaluate.dense.labelled import Mask
from fastpmae.evaluate.dense.overlap import best_classes

CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Grid:
    """How an image is cut into patches: scaled, then filled up to whole patches at the right and the bottom.

    Attributes:
        height, width: of the image as it is.
        scaled: (height, width) as the network sees it, without what is filled up.
        patch: side of a patch in pixels.
    """

    height: int
    width: int
    scaled: tuple[int, int]
    patch: int

    @property
    def rows(self) -> int:
        """Patches from top to bottom, the last one perhaps filled up."""
        return -(-self.scaled[0] // self.patch)

    @property
    def columns(self) -> int:
        """Patches from left to right."""
        return -(-self.scaled[1] // self.patch)


def grid_of(height: int, width: int, patch: int, short_side: int = 0) -> Grid:
    """The patches of an image, scaled down where its shorter side is above `short_side` pixels (0: never)."""
    shorter = min(height, width)
    if not short_side or shorter <= short_side:
        return Grid(height, width, (height, width), patch)
    scaled = (max(1, round(height * short_side / shorter)), max(1, round(width * short_side / shorter)))
    return Grid(height, width, scaled, patch)


def patch_labels(mask: Mask, grid: Grid, classes: int) -> Float[Tensor, "rows columns classes"]:
    """The share of each class in the pixels of a patch that count; zeros where none does."""
    rows = np.arange(grid.height) * grid.scaled[0] // grid.height // grid.patch
    columns = np.arange(grid.width) * grid.scaled[1] // grid.width // grid.patch
    return _shares(mask, rows, columns, (grid.rows, grid.columns), classes)


def cell_labels(mask: Mask, cells: int, classes: int) -> Float[Tensor, "cells cells classes"]:
    """The same for an image that is cut into as many cells along each side, however large it is."""
    height, width = mask.shape
    rows, columns = np.arange(height) * cells // height, np.arange(width) * cells // width
    return _shares(mask, rows, columns, (cells, cells), classes)


def _shares(
    mask: Mask,
    rows: Int[np.ndarray, " height"],
    columns: Int[np.ndarray, " width"],
    size: tuple[int, int],
    classes: int,
) -> Float[Tensor, "rows columns classes"]:
    places = (rows[:, None] * size[1] + columns[None]) * classes + mask
    counts = np.bincount(places[mask >= 0], minlength=size[0] * size[1] * classes)
    counts = torch.from_numpy(counts).view(*size, classes).float()
    return counts / counts.sum(dim=2, keepdim=True).clamp(min=1)


def at_mask_size(
    scores: Float[Tensor, "rows columns classes"], grid: Grid
) -> Float[Tensor, "classes height width"]:  # fmt: skip
    """Scores of patches as scores of the image's pixels: bilinear, what was filled up cut off."""
    whole = (grid.rows * grid.patch, grid.columns * grid.patch)
    found = F.interpolate(scores.permute(2, 0, 1)[None], whole, mode="bilinear", align_corners=False)
    found = found[:, :, : grid.scaled[0], : grid.scaled[1]]
    if grid.scaled != (grid.height, grid.width):
        found = F.interpolate(found, (grid.height, grid.width), mode="bilinear", align_corners=False)
    return found[0]


def classes_at_mask_size(
    scores: Float[Tensor, "rows columns classes"], grid: Grid
) -> Int[Tensor, "height width"]:  # fmt: skip
    """The class of the highest score of each of the image's pixels (see `at_mask_size`)."""
    return best_classes(lambda some: at_mask_size(scores[..., some], grid), scores.shape[2], grid.height * grid.width)


@dataclass(frozen=True)
class Memory:
    """Patches with their labels.

    Attributes:
        features: of each patch; of unit length where the cosine is meant.
        labels: the share of each class in its pixels.
        offset: what is added to a product with a patch's features: 0, or half its square below 0 where the distance is
            meant.
    """

    features: Float[Tensor, "patches dim"]
    labels: Float[Tensor, "patches classes"]
    offset: Float[Tensor, " patches"] | None = None

    def vote(
        self, queries: Float[Tensor, "queries dim"], neighbours: int, temperature: float
    ) -> Float[Tensor, "queries classes"]:
        """The labels of each row's nearest patches, weighted by softmax(similarity / temperature).

        The similarity is the product of the features, or half the squared distance below 0.
        """
        found = []
        k = min(neighbours, len(self.features))
        rows = max(1, CHUNK_BYTES // (4 * len(self.features)))
        for part in queries.split(rows):
            similarity = part @ self.features.T
            if self.offset is not None:
                similarity += self.offset
            best = similarity.topk(k, dim=1)
            weights = (best.values / temperature).softmax(dim=1)
            found.append(torch.einsum("qk,qkc->qc", weights, self.labels[best.indices].to(weights.dtype)))
        return torch.cat(found)


def chosen_patches(count: int, most: int, seed: int, place: int) -> Int[np.ndarray, " chosen"]:
    """Which patches of an image go into a memory: all, or `most` of them by a draw of seed and place."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, place]).permutation(count)[:most])
