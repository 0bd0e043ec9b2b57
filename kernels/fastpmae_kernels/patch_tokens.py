"""Bytes to tokens: exactly the patches that are asked for, cut out, flattened and normalised in one pass."""

import functools

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fastpmae_kernels import backend
from fastpmae_kernels.backend import constexpr, next_power_of_two, operation, tl, triton, written_on
from fastpmae_kernels.cpu import patch_tokens as on_cpu

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@torch.no_grad()
def patch_tokens(
    images: UInt8[Tensor, "batch 3 height width"],
    ids: Int[Tensor, "batch count"],
    patch_size: int,
    dtype: torch.dtype = torch.float32,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Float[Tensor, "batch count pixels"]:
    """The normalised pixels of the patches `ids`, channel by channel, row by row: a timm patch embedding's order.

    Args:
        images: bytes; any strides.
        ids: patch numbers, row by row over the grid, in any order and number, also repeated.
        patch_size: in pixels; divides the height and the width.
        dtype: of the result: fp32, bf16 or fp16.
        mean, std: of pixel values between 0 and 1, a channel; ImageNet's by default.

    Raises:
        ValueError: for images that are not bytes with 3 channels, a patch size that does not fit, or ids of another
            batch.
        IndexError: on the CPU, for an id outside the grid; on a GPU, which is not waited for, such a patch is NaN.
    """
    _check(images, ids, patch_size)
    if backend.runs_plain(images) or dtype == torch.float64:
        return patch_tokens_ref(images, ids, patch_size, dtype, mean, std)
    return torch.ops.fastpmae.patch_tokens(images, ids, patch_size, dtype, list(mean), list(std))


def patch_tokens_ref(
    images: UInt8[Tensor, "batch 3 height width"],
    ids: Int[Tensor, "batch count"],
    patch_size: int,
    dtype: torch.dtype = torch.float32,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Float[Tensor, "batch count pixels"]:
    """The plain form of `patch_tokens`: normalise, cut, gather."""
    _check(images, ids, patch_size)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    of_channels = [written_on(images.device, numbers, exact)[:, None, None] * 255 for numbers in (mean, std)]
    pixels = (images.to(exact) - of_channels[0]) / of_channels[1]
    batch, channels, height, width = images.shape
    grid = pixels.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return patches.gather(1, ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1])).to(dtype)


def _check(images: Tensor, ids: Tensor, patch_size: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be bytes [batch, 3, height, width], not {images.dtype} {tuple(images.shape)}")
    if patch_size < 1 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(f"patches of {patch_size} pixels do not fill images of {tuple(images.shape[2:])}")
    if ids.ndim != 2 or len(ids) != len(images) or ids.dtype.is_floating_point:
        raise ValueError(f"ids must be integers [{len(images)}, count], not {ids.dtype} {tuple(ids.shape)}")


@functools.cache
def affine(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Normalisation as a factor and a summand a channel."""
    return tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))


# The CPU form, and what torch.compile asks of every form.


@operation("patch_tokens")
def patch_tokens_op(
    images: Tensor, ids: Tensor, patch_size: int, dtype: torch.dtype, mean: list[float], std: list[float]
) -> Tensor:  # fmt: skip
    return on_cpu.patch_tokens(images, ids, patch_size, dtype, *affine(tuple(mean), tuple(std)))


@patch_tokens_op.register_fake
def _(images, ids, patch_size, dtype, mean, std):
    return images.new_empty(*ids.shape, 3 * patch_size**2, dtype=dtype)


# The Triton form.


@patch_tokens_op.register_kernel("cuda")
def patch_tokens_triton(
    images: Tensor, ids: Tensor, patch_size: int, dtype: torch.dtype, mean: list[float], std: list[float]
) -> Tensor:  # fmt: skip
    images, ids = images.contiguous(), ids.contiguous()
    batch, _, height, width = images.shape
    count = ids.shape[1]
    tokens = torch.empty(batch, count, 3 * patch_size**2, dtype=dtype, device=images.device)
    if tokens.numel():
        scale, shift = affine(tuple(mean), tuple(std))
        tokens_kernel[(batch, count)](
            images, ids, tokens, height, width, *scale, *shift, SIZE=patch_size, **tokens_meta(patch_size)
        )
    return tokens


def tokens_meta(patch_size: int, warp_size: int = 64 if torch.version.hip else 32) -> dict[str, int]:
    """Tile of `tokens_kernel`: all three channels of a patch, a line of 16 pixels a thread's load."""
    columns, lines = next_power_of_two(patch_size), next_power_of_two(3 * patch_size)
    threads = min(256, max(64, lines * columns // 16))
    return {"LINES": lines, "COLUMNS": columns, "num_warps": threads // warp_size}


@triton.jit
def tokens_kernel(
    images, ids, tokens, height, width, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    SIZE: constexpr, LINES: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    """One patch of one image."""
    image = tl.program_id(0).to(tl.int64)
    place = image * tl.num_programs(1) + tl.program_id(1)
    columns = width // SIZE
    patch = tl.load(ids + place).to(tl.int64)
    exists = (patch >= 0) & (patch < columns * (height // SIZE))
    line = tl.arange(0, LINES)
    x = tl.arange(0, COLUMNS)
    channel = line // SIZE
    y = patch // columns * SIZE + line % SIZE
    start = ((image * 3 + channel) * height + y) * width + patch % columns * SIZE
    inside = (line < 3 * SIZE)[:, None] & (x < SIZE)[None, :]
    byte = tl.load(images + start[:, None] + x[None, :], mask=inside & exists, other=0)
    scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
    shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
    value = byte.to(tl.float32) * scale[:, None] + shift[:, None] + tl.where(exists, 0.0, float("nan"))
    into = tokens + place * (3 * SIZE * SIZE) + (line * SIZE)[:, None] + x[None, :]
    tl.store(into, value.to(tokens.dtype.element_ty), mask=inside)
