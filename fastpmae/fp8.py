"""The teachers' linear layers in 8-bit floats: each row of both sides of a product is scaled to their whole range."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fastpmae.errors import UserError
from fastpmae.model import Encoder

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


class Fp8Linear(nn.Linear):
    """A linear layer whose product is of 8-bit floats. It has no gradient: teachers alone compute with it."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "Fp8Linear":
        """The same layer, on the same parameters."""
        layer = cls(linear.in_features, linear.out_features, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def forward(self, rows: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:  # pyright: ignore
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        left, left_scale = to_fp8(rows.flatten(0, -2))
        right, right_scale = to_fp8(self.weight)
        # GPUs scale by rows in products that end in bf16 alone.
        ends_in = torch.bfloat16 if kind == "cuda" else dtype
        product = F.scaled_mm(
            left, right.t(), left_scale, F.ScalingType.RowWise, right_scale.t(), F.ScalingType.RowWise,
            bias=self.bias.to(ends_in), output_dtype=ends_in,
        )  # fmt: skip
        return product.to(dtype).unflatten(0, rows.shape[:-1])


def to_fp8(rows: Float[Tensor, "rows inputs"]) -> tuple[Tensor, Float[Tensor, "rows 1"]]:
    """Rows in 8-bit floats, and what each is to be multiplied by: its largest entry becomes the largest number."""
    rows = rows.float()
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (rows / scale).to(FP8), scale


def use_fp8(encoder: Encoder) -> None:
    """From now on the linear layers of the encoder's blocks multiply in 8 bits; parameters and names stay."""
    for block in encoder.blocks.modules():
        for name, layer in list(block.named_children()):
            if type(layer) is nn.Linear:
                setattr(block, name, Fp8Linear.of(layer))


def check_fp8(encoder: Encoder, device: torch.device) -> None:
    """Whether 8-bit products can be computed there. Raises UserError with the reason where not."""
    odd = [layer for layer in encoder.blocks.modules() if isinstance(layer, nn.Linear) and _odd(layer)]
    if odd:
        raise UserError(
            f"--teacher-precision fp8: layers of {odd[0].in_features} x {odd[0].out_features} are no multiples of 16; "
            "choose another --width, or leave it out"
        )
    if not hasattr(F, "scaled_mm"):
        raise UserError(f"--teacher-precision fp8: torch {torch.__version__} has no products in 8 bits")
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9)):
        raise UserError(
            f"--teacher-precision fp8: {torch.cuda.get_device_name(device)} does not multiply torch's 8-bit floats "
            "(NVIDIA GPUs from compute capability 8.9 on do); leave it out"
        )


def _odd(layer: nn.Linear) -> bool:
    return layer.in_features % 16 > 0 or layer.out_features % 16 > 0
