"""The labelled images that `bench_learning` pretrains and judges on, as .beton files."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from benchmarks.common import CAMVID, SHARED, unpack
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.write.write import write_beton

SIDE, MIDDLE, STRIDE = 64, 8, 8
"""Pixels of a crop's side, of the side of its middle, and from one place of a crop to the next."""
CROPS = {"train": 1000, "val": 200}
"""The most crops of a class."""
FRAMES = {"train": "train", "val": "test"}
"""Which of CamVid's frames: those of `test` are of two drives, and one of them is in no other split."""


def tiny_imagenet(folder: Path) -> tuple[Path, Path]:
    """`tiny_imagenet_20` in a folder as two .beton files: 10,000 photographs of 20 classes, and 1,000."""
    return _betons(folder, "tiny_imagenet_20.tar", lambda: folder / "tiny_imagenet_20")


def camvid(folder: Path) -> tuple[Path, Path]:
    """Crops of CamVid's frames in a folder as two .beton files, each labelled with the class that its middle is of.

    Crops of one frame overlap, so leaving one out of the training images would find its neighbours: they are judged on
    those of other drives.
    """

    def made() -> Path:
        for split in CROPS:
            for number, (label, crop) in enumerate(camvid_crops(folder / "camvid" / FRAMES[split], CROPS[split])):
                place = folder / "crops" / split / CAMVID[label]
                place.mkdir(parents=True, exist_ok=True)
                crop.save(place / f"{number:05}.png")
        return folder / "crops"

    return _betons(folder, "camvid_240x180.tar", made)


def camvid_crops(frames: Path, most: int) -> Iterator[tuple[int, Image.Image]]:
    """Label and crop, for at most so many of each class, drawn alike from all places of all frames.

    The label is what more than half of a crop's middle is of; where that is void or nothing, it is none.
    """
    masks = sorted((frames / "masks").iterdir())
    places: list[list[tuple[int, int, int]]] = [[] for _ in CAMVID]
    for frame, path in enumerate(masks):
        labels = labels_of(np.asarray(Image.open(path)))
        for row, column in zip(*np.nonzero(labels >= 0), strict=True):
            places[labels[row, column]].append((frame, int(row) * STRIDE, int(column) * STRIDE))
    draw = np.random.default_rng(0)
    drawn = [draw.permutation(len(of_class))[:most] for of_class in places]
    kept = sorted((*places[label][at], label) for label, ats in enumerate(drawn) for at in ats)
    for frame, top, left, label in kept:
        with Image.open(frames / "images" / f"{masks[frame].stem}.jpg") as image:
            yield label, image.convert("RGB").crop((left, top, left + SIDE, top + SIDE))


def labels_of(mask: np.ndarray) -> np.ndarray:
    """The label of a crop at each place of a mask, in steps of STRIDE; -1 for none."""
    edge = (SIDE - MIDDLE) // 2
    inner = mask[edge : len(mask) - edge, edge : mask.shape[1] - edge]
    middles = sliding_window_view(inner, (MIDDLE, MIDDLE))[::STRIDE, ::STRIDE]
    counts = np.stack([(middles == label).sum((2, 3)) for label in range(len(CAMVID))])
    return np.where(counts.max(0) > MIDDLE * MIDDLE // 2, counts.argmax(0), -1)


SETS: dict[str, Callable[[Path], tuple[Path, Path]]] = {"tiny-imagenet": tiny_imagenet, "camvid": camvid}
OVERLAPPING = ("camvid",)
"""Sets whose training images can be near copies of each other: what is learnt of them is judged on the others."""


def _betons(folder: Path, archive: str, images: Callable[[], Path]) -> tuple[Path, Path]:
    """`train.beton` and `val.beton` in a folder, of the folders of those names that the archive's images make."""
    if not (SHARED / archive).exists():
        raise UserError(f"{SHARED / archive} is not there: name labelled .beton files with --train and --val")
    files = folder / "train.beton", folder / "val.beton"
    if not all(file.exists() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        unpack(SHARED / archive, folder)
        source = images()
        for file in files:
            write_beton(source / file.stem, file, force=True)
    return files
