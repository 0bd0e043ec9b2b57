"""Our decoders in FFCV's own loader: whole images to the bit, its crops, and broken images black."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastpmae_loaders import Beton
from fastpmae_loaders.sources.jpeg import turbo_available
from tests.loaders.files import made_pixels, write_beton
from tests.loaders.native.jpegs import encoded
from tests.made import REPOSITORY, made_image

SIZE = (61, 47)
BROKEN = 7


@pytest.mark.slow
@pytest.mark.skipif(not turbo_available(), reason="ffcv is not installed")
@pytest.mark.parametrize("workers", [1, 2])
def test_ffcvs_loader_shows_what_pillow_shows(workers: int, tmp_path: Path):
    jpegs: list = [
        encoded(made_image(number, *SIZE), (0, 1, 2, "gray")[number % 4], 90, progressive=number % 5 == 4)
        for number in range(10)
    ]
    jpegs[3] = made_pixels(3, *SIZE[::-1])
    jpegs[BROKEN] = jpegs[BROKEN][: len(jpegs[BROKEN]) // 2]
    whole = write_beton(tmp_path / "whole.beton", jpegs, 10 * [SIZE])
    # an image of one colour for crops: the fast DCT of FFCV's own decoder makes the same of it
    sizes = [(40 + 9 * number, 70 - 5 * number) for number in range(6)]
    plain = [encoded(made_image(number, *size).resize((1, 1)).resize(size), 0, 95) for number, size in enumerate(sizes)]
    varied = write_beton(tmp_path / "varied.beton", plain, sizes)
    words = [sys.executable, "-m", "tests.programs.native_in_ffcv", whole, varied, tmp_path / "read.npz", str(workers)]
    # FFCV has numba take as many threads, which the machine may not have
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    subprocess.run(words, cwd=REPOSITORY, env=environment, check=True, timeout=500)
    read = np.load(tmp_path / "read.npz")
    beton, seen = Beton(whole), (read["labels"] // 10).tolist()
    assert sorted(seen) == sorted(2 * list(range(10)))
    for index, pixels in zip(seen, read["images"], strict=True):
        assert np.array_equal(pixels, np.zeros_like(pixels) if index == BROKEN else beton.decode(index))
    assert all(f"sample {BROKEN} does not decode and is shown black" in said for said in read["said"])
    assert len(read["said"]) == 2
    assert np.abs(read["crops"].astype(int) - read["theirs"]).max() <= 1
    assert read["drawn"].shape == (12, 32, 32, 3)
    assert read["drawn"].any(axis=(1, 2, 3)).all()


@pytest.mark.slow
def test_it_says_what_is_missing():
    program = "import sys; sys.modules['ffcv'] = None; import fastpmae_loaders.ffcv"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "ImportError: engine 'ffcv' needs the package ffcv, which is not installed here" in done.stderr
