"""Training images of detection: resized, perhaps cropped, flipped, with their boxes and outlines."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fastpmae.evaluate.dense.crops import nearest_part, resize_factor, resized_part, scaled_size
from fastpmae.evaluate.dense.labelled import Boxed
from fastpmae.evaluate.dense.recipe import DetectConfig

SIDE_STEP = 32
"""Pixels between two of the shorter sides that are drawn from."""
SMALLEST = 1.0
"""Pixels: a box that a crop leaves less of is dropped."""


@dataclass(frozen=True)
class Scene:
    """An image with boxes, as a step trains on it.

    Attributes:
        image: not normalised.
        boxes: left, top, right, bottom in its pixels.
        labels: from 1 on.
        masks: the outline of each box, where masks are learnt.
    """

    image: UInt8[Tensor, "3 height width"]
    boxes: Float[Tensor, "boxes 4"]
    labels: Int[Tensor, " boxes"]
    masks: UInt8[Tensor, "boxes height width"] | None

    @property
    def target(self) -> dict[str, Tensor]:
        """As torchvision's heads take it."""
        found = {"boxes": self.boxes, "labels": self.labels}
        return found if self.masks is None else found | {"masks": self.masks}


def detection_scene(entry: Boxed, config: DetectConfig, generator: np.random.Generator, *, masks: bool) -> Scene:
    """An image as it is drawn: multi-scale resizing, or large-scale jitter with a crop where there is a --crop-size.

    Crowds are left out. What is drawn depends on the generator and the image's size alone.
    """
    pixels, (height, width) = entry.read(), (entry.height, entry.width)
    if config.crop_size:
        factor = config.crop_size / max(height, width) * generator.uniform(*config.scale)
    else:
        low, high = config.short_sides
        factor = resize_factor(
            height, width, int(generator.choice(np.arange(low, high + 1, SIDE_STEP))), config.long_side
        )
    size = scaled_size(height, width, factor)
    rows, columns = (min(config.crop_size or extent, extent) for extent in size)
    top, left = (int(generator.integers(extent - part + 1)) for extent, part in zip(size, (rows, columns), strict=True))
    flipped = bool(generator.random() < 0.5)
    image = resized_part(pixels, size, top, left, rows, columns)
    objects = entry.objects
    scale = np.array([size[1] / width, size[0] / height] * 2, np.float32)
    boxes = objects.boxes * scale - np.array([left, top, left, top], np.float32)
    boxes = boxes.clip(0, np.array([columns, rows, columns, rows], np.float32))
    kept = ~objects.crowd & ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(axis=1)
    outlines = None
    if masks and objects.outlines is not None:
        whole = objects.outlines()[kept]
        parts = [nearest_part(each, size, top, left, rows, columns) for each in whole]
        outlines = np.stack(parts) if parts else np.zeros((0, rows, columns), bool)
    if flipped:
        image = image[:, ::-1]
        boxes = np.stack([columns - boxes[:, 2], boxes[:, 1], columns - boxes[:, 0], boxes[:, 3]], axis=1)
        outlines = None if outlines is None else outlines[:, :, ::-1]
    return Scene(
        torch.from_numpy(image.transpose(2, 0, 1).copy()),
        torch.from_numpy(boxes[kept].astype(np.float32)),
        torch.from_numpy(objects.labels[kept].astype(np.int64)),
        None if outlines is None else torch.from_numpy(outlines.astype(np.uint8)),
    )
