"""Where a patch sits in its image, and by what numbers its pixels are normalised."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def sincos_positions(
    rows: int, columns: int, dim: int, extent: int = 0, device: torch.device | None = None
) -> Float[Tensor, "positions dim"]:
    """Fixed 2-D sine-cosine positions: the first half of the features tells the column, the second the row.

    The same numbers as MAE's, so that its checkpoints fit.

    Args:
        extent: rows, and columns, of the grid whose extent this one covers, by default its own: patches then lie where
            their centres are in that grid, between its places.

    Raises:
        ValueError: for a width that four does not divide.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that four divides, not {dim}")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))

    def places(count: int) -> Tensor:
        return (torch.arange(count, dtype=torch.float64, device=device) + 0.5) * ((extent or count) / count) - 0.5

    def axis(places: Tensor) -> Tensor:
        angle = places.unsqueeze(-1) * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    row, column = torch.meshgrid(places(rows), places(columns), indexing="ij")
    return torch.cat([axis(column.flatten()), axis(row.flatten())], dim=-1).float()


def positions_on(positions: Float[Tensor, "1 places dim"], side: int) -> Float[Tensor, "1 others dim"]:
    """Positions of the class token and of a square grid, for a grid of another side over the same extent.

    Those of sine and cosine are computed at the new places. What others differ by from them, as those that come from
    another's weights or are drawn at random, is interpolated (bicubic). The class token's stays as it is.
    """
    own, dim, device = math.isqrt(positions.shape[1] - 1), positions.shape[2], positions.device
    if side == own:
        return positions
    rest = positions[:, 1:] - sincos_positions(own, own, dim, device=device)
    rest = F.interpolate(rest.mT.unflatten(2, (own, own)), (side, side), mode="bicubic").flatten(2).mT
    return torch.cat([positions[:, :1], sincos_positions(side, side, dim, own, device) + rest], dim=1)
