"""The native engine beside the others: the same bits of whatever a file holds, also when one goes on for another."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastpmae_loaders import Beton, PairedViews, UserError, ViewSettings
from fastpmae_loaders.native.coefficients import pack_jpeg
from fastpmae_loaders.sources.beton import COEFFICIENTS
from fastpmae_loaders.write.check import check_beton
from tests.engines import FFCV
from tests.loaders.files import made_pixels, write_beton
from tests.loaders.native.jpegs import encoded
from tests.loaders.native.test_decoder import damaged
from tests.made import made_image, write_tree

SMALL = ViewSettings(image_size=32, patch_size=8)
ENGINES = [FFCV, "torch"]


def same(first, second) -> None:
    assert first.failed == second.failed
    for name in ("simple", "complex", "visible", "folds", "index", "boxes", "factors"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of every sampling, coefficients, raw pixels, progressive ones, gray ones, damaged ones; wide and tall."""
    rng, images, sizes = np.random.default_rng(0), [], []
    for number in range(72):
        width, height = 20 + number * 17 % 130, 20 + number * 29 % 130
        sizes.append((width, height))
        data = encoded(made_image(number, width, height), (0, 1, 2, "gray")[number % 4], (60, 95)[number % 2])
        kind = number % 9
        if kind == 0:
            images.append(made_pixels(number, height, width))
        elif kind < 4:
            images.append(data)
        elif kind < 7:
            images.append(pack_jpeg(data, height, width))
        elif kind == 7:
            images.append(encoded(made_image(number, width, height), 2, 80, progressive=True))
        else:
            images.append(damaged(rng, data))
    return write_beton(tmp_path_factory.mktemp("everything") / "everything.beton", images, sizes)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_bits_as(engine: str, everything: Path):
    settings = {"settings": SMALL, "bad_fraction": 1.0, "drop_last": False}
    with (
        PairedViews(everything, 24, "native", **settings) as ours,
        PairedViews(everything, 24, engine, **settings) as his,
    ):
        for epoch in range(3):
            ours.set_epoch(epoch)
            his.set_epoch(epoch)
            for first, second in zip(ours, his, strict=True):
                same(first, second)
        assert ours.failed == his.failed


@pytest.mark.parametrize("engine", ENGINES)
def test_each_goes_on_where_the_other_was(engine: str, everything: Path):
    settings = {"settings": SMALL, "bad_fraction": 1.0}
    for one, other in (("native", engine), (engine, "native")):
        with (
            PairedViews(everything, 12, one, **settings) as first,
            PairedViews(everything, 12, other, **settings) as second,
        ):
            whole = list(first)
            begun = iter(first)
            for _ in range(2):
                next(begun)
            second.load_state_dict(first.state_dict())
            rest = list(second)
        assert len(rest) == len(whole) - 2
        for expected, found in zip(whole[2:], rest, strict=True):
            assert expected.samples.tolist() == found.samples.tolist()
            assert torch.equal(expected.simple, found.simple)
            assert torch.equal(expected.complex, found.complex)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_verdict_on_damaged_coefficients_as(engine: str, tmp_path: Path):
    """Damage where a sample's views do not look may stay unseen: by each of them alike."""
    width, height, codes = 96, 160, []
    for number in range(24):
        code = pack_jpeg(encoded(made_image(number, width, height), (0, 2)[number % 2], 80), height, width)
        assert code is not None
        # somewhere in its last quarter; a block of 30 groups has more coefficients than there are
        changed = bytearray(code)
        changed[len(code) * 3 // 4 : len(code) * 3 // 4 + 40] = 40 * b"\x1e"
        codes.append(bytes(changed))
    file = write_beton(tmp_path / "coded.beton", codes, 24 * [(width, height)])
    settings = {"settings": SMALL, "bad_fraction": 1.0, "drop_last": False}
    with PairedViews(file, 8, "native", **settings) as ours, PairedViews(file, 8, engine, **settings) as his:
        for first, second in zip(ours, his, strict=True):
            same(first, second)
        assert 0 < len(set(ours.failed)) < 24


def test_threads_do_not_matter(everything: Path):
    settings = {"settings": SMALL, "bad_fraction": 1.0}
    with PairedViews(everything, 36, "native", workers=1, **settings) as one:
        expected = list(one)
    with PairedViews(everything, 36, "native", workers=3, **settings) as three:
        for first, second in zip(expected, three, strict=True):
            same(first, second)


def test_it_reads_beton_files_alone(tmp_path: Path):
    with pytest.raises(UserError, match=r"reads \.beton files alone"):
        PairedViews(write_tree(tmp_path / "photos", 6), 2, "native", SMALL)


def test_the_check_finds_coefficients_that_were_changed(tmp_path: Path):
    """Also where they still make a picture: by their digest."""
    codes = []
    for number in range(3):
        code = pack_jpeg(encoded(made_image(number, 40, 30), 2, 80), 30, 40)
        assert code is not None
        codes.append(code)
    changed = bytearray(codes[1])
    changed[-1] ^= 1
    file = write_beton(tmp_path / "coded.beton", [codes[0], bytes(changed), codes[2]], [(40, 30)] * 3)
    assert (Beton(file).mode == COEFFICIENTS).all()
    checked = check_beton(file)
    assert [index for index, _ in checked.bad] == [1]
    assert "coefficients" in checked.describe()
