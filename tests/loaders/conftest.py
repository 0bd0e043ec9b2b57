"""Files and settings that the loaders' tests share."""

import io
from pathlib import Path

import pytest

from fastpmae_loaders import ViewSettings
from tests.loaders.files import made_pixels, write_beton
from tests.made import made_image

SMALL = ViewSettings(image_size=32, patch_size=8, folds=5)


def jpeg(number: int, width: int, height: int) -> bytes:
    file = io.BytesIO()
    made_image(number, width, height).save(file, "jpeg", quality=90)
    return file.getvalue()


@pytest.fixture(scope="session")
def small_settings() -> ViewSettings:
    """32 pixels, 16 patches, 4 of them visible, folds of 3, 3, 2, 2, 2."""
    return SMALL


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 samples, every third one raw, sizes from 9 to 90 pixels."""
    images, sizes = [], []
    for number in range(23):
        width, height = 9 + number * 17 % 82, 9 + number * 29 % 82
        sizes.append((width, height))
        raw = number % 3 == 0
        images.append(made_pixels(number, height, width) if raw else jpeg(number, width, height))
    return write_beton(tmp_path_factory.mktemp("mixed") / "mixed.beton", images, sizes, page_size=1 << 15)


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 samples: 5 is cut short, 6 is noise, 7 is larger than its record says, 399 is empty of data."""
    images = [jpeg(number % 20, 40, 30) for number in range(400)]
    images[5] = images[5][: len(images[5]) // 2]
    images[6] = bytes(range(256)) * 3
    images[7] = jpeg(3, 80, 60)
    images[399] = images[399][:2]
    return write_beton(tmp_path_factory.mktemp("broken") / "broken.beton", images, [(40, 30)] * 400)
