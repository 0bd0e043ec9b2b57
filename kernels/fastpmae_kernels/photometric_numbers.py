"""What all forms of `photometric` share: the columns of its draws, the blur's weights, the factors in fp32."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""What the first four columns of `choices` name; the columns of `factors` with the same numbers go with them."""
SIGMA = 4
"""The column of `factors` after them."""
JITTER, GRAY, BLURRED, SOLARISED = range(4, 8)
"""The columns of `choices` after the order."""
FACTORS, CHOICES = 5, 9
RADIUS = 11
"""The blur has 23 taps."""
ONE = 1 << 14
"""The blur's weights sum to this."""
SCALE = 255.999 / 255.0


def blur_weights(sigma: Float[Tensor, " batch"]) -> Int[Tensor, "batch taps"]:
    """The middle's weight and those of 1 to 11 pixels away, in units of 1 / ONE."""
    distance = torch.arange(1, RADIUS + 1, device=sigma.device, dtype=torch.float64)
    shares = (-(distance**2) / (2.0 * sigma.double().unsqueeze(1) ** 2)).clamp(min=-600.0).exp()
    shares = shares / (1.0 + 2.0 * shares.sum(dim=1, keepdim=True))
    sides = (shares * ONE + 0.5).floor()
    return torch.cat([ONE - 2 * sides.sum(dim=1, keepdim=True), sides], dim=1).to(torch.int32)


def fp32_numbers(factors: Tensor) -> Float[Tensor, "batch 8"]:
    """In fp32: each factor, with the hue as a turn of 0 to 6; then what is left of 1 beside each."""
    exact = factors.double()[:, :SIGMA]
    exact = torch.cat([exact[:, :HUE], (exact[:, HUE:] - exact[:, HUE:].floor()) * 6.0, 1.0 - exact], dim=1)
    return exact.float()
