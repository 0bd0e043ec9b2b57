"""The teachers' linear layers in 8-bit floats: each row of both sides of a product is scaled to their whole range."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastpmae.model.vit import Encoder
from fastpmae_loaders.errors import UserError

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

    def forward(self, rows: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        multiply = multiply_on_gpu if kind == "cuda" else multiply_plainly
        product = multiply(*to_fp8(rows.flatten(0, -2)), *to_fp8(self.weight), self.bias)
        return product.to(dtype).unflatten(0, rows.shape[:-1])


def to_fp8(rows: Float[Tensor, "rows inputs"]) -> tuple[Tensor, Float[Tensor, "rows 1"]]:
    """Rows in 8-bit floats, and what each is to be multiplied by: its largest entry becomes the largest number."""
    rows = rows.float()
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (rows / scale).to(FP8), scale


def multiply_on_gpu(
    left: Float[Tensor, "rows inputs"],
    left_scale: Float[Tensor, "rows 1"],
    right: Float[Tensor, "outputs inputs"],
    right_scale: Float[Tensor, "outputs 1"],
    bias: Float[Tensor, " outputs"],
) -> Float[Tensor, "rows outputs"]:
    """The product of two matrices in 8 bits, plus the bias, in bf16: a GPU scales by rows for no other result.

    torch.nn.functional.scaled_mm says the same, but calls an operator that torch 2.11 compiles in no whole graph. Sums
    stay in the tensor cores' own accumulators (14 bits or more), as in everybody's forward passes in 8 bits: adding
    them up in fp32 costs Hopper a good part of what 8 bits gain, and the operands have 4 bits.
    """
    return torch._scaled_mm(
        left, right.t(), left_scale, right_scale.t(),
        bias=bias.to(torch.bfloat16), out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


def multiply_plainly(
    left: Float[Tensor, "rows inputs"],
    left_scale: Float[Tensor, "rows 1"],
    right: Float[Tensor, "outputs inputs"],
    right_scale: Float[Tensor, "outputs 1"],
    bias: Float[Tensor, " outputs"],
) -> Float[Tensor, "rows outputs"]:
    """The same in fp32 on any device, where the product of two 8-bit floats is exact. torch 2.11 does not scale by rows
    on the CPU."""
    with torch.autocast(left.device.type, enabled=False):
        return (left.float() @ right.float().t()).mul_(left_scale).mul_(right_scale.t()).add_(bias)


def use_fp8(encoder: Encoder) -> None:
    """From now on the linear layers of the encoder's blocks multiply in 8 bits; parameters and names stay."""
    for block in encoder.blocks.modules():
        for name, layer in list(block.named_children()):
            if type(layer) is nn.Linear:
                setattr(block, name, Fp8Linear.of(layer))


def check_fp8_sizes(width: int, hidden: int) -> None:
    """Whether the layers of such blocks have sizes that 8-bit products take. Raises UserError where not."""
    layers = ((width, 3 * width), (width, hidden))
    odd = next((layer for layer in layers if any(size % 16 for size in layer)), None)
    if odd:
        raise UserError(
            f"--teacher-precision fp8: layers of {odd[0]} x {odd[1]} are no multiples of 16; "
            "choose another --width, or leave it out"
        )


def check_fp8_device(device: torch.device) -> None:
    """Whether 8-bit products can be computed there: asked of a GPU by one. Raises UserError with the reason."""
    if device.type != "cuda":
        return
    name = torch.cuda.get_device_name(device)
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"--teacher-precision fp8: {name} does not multiply torch's 8-bit floats "
            "(NVIDIA GPUs from compute capability 8.9 on do); leave it out"
        )
    ones = torch.ones(16, 16, device=device)
    try:
        multiply_on_gpu(*to_fp8(ones), *to_fp8(ones), ones[0])
    except (AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--teacher-precision fp8: torch {torch.__version__} has no product of 8-bit floats with a scale a row for "
            f"{name} ({reason}); leave it out"
        ) from None
