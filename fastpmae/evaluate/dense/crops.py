"""Training images of dense tasks: scaled, cropped, flipped and recoloured, their masks or boxes with them."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torchvision.transforms.v2 import functional as change

from fastpmae.evaluate.dense.labelled import IGNORE
from fastpmae.evaluate.dense.recipe import SegmentConfig

Pixels = UInt8[np.ndarray, "height width 3"]
Labels = Int[np.ndarray, "_rows _columns"] | Bool[np.ndarray, "_rows _columns"]
TRIES = 10


def resize_factor(height: int, width: int, short_side: int, long_side: int) -> float:
    """By how much an image is resized so that its shorter side is `short_side` and its longer one at most `long_side`;
    0 is no wish."""
    if not short_side:
        return 1.0
    factor = short_side / min(height, width)
    return min(factor, long_side / max(height, width)) if long_side else factor


def scaled_size(height: int, width: int, factor: float) -> tuple[int, int]:
    """Height and width of a resized image, at least one pixel."""
    return max(1, round(height * factor)), max(1, round(width * factor))


def resized_part(
    pixels: Pixels, size: Sequence[int], top: int, left: int, height: int, width: int
) -> UInt8[np.ndarray, "rows columns 3"]:
    """A part of an image as it would be if all of it were resized to `size` (bilinear, antialiased by Pillow)."""
    across, down = pixels.shape[1] / size[1], pixels.shape[0] / size[0]
    box = (
        left * across,
        top * down,
        min((left + width) * across, pixels.shape[1]),
        min((top + height) * down, pixels.shape[0]),
    )
    if (height, width) == pixels.shape[:2] == tuple(size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box))


def nearest_part(mask: Labels, size: Sequence[int], top: int, left: int, height: int, width: int) -> Labels:
    """The same part of a mask, each pixel the nearest one's."""
    rows = (2 * (top + np.arange(height)) + 1) * mask.shape[0] // (2 * size[0])
    columns = (2 * (left + np.arange(width)) + 1) * mask.shape[1] // (2 * size[1])
    return mask[rows[:, None], columns]


def segmentation_crop(
    pixels: Pixels,
    mask: Int[np.ndarray, "height width"],
    config: SegmentConfig,
    fill: Sequence[float],
    generator: np.random.Generator,
) -> tuple[UInt8[torch.Tensor, "3 side side"], Int[torch.Tensor, "side side"]]:
    """An image and its mask as a step trains on them: mmsegmentation's recipe.

    Args:
        fill: the colour (0 to 1) of what lies beyond the image; there the mask is IGNORE.
        generator: what is drawn from.
    """
    side, (source_height, source_width) = config.crop_size, pixels.shape[:2]
    factor = resize_factor(source_height, source_width, config.short_side, config.long_side)
    low, high = config.scale
    size = scaled_size(source_height, source_width, factor * generator.uniform(low, high))
    height, width = min(side, size[0]), min(side, size[1])
    for _ in range(TRIES):
        top, left = (
            int(generator.integers(extent - part + 1)) for extent, part in zip(size, (height, width), strict=True)
        )
        labels = nearest_part(mask, size, top, left, height, width)
        counts = np.unique(labels[labels != IGNORE], return_counts=True)[1]
        if config.cat_max_ratio >= 1 or (len(counts) > 1 and counts.max() < config.cat_max_ratio * counts.sum()):
            break
    image = resized_part(pixels, size, top, left, height, width)
    if generator.random() < 0.5:
        image, labels = image[:, ::-1], labels[:, ::-1]
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = np.round(255 * np.asarray(fill))
    canvas[:height, :width] = image
    target = np.full((side, side), IGNORE, np.int16)
    target[:height, :width] = labels
    planes = torch.from_numpy(canvas.transpose(2, 0, 1).copy())
    if config.photometric:
        changed = recoloured(planes[:, :height, :width], generator)
        planes[:, :height, :width] = changed
    return planes, torch.from_numpy(target)


def recoloured(
    planes: UInt8[torch.Tensor, "3 height width"], generator: np.random.Generator
) -> UInt8[torch.Tensor, "3 height width"]:
    """SSD's change of colours, in torchvision's ranges (its RandomPhotometricDistort, without exchanging channels)."""
    coins = generator.random(5) < 0.5
    brightness, contrast, saturation, hue = generator.uniform((0.875, 0.5, 0.5, -0.05), (1.125, 1.5, 1.5, 0.05))
    first = bool(coins[4])
    if coins[0]:
        planes = change.adjust_brightness(planes, brightness)
    if coins[1] and first:
        planes = change.adjust_contrast(planes, contrast)
    if coins[2]:
        planes = change.adjust_saturation(planes, saturation)
    if coins[3]:
        planes = change.adjust_hue(planes, hue)
    if coins[1] and not first:
        planes = change.adjust_contrast(planes, contrast)
    return planes


def whole_image(pixels: Pixels, short_side: int, long_side: int) -> UInt8[torch.Tensor, "3 rows columns"]:
    """A test image, resized as a whole."""
    height, width = pixels.shape[:2]
    rows, columns = scaled_size(height, width, resize_factor(height, width, short_side, long_side))
    return torch.from_numpy(resized_part(pixels, (rows, columns), 0, 0, rows, columns).transpose(2, 0, 1).copy())
