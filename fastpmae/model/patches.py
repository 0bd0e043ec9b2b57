"""Where a patch sits in its image, and by what numbers its pixels are normalised."""

import torch
from jaxtyping import Float
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
