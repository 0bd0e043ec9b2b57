"""The images of a GPU run: brought along in a folder, made of those beside the checkout, or drawn."""

import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import SHARED, unpack
from fastpmae_loaders import Beton
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.sources.beton import JPG
from fastpmae_loaders.write.pages import PageWriter
from fastpmae_loaders.write.write import write_beton

ORIGINALS, TRAIN, VAL = "originals.beton", "train.beton", "val.beton"
"""JPEGs as ImageNet has them, and small labelled images to learn from and to judge on."""
DRAWN = "drawn"
"""A file that says that a folder's images are drawn, so that nothing is claimed of them."""
PAGE = 2 << 20
"""Bytes: small files have little room to waste on the last page."""


def find_images(given: Path | None, scratch: Path, tiny: bool) -> Path:
    """A folder with the three files.

    Args:
        given: a folder that has them; None makes them under `scratch`, of the data sets beside the checkout where
            they are there, else, and where `tiny`, of drawn images.

    Raises:
        UserError: when the folder that is named lacks one.
    """
    names = (ORIGINALS, TRAIN, VAL)
    if given is not None:
        lacking = [name for name in names if not (given / name).exists()]
        if lacking:
            raise UserError(
                f"--data {given} lacks {', '.join(lacking)}; python -m benchmarks.gpu.pack makes such a folder"
            )
        return given
    folder = scratch / ("drawn-images" if tiny or not SHARED.exists() else "images")
    if not all((folder / name).exists() for name in names):
        folder.mkdir(parents=True, exist_ok=True)
        if folder.name == "images":
            write_images(folder)
        else:
            (folder / DRAWN).touch()
            for name, count, side in ((ORIGINALS, 16, 160), (TRAIN, 48, 64), (VAL, 24, 64)):
                draw(folder / name, count, side)
    return folder


def write_images(folder: Path, originals: int | None = None) -> None:
    """The three files, of the data sets beside the checkout, with so many originals (all). UserError without them."""
    sets = folder / "unpacked"
    unpack(SHARED / "imagenet_sample_400.tar", sets)
    unpack(SHARED / "tiny_imagenet_20.tar", sets)
    write_beton(sets / "imagenet_sample" / "train", folder / ORIGINALS, force=True, limit=originals, page_size=PAGE)
    for name, part in ((TRAIN, "train"), (VAL, "val")):
        write_beton(sets / "tiny_imagenet_20" / part, folder / name, force=True, page_size=PAGE)
    shutil.rmtree(sets)


def draw(path: Path, count: int, side: int) -> None:
    """So many JPEGs of a gradient with noise, of two classes that differ in its direction."""
    noise = np.random.default_rng(0)
    ramp = np.linspace(0, 200, side)
    with atomic_write(path) as beside, beside.open("wb") as file:
        pages = PageWriter(file, count, PAGE)
        for number in range(count):
            gradient = ramp[:, None] if number % 2 else ramp[None, :]
            pixels = gradient[..., None] + noise.integers(0, 55, (side, side, 3))
            jpeg = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(jpeg, "JPEG", quality=90)
            pages.add(JPG, side, side, number % 2, jpeg.getvalue())
        pages.finish(["rows", "columns"])


def repeated(beton: Beton, path: Path, count: int) -> Path:
    """A .beton of at least `count` images: those of another, over and over."""
    copies = -(-count // len(beton))
    with atomic_write(path) as beside, beside.open("wb") as file:
        pages = PageWriter(file, copies * len(beton), PAGE)
        for _ in range(copies):
            for sample in range(len(beton)):
                size = int(beton.width[sample]), int(beton.height[sample])
                pages.add(JPG, *size, int(beton.label[sample]), beton.payload(sample).tobytes())
        pages.finish(None)
    return path
