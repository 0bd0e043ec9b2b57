"""How fast this machine's loader is, measured in a few seconds on real images or on ones that are made for it."""

import io
import os
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import Tensor

from fastpmae.config import Config
from fastpmae.model.build import view_settings, views_needed
from fastpmae.photographs import PHOTOGRAPHS, open_photograph
from fastpmae.run.images import open_images, sources
from fastpmae_loaders import PairedViews, Samples
from fastpmae_loaders.machine import loader_threads
from fastpmae_loaders.write.pages import PageWriter
from fastpmae_loaders.write.write import PAGE_SIZE

WIDTH, HEIGHT = 500, 375
"""Of the images made: the median of ImageNet's."""
BATCH = 32


@dataclass(frozen=True)
class LoaderRate:
    """What was measured."""

    images_per_second: float
    """Of one core."""
    cores: int
    """Cores that were at work."""
    source: str
    """On what."""


def measure(config: Config, seconds: float = 2.0) -> LoaderRate:
    """Images a second and core of the run's own loader: its engine, its views, its colours where it makes them.

    Where the colours are changed on the GPU the CPU is not timed with them.

    Raises:
        UserError: for images that cannot be read, or an engine that is not installed.
    """
    if config.data.beton:
        return _measure(config, open_images(config), seconds, " ".join(sources(config)))
    with TemporaryDirectory(prefix="fastpmae-plan-") as folder:
        path = Path(folder) / "made.beton"
        write_made_images(path, BATCH)
        return _measure(config, path, seconds, f"{BATCH} JPEG crops of photographs, {WIDTH} x {HEIGHT} pixels")


def write_made_images(path: Path, count: int) -> None:
    """A .beton of JPEG crops of the demo's photographs, at the size and quality of ImageNet's."""
    drawn = np.random.default_rng(0)
    names = [name for name in PHOTOGRAPHS if name in ("cat", "coffee", "rocket", "pavilion", "astronaut", "dahlia")]
    photographs = [open_photograph(name) for name in names]
    with path.open("wb") as file:
        pages = PageWriter(file, count, PAGE_SIZE)
        for number in range(count):
            photograph = photographs[number % len(photographs)]
            left, top = (int(drawn.integers(side - crop + 1)) for side, crop in _room(photograph.size))
            data = io.BytesIO()
            photograph.crop((left, top, left + WIDTH, top + HEIGHT)).save(data, "JPEG", quality=92)
            pages.add(0, WIDTH, HEIGHT, 0, data.getvalue())
        pages.finish(None)


def _room(size: tuple[int, int]) -> list[tuple[int, int]]:
    return [(size[0], WIDTH), (size[1], HEIGHT)]


def _measure(config: Config, images: Path | Samples, seconds: float, source: str) -> LoaderRate:
    cores = loader_threads(config.efficiency.workers)
    on_device = config.efficiency.augment_on != "cpu"
    with PairedViews(
        images,
        BATCH,
        engine=config.data.loader,
        settings=view_settings(config),
        workers=cores,
        views=views_needed(config),
        drop_last=False,
        augment_on="device" if on_device else "cpu",
        colour=_left_alone if on_device else None,
        # the order is not what is measured, and a file larger than memory must not be read as a whole
        shuffle=False,
    ) as loader:
        first = iter(loader)
        next(first)  # compiles, opens, reads the disk
        first.close()
        done, start = 0, 0.0
        while True:
            # what was made ahead before the clock ran does not count
            for batch in loader:
                if start:
                    done += len(batch)
                elif batch is not None:
                    start = time.perf_counter()
                if start and time.perf_counter() - start >= seconds:
                    return LoaderRate(done / (time.perf_counter() - start) / cores, cores, source)
            loader.set_epoch(loader.epoch + 1)


def _left_alone(images: Tensor, factors: Tensor, choices: Tensor, threshold: int) -> Tensor:
    """In place of the colours that the GPU will change."""
    return images


def busy() -> float | None:
    """Processes that want a core of this machine now, where the system tells: the measured rate is what they leave."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
