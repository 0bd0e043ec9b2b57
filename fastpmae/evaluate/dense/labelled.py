"""Images with dense labels, in whatever files they came: a class for each pixel, or boxes with a class each.

Everything here is upright: an image is turned by its EXIF orientation, and its mask or its boxes with it.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

IGNORE = -1
"""In a mask: the pixel counts neither in training nor in the figures."""

Pixels = UInt8[np.ndarray, "height width 3"]
Mask = Int[np.ndarray, "height width"]
Outlines = Bool[np.ndarray, "boxes height width"]


@dataclass(frozen=True)
class Masked:
    """An image with a class for each pixel.

    Attributes:
        name: of the image's file, as a user would name it.
        read: the image, and its mask in int16: classes from 0 on, and IGNORE. UserError names the file that is not
            sound.
        digest: of the mask's file.
    """

    name: str
    read: Callable[[], tuple[Pixels, Mask]]
    digest: str = ""


@dataclass(frozen=True)
class Segmentation:
    """Images with a class for each pixel.

    Attributes:
        path: where they lie.
        names: what the classes 0, 1, ... are called.
        entries: the images, in the order of their names.
        notes: what a user should know of how the files were understood.
    """

    path: Path
    names: tuple[str, ...]
    entries: tuple[Masked, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def describe(self) -> dict[str, object]:
        """What a result records about the images."""
        digests = [entry.digest for entry in self.entries]
        prints = _fingerprints(self.path, [entry.name for entry in self.entries], digests, self.names)
        return {"path": str(self.path), "images": len(self), **prints}


@dataclass(frozen=True)
class Objects:
    """What lies in an image.

    Attributes:
        boxes: left, top, right, bottom in float32, in pixels of the upright image and within it; none is empty.
        labels: 1 ... classes; 0 is left to the background, as torchvision has it.
        crowd: boxes around many objects, or hard ones: not to be trained on; what is found there is not counted.
        area: in square pixels: what a box's size is told by (COCO's small, medium and large).
        outlines: the mask of each box, or None where there are none.
    """

    boxes: Float[np.ndarray, "boxes 4"]
    labels: Int[np.ndarray, " boxes"]
    crowd: Bool[np.ndarray, " boxes"]
    area: Float[np.ndarray, " boxes"]
    outlines: Callable[[], Outlines] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Boxed:
    """An image with boxes, or without any.

    Attributes:
        name: of the image's file, as a user would name it.
        height, width: of the upright image, in pixels.
        read: the image. UserError names the file that is not sound.
    """

    name: str
    height: int
    width: int
    objects: Objects
    read: Callable[[], Pixels]


@dataclass(frozen=True)
class Detection:
    """Images with boxes.

    Attributes:
        path: where they lie.
        names: what the labels 1, 2, ... are called: `names[label - 1]`.
        entries: the images, in the order of their names.
        has_outlines: whether every box has a mask.
        notes: what a user should know of how the files were understood, such as boxes that were dropped.
    """

    path: Path
    names: tuple[str, ...]
    entries: tuple[Boxed, ...]
    has_outlines: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def describe(self) -> dict[str, object]:
        """What a result records about the images."""
        words = []
        for entry in self.entries:
            found = entry.objects
            columns = (found.boxes, found.labels, found.crowd)
            digests = [hashlib.sha256(np.ascontiguousarray(column).tobytes()).hexdigest() for column in columns]
            words.append(f" {entry.width}x{entry.height} {' '.join(digests)}")
        boxes = sum(len(entry.objects) for entry in self.entries)
        prints = _fingerprints(self.path, [entry.name for entry in self.entries], words, self.names)
        return {"path": str(self.path), "images": len(self), "boxes": boxes, **prints}


def same_images(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an earlier description is of the same images, written by an earlier version of fastpmae too."""
    return before["fingerprint"] in (now["fingerprint"], now.get("fingerprint_with_path"))


def _fingerprints(path: Path, files: list[str], contents: list[str], classes: tuple[str, ...]) -> dict[str, str]:
    """A digest that tells one set from another wherever they lie; and one with the files' names as they were given,
    which earlier versions wrote."""
    own = path.parent if path.is_file() else path
    split = [os.path.split(name) for name in files]
    within = {folder: os.path.relpath(folder or ".", own) for folder, _ in split}
    below = [f"{within[folder]}/{name}" for folder, name in split]
    return {
        word: _fingerprint([name + held for name, held in zip(names, contents, strict=True)], classes)
        for word, names in (("fingerprint", below), ("fingerprint_with_path", files))
    }


def _fingerprint(words: list[str], names: tuple[str, ...]) -> str:
    total = hashlib.sha256()
    for word in (*names, "", *words):
        total.update(word.encode("utf-8", "backslashreplace") + b"\0")
    return total.hexdigest()[:16]
