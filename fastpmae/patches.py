"""Images to patches, and where a patch sits: the two things that need the grid."""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def pixel_patches(
    images: UInt8[Tensor, "batch 3 height width"], ids: Int[Tensor, "batch count"], patch_size: int
) -> UInt8[Tensor, "batch count pixels"]:
    """The pixels of the patches `ids`, channel by channel, row by row: the order of a timm patch embedding."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images.view(batch, channels, rows, patch_size, columns, patch_size)
    patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)
    return patches.gather(1, ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def normalise(
    pixels: UInt8[Tensor, "batch count pixels"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "batch count pixels"]:
    """Bytes to numbers with ImageNet's mean and spread a channel."""
    mean = torch.tensor(IMAGENET_MEAN, dtype=dtype, device=pixels.device) * 255
    std = torch.tensor(IMAGENET_STD, dtype=dtype, device=pixels.device) * 255
    area = pixels.shape[-1] // 3
    return (pixels.to(dtype) - mean.repeat_interleave(area)) / std.repeat_interleave(area)


def sincos_positions(rows: int, columns: int, dim: int) -> Float[Tensor, "positions dim"]:
    """Fixed 2-D sine-cosine positions: the first half of the features tells the column, the second the row.

    The same numbers as MAE's, so that its checkpoints fit.

    Raises:
        ValueError: for a width that four does not divide.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that four divides, not {dim}")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def axis(places: Tensor) -> Tensor:
        angle = places.double().unsqueeze(-1) * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([axis(column.flatten()), axis(row.flatten())], dim=-1).float()
