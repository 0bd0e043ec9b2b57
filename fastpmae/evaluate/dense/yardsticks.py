"""What patches are told apart by without a network: where they are in the image, and their colour and contrast."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastpmae.evaluate.dense.context import Grid, cell_labels
from fastpmae.evaluate.dense.labelled import Mask, Pixels

CELLS = 32
"""Along each side of an image, for the prior of a place."""


class PositionPrior:
    """How often each class stands where in the training images, of all sizes: a grid of 32 x 32 cells an image."""

    def __init__(self, classes: int):
        self.classes = classes
        self.sums = torch.zeros(CELLS, CELLS, classes)

    def add(self, mask: Mask) -> None:
        """Count a training image."""
        self.sums += cell_labels(mask, CELLS, self.classes)

    def scores(self, height: int, width: int) -> Float[Tensor, "classes height width"]:
        """How often each class stands at each pixel of an image of this size."""
        return F.interpolate(self.sums.permute(2, 0, 1)[None], (height, width), mode="bilinear", align_corners=False)[0]


def colour_features(image: Pixels, grid: Grid) -> Float[Tensor, "rows columns 6"]:
    """Mean red, green and blue of each patch, the spread of its brightness, and where it is from top and from left.

    All of them lie between 0 and 1. The image has the size that the network sees.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
    whole = (grid.rows * grid.patch, grid.columns * grid.patch)
    pixels = F.pad(pixels, (0, whole[1] - pixels.shape[3], 0, whole[0] - pixels.shape[2]), mode="replicate")
    colours = F.avg_pool2d(pixels, grid.patch)[0]
    gray = pixels.mean(dim=1, keepdim=True)
    spread = (F.avg_pool2d(gray.square(), grid.patch) - F.avg_pool2d(gray, grid.patch).square()).clamp(min=0).sqrt()[0]
    down = ((torch.arange(grid.rows) + 0.5) / grid.rows)[:, None].expand(grid.rows, grid.columns)
    across = ((torch.arange(grid.columns) + 0.5) / grid.columns)[None].expand(grid.rows, grid.columns)
    return torch.cat([colours, spread, down[None], across[None]]).permute(1, 2, 0)
