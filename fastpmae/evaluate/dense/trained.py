"""A trained segmenter or detector: images in, classes of pixels or boxes with scores out, in the image's own size."""

import io
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from fastpmae.distributed.ranks import to_device
from fastpmae.evaluate.backbone import Backbone
from fastpmae.evaluate.datasets import half
from fastpmae.evaluate.dense.average_precision import Found, run_lengths
from fastpmae.evaluate.dense.crops import whole_image
from fastpmae.evaluate.dense.labelled import Mask, Pixels
from fastpmae.evaluate.dense.overlap import best_classes
from fastpmae.evaluate.dense.pyramid import padded, size_multiple
from fastpmae.evaluate.dense.rcnn import Detector
from fastpmae.evaluate.dense.recipe import DetectConfig, SegmentConfig
from fastpmae.evaluate.dense.upernet import Segmenter, upsampled
from fastpmae.evaluate.dense.windows import sliding_logits
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.pictures import load, open_image, orientation_of, upright_rgb
from fastpmae_loaders.sources.reading import read_file

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
"""An image: its file, one of Pillow's, or RGB in uint8 [height, width, 3]."""


def pixels_of(picture: Picture) -> Pixels:
    """An image in RGB, turned by its EXIF orientation as the images of an evaluation are; an array is taken as upright.

    Raises:
        UserError: where a file cannot be read, or an array is no such image.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise UserError(
                f"an image is uint8 [height, width, 3], and this array is {picture.dtype} {list(picture.shape)}"
            )
        return picture
    if isinstance(picture, Image.Image):
        return np.array(upright_rgb(picture, orientation_of(picture)))
    try:
        image = open_image(io.BytesIO(read_file(picture)))
        return np.array(upright_rgb(image, load(image)))
    except (OSError, UserError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{printable(os.fspath(picture))} cannot be read: {why}") from None


@dataclass(frozen=True)
class TrainedSegmenter:
    """A network that tells the class of every pixel, and what it needs besides.

    Attributes:
        model: in evaluation mode where it is asked.
        names: of the classes 0, 1, ...
    """

    model: Segmenter
    backbone: Backbone
    config: SegmentConfig
    device: torch.device
    names: tuple[str, ...]

    def __call__(self, picture: Picture) -> Mask:
        """The class of each pixel of an image, int16 [height, width] in the image's own size.

        Raises:
            UserError: as `pixels_of`.
        """
        pixels = pixels_of(picture)
        return self.classes(self.resized(pixels), *pixels.shape[:2]).cpu().numpy().astype(np.int16)

    def resized(self, pixels: Pixels) -> UInt8[Tensor, "3 rows columns"]:
        """An image as the network looks at it."""
        return whole_image(pixels, self.config.short_side, self.config.long_side)

    @torch.inference_mode()
    def classes(
        self, planes: UInt8[Tensor, "3 rows columns"], height: int, width: int
    ) -> Int[Tensor, "height width"]:  # fmt: skip
        """The class of each pixel of an image that is resized already, at the image's own size."""
        image = self.backbone.normalised(to_device(planes[None], self.device))
        config, patch_size = self.config, self.model.backbone.patch_size
        least = self.model.backbone.fixed_side or size_multiple(patch_size)
        with half(self.device):
            found = sliding_logits(
                lambda windows: self.model(windows)[0],
                image,
                window=config.crop_size,
                stride=max(1, int(config.crop_size * config.stride)),
                patch_size=patch_size,
                least=least,
            )
        if found.shape[-2:] == (height, width):
            return found[0].argmax(dim=0)
        return best_classes(lambda some: upsampled(found[:, some], (height, width))[0], found.shape[1], height * width)


@dataclass(frozen=True)
class TrainedDetector:
    """A network that finds objects, and what it needs besides.

    Attributes:
        model: in evaluation mode where it is asked.
        names: what the labels 1, 2, ... are called: `names[label - 1]`.
    """

    model: Detector
    backbone: Backbone
    config: DetectConfig
    device: torch.device
    names: tuple[str, ...]

    def __call__(self, picture: Picture) -> Found:
        """The objects in an image, the surest first, their boxes in pixels of the image itself.

        Raises:
            UserError: as `pixels_of`; and where the network finds masks and faster-coco-eval is not installed.
        """
        pixels = pixels_of(picture)
        return self.found(self.resized(pixels), *pixels.shape[:2])

    def resized(self, pixels: Pixels) -> UInt8[Tensor, "3 rows columns"]:
        """An image as the network looks at it."""
        return whole_image(pixels, self.config.test_short_side, self.config.long_side)

    @torch.inference_mode()
    def found(self, planes: UInt8[Tensor, "3 rows columns"], height: int, width: int) -> Found:
        """The objects in an image that is resized already, in pixels of its own size."""
        image = self.backbone.normalised(to_device(planes[None], self.device))
        size = (image.shape[2], image.shape[3])
        with half(self.device):
            answer: Any = self.model(padded(image, size_multiple(self.model.backbone.patch_size)), [size])
        (found,) = answer
        scale = found["boxes"].new_tensor([width / size[1], height / size[0]] * 2)
        boxes = found["boxes"].float() * scale
        masks = None
        if "masks" in found:
            # one at a time: an image of 12 megapixels takes 48 MB for each
            masks = []
            for mask, box in zip(found["masks"].float().split(1), boxes.split(1), strict=True):
                masks += run_lengths(paste_masks_in_image(mask, box, (height, width))[:, 0] > 0.5)
        return Found(boxes.cpu().numpy(), found["labels"].tolist(), found["scores"].tolist(), masks)
