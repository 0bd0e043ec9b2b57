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


ODD_CROPS = """
import sys
from ffcv.fields.decoders import IntDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import ToTensor
from fastpmae_loaders.ffcv import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
for size, ratio in (((32, 32), 1.5), ((32, 32), 0.0)):
    try:
        CenterCropRGBImageDecoder(size, ratio)
    except ValueError as error:
        print(error)
def loader(decoder, order):
    return Loader(sys.argv[1], batch_size=2, num_workers=2, order=order, drop_last=False,
                  pipelines={"image": [decoder, ToTensor()], "label": [IntDecoder(), ToTensor()]})
try:
    loader(RandomResizedCropRGBImageDecoder((0, 8)), OrderOption.SEQUENTIAL)
except ValueError as error:
    print(error)
for images, labels in loader(CenterCropRGBImageDecoder((32, 32), 0.9), OrderOption.SEQUENTIAL):
    print(images.reshape(len(images), -1).amax(1).bool().tolist())
for _ in loader(RandomResizedCropRGBImageDecoder((64, 64)), OrderOption.SEQUENTIAL):
    break
"""


@pytest.mark.slow
@pytest.mark.skipif(not turbo_available(), reason="ffcv is not installed")
def test_crops_that_there_are_not_and_an_epoch_that_is_left(tmp_path: Path):
    """OpenCV would end the process at the former, and the interpreter takes no work at its end."""
    sizes = [(40, 30), (1, 37), *10 * [(40, 30)]]
    file = write_beton(
        tmp_path / "f.beton", [encoded(made_image(1, 40, 30).resize(size), 0, 90) for size in sizes], sizes
    )
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    words = [sys.executable, "-c", ODD_CROPS, str(file)]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split(";")[0] for line in lines[:3]] == ["ratio is 1.5", "ratio is 0.0", "output_size is (0, 8)"]
    assert lines[3:] == ["[True, False]", *5 * ["[True, True]"]]
    assert "sample 1 does not decode and is shown black: its 1x37 pixels have no crop of 0x0" in done.stderr
    assert "cannot schedule" not in done.stderr
    assert done.stderr.count(": RuntimeWarning:") == 1


@pytest.mark.slow
def test_it_says_what_is_missing():
    program = "import sys; sys.modules['ffcv'] = None; import fastpmae_loaders.ffcv"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "ImportError: engine 'ffcv' needs the package ffcv, which is not installed here" in done.stderr
