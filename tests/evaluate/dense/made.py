"""Small sets of labelled images in memory, whose colours tell their labels, and a ViT to start from."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from fastpmae.evaluate.backbone import Backbone, find_backbone
from fastpmae.evaluate.dense.labelled import IGNORE, Boxed, Detection, Masked, Objects, Segmentation

COLOURS = np.array([[40, 60, 80], [220, 60, 60], [60, 200, 220]])


def scene(number: int, height: int = 40, width: int = 56) -> tuple[np.ndarray, np.ndarray, list[tuple[int, ...]]]:
    """An image, its mask (void along the left edge), and its boxes: a rectangle of each of two classes."""
    random = np.random.default_rng(number)
    mask, boxes = np.zeros((height, width), np.int16), []
    for label, left in ((1, 2), (2, width // 2)):
        top, left = int(random.integers(2, height // 3)), left + int(random.integers(0, 6))
        bottom, right = top + int(random.integers(12, height // 2)), left + int(random.integers(12, width // 3))
        mask[top:bottom, left:right] = label
        boxes.append((left, top, right, bottom, label))
    noise = random.integers(-20, 20, (height, width, 3))
    pixels = (COLOURS[mask] + noise).clip(0, 255).astype(np.uint8)
    mask[:, :2] = IGNORE
    return pixels, mask, boxes


def _masked(number: int) -> tuple[np.ndarray, np.ndarray]:
    pixels, mask, _ = scene(number)
    return pixels, mask


def segmentation(count: int = 6, first: int = 0) -> Segmentation:
    """Three classes, the background among them."""
    entries = [Masked(f"{number}.png", partial(_masked, number), str(number)) for number in range(first, first + count)]
    return Segmentation(Path("made"), ("ground", "red", "blue"), tuple(entries))


def _pixels(number: int) -> np.ndarray:
    return scene(number)[0]


def _outlines(boxes: np.ndarray) -> np.ndarray:
    found = np.zeros((len(boxes), 40, 56), bool)
    for outline, (left, top, right, bottom) in zip(found, boxes.astype(int), strict=True):
        outline[top:bottom, left:right] = True
    return found


def detection(count: int = 6, first: int = 0, *, outlines: bool = False) -> Detection:
    """Two classes; the third image has no boxes."""
    entries = []
    for number in range(first, first + count):
        rows = [] if number % 6 == 2 else scene(number)[2]
        boxes = np.array([row[:4] for row in rows], np.float32).reshape(-1, 4)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        objects = Objects(
            boxes,
            np.array([row[4] for row in rows], np.int64),
            np.zeros(len(rows), bool),
            area,
            partial(_outlines, boxes) if outlines else None,
        )
        entries.append(Boxed(f"{number}.png", 40, 56, objects, partial(_pixels, number)))
    return Detection(Path("made"), ("red", "blue"), tuple(entries), outlines)


def start(folder: Path, image_size: int = 32) -> Backbone:
    """A small ViT's weights from a file."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=0)
    torch.save(vit.state_dict(), folder / "vit.pth")
    return find_backbone(str(folder / "vit.pth"), heads=2, image_size=image_size)
