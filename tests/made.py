"""Images made for tests, and where things lie."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastpmae import PRESETS, Config

REPOSITORY = Path(__file__).parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def made_image(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours with a few edges: compresses and crops like a photograph, and differs from seed to seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.array(coarse)
    for _ in range(4):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        pixels[top : top + height // 4, left : left + width // 4] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def write_tree(folder: Path, count: int, classes: int = 3) -> Path:
    """A class-per-folder tree of `count` JPEGs of mixed sizes."""
    for number in range(count):
        place = folder / f"class_{number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        made_image(number, 60 + number % 7 * 9, 50 + number % 5 * 11).save(place / f"{number:04d}.jpg", quality=92)
    return folder


def tiny_settings(beton: Path) -> Config:
    """Dual teachers on the small images: a step takes some tens of milliseconds. Uneven folds, stochastic depth on."""
    return PRESETS["demo"].using(
        beton=beton,
        image_size=32,
        width=32,
        heads=2,
        depth=2,
        drop_path=0.3,
        decoder_width=32,
        decoder_depth=1,
        decoder_heads=2,
        head_hidden=32,
        head_bottleneck=16,
        prototypes=24,
        folds=5,
        epochs=3,
        batch_size=8,
        log_every=1,
        workers=1,
        device="cpu",
        tensorboard=False,
    )
