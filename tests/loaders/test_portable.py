"""The same bits from the plainest machine code: without AVX2, as on a processor of 2003."""

import os
import subprocess
import sys

import numpy as np
import pytest

from fastpmae_loaders.engines.scratch import make_scratch
from fastpmae_loaders.native.decoder import decode_jpeg
from fastpmae_loaders.pixels import colour
from fastpmae_loaders.pixels.resize import resize
from tests.loaders.native.jpegs import encoded, noise, with_quantisation
from tests.made import REPOSITORY, made_image


def made() -> list[np.ndarray]:
    """Crops of noise and of hard edges, upright, wide and tall, every colour operation, and JPEGs of every sampling."""
    rng = np.random.default_rng(8)
    found = []
    for height, width, side in ((90, 130, 64), (300, 70, 40), (40, 50, 56), (1, 7, 9)):
        scratch = make_scratch(height, width, side)
        for image in (
            rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
            (rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8),
        ):
            out = np.zeros((3, side, side), np.uint8)
            box = np.array([0, 0, height, width], np.int32)
            resize(image.ctypes.data, height, width, box, side, side, 0, 0, True, out, scratch)
            found.append(out.copy())
            for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
                choices = np.array([*order, 1, 0, 1, 1, 0], np.uint8)
                factors = np.array([1.37, 0.71, 1.19, -0.083, 1.3])
                changed = out.copy()
                colour_all(changed, factors, choices, scratch)
                found.append(changed)
    for subsampling in (0, 1, 2, "gray"):
        for quality, image in ((90, made_image(3, 67, 53)), (100, noise(3, 67, 53))):
            data = encoded(image, subsampling, quality)
            for payload in (data, with_quantisation(data, 255)):
                pixels = decode_jpeg(payload, 53, 67)
                assert pixels is not None
                found.append(pixels)
    return found


def colour_all(image: np.ndarray, factors: np.ndarray, choices: np.ndarray, scratch) -> None:
    turns = sum(int(which) << (2 * place) for place, which in enumerate(choices[:4]))
    colour.jitter(image, turns, 4, tuple(factors[:4]), 0)
    colour.blur(image, factors[4], scratch)
    colour.solarise(image, 128)


@pytest.mark.slow
def test_without_avx2(tmp_path):
    file = tmp_path / "plain.npz"
    paths = os.pathsep.join(str(REPOSITORY / part) for part in ("", "kernels", "loaders"))
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(
        [sys.executable, "-m", "tests.programs.portable_views", file], check=True, cwd=REPOSITORY, timeout=300,
        env={**os.environ, **plain, "PYTHONPATH": paths},
    )  # fmt: skip
    with np.load(file) as saved:
        expected = [saved[name] for name in saved.files]
    here = made()
    assert len(here) == len(expected)
    for ours, theirs in zip(here, expected, strict=True):
        assert np.array_equal(ours, theirs)
