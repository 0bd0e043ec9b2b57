"""Colours of a whole batch at once, against the compiled operations image by image."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastpmae_loaders import UserError
from fastpmae_loaders.engines.scratch import make_scratch
from fastpmae_loaders.pixels import colour, device_colour
from fastpmae_loaders.sampling import BLURRED, GRAY, JITTER, ORDER, SIGMA, SOLARISED
from tests.loaders.files import photographs
from tests.made import SHARED_DATA, made_image

IDENTITY = (1.0, 1.0, 1.0, 0.0, 1.0)
ORDERS = list(itertools.permutations(range(4)))


def one_by_one(images: Tensor, factors: Tensor, choices: Tensor, threshold: int) -> Tensor:
    """What the compiled operations make of each image."""
    operations = (colour.brightness, colour.contrast, colour.saturation, colour.hue)
    changed = images.clone()
    scratch = make_scratch(8, 8, max(images.shape[2:], default=1))
    for image, factor, choice in zip(changed.numpy(), factors.numpy(), choices.numpy(), strict=True):
        if choice[JITTER]:
            for which in choice[ORDER : ORDER + 4]:
                operations[which](image, factor[which])
        if choice[GRAY]:
            colour.grayscale(image)
        if choice[BLURRED]:
            if image.shape[1] == image.shape[2]:
                colour.blur(image, factor[SIGMA], scratch)
            else:
                image[:] = blurred(image, factor[SIGMA])
        if choice[SOLARISED]:
            colour.solarise(image, threshold)
    return changed


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """The compiled blur is of squares alone: its weights, in numpy, on any side."""
    taps = np.zeros((colour.RADIUS + 1, 2), np.int16)
    colour.fill_taps(sigma, taps)
    for axis in (2, 1):
        last = image.shape[axis] - 1
        # up to the last and back again, as often as it takes: without the edge itself a second time
        around = [*range(last + 1), *range(last - 1, 0, -1)]
        total = np.full(image.shape, colour.ONE // 2, np.int64)
        for k in range(-colour.RADIUS, colour.RADIUS + 1):
            places = [around[(place + k) % len(around)] for place in range(last + 1)]
            total += image.take(places, axis).astype(np.int64) * int(taps[abs(k), 0])
        image = (total // colour.ONE).astype(np.uint8)
    return image


def test_the_blur_in_numpy_is_the_compiled_one():
    for image in noise(3, 19, 19).numpy():
        expected = image.copy()
        colour.blur(expected, 1.7, make_scratch(8, 8, 19))
        assert np.array_equal(blurred(image, 1.7), expected)


def assert_same(images: Tensor, factors: Tensor, choices: Tensor, threshold: int = 128) -> None:
    before = images.clone()
    got = device_colour.change_colours(images, factors, choices, threshold)
    assert got.dtype == torch.uint8
    assert got.is_contiguous()
    assert torch.equal(images, before)
    assert torch.equal(got, one_by_one(images.contiguous(), factors, choices, threshold))


def drawn(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random factors, orders and coins, somewhat wider than DINO's."""
    generator = np.random.default_rng(seed)
    factors = np.concatenate(
        [
            generator.uniform(0, 2, (count, 3)),
            generator.uniform(-0.5, 0.5, (count, 1)),
            generator.uniform(0.05, 3, (count, 1)),
        ],
        axis=1,
    )
    choices = generator.integers(0, 2, (count, 9)).astype(np.uint8)
    choices[:, ORDER : ORDER + 4] = np.array(ORDERS)[generator.integers(24, size=count)]
    return torch.from_numpy(factors), torch.from_numpy(choices)


def photographs_in_square(count: int, side: int) -> Tensor:
    if not (SHARED_DATA / "imagenet_sample_400.tar").exists():
        found = [np.array(made_image(seed, side, side)) for seed in range(count)]
    else:
        found = [np.array(Image.fromarray(p).resize((side, side))) for p in photographs("imagenet_sample_400", count)]
    return torch.from_numpy(np.stack(found[:count])).permute(0, 3, 1, 2).contiguous()


def noise(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def every_hue() -> Tensor:
    """All pairs of red and green beside a few blues."""
    red, green = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    return torch.stack([torch.stack([red, green, torch.full_like(red, blue)]) for blue in (0, 77, 255)]).byte()


@pytest.mark.parametrize(
    ("column", "values"),
    [
        (0, (0.0, 0.6, 0.93, 1.0, 1.4, 2.0)),
        (1, (0.0, 0.6, 0.93, 1.0, 1.4, 2.0)),
        (2, (0.0, 0.8, 0.93, 1.0, 1.2, 2.0)),
        (3, (-0.5, -0.1, -0.013, 0.0, 0.07, 0.1, 0.5)),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_each_jitter_at_edge_factors(column: int, values: tuple[float, ...]):
    for images in (every_hue(), photographs_in_square(3, 96)):
        for value in values:
            factors = torch.tensor([IDENTITY] * 3, dtype=torch.float64)
            factors[:, column] = value
            choices = torch.zeros(3, 9, dtype=torch.uint8)
            choices[:, ORDER : ORDER + 4] = torch.arange(4)
            choices[:, JITTER] = 1
            assert_same(images, factors, choices)


@pytest.mark.parametrize("column", [GRAY, BLURRED, SOLARISED])
def test_each_coin_alone(column: int):
    images = torch.cat([photographs_in_square(4, 64), noise(4, 64, 64)])
    factors, choices = drawn(8)
    factors[:, SIGMA] = torch.tensor([0.05, 0.1, 0.31, 0.7, 1.3, 2.0, 3.0, 5.0])
    choices[:, JITTER:] = 0
    choices[:, column] = 1
    assert_same(images, factors, choices)


@pytest.mark.parametrize("threshold", [0, 1, 128, 255])
def test_solarise_thresholds(threshold: int):
    factors, choices = drawn(2)
    choices[:, JITTER:] = 0
    choices[:, SOLARISED] = 1
    assert_same(noise(2, 20, 30), factors, choices, threshold)


def test_every_order():
    images = photographs_in_square(24, 56)
    factors, choices = drawn(24, 1)
    choices[:, ORDER : ORDER + 4] = torch.tensor(ORDERS)
    choices[:, JITTER] = 1
    assert_same(images, factors, choices)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 9), (9, 1), (2, 2), (5, 3), (12, 12), (17, 40), (31, 16), (33, 100)]
)
def test_sizes(height: int, width: int):
    assert_same(noise(16, height, width), *drawn(16, 2))


@pytest.mark.slow
def test_real_images_with_everything():
    assert_same(photographs_in_square(32, 224), *drawn(32, 3))


def test_chunks_and_strides_change_nothing(monkeypatch: pytest.MonkeyPatch):
    images = noise(7, 24, 18).transpose(2, 3)[1:]
    assert_same(images, *drawn(6, 4))
    monkeypatch.setattr(device_colour, "CHUNK", 2 * 3 * 24 * 18)
    assert_same(images, *drawn(6, 4))
    monkeypatch.setattr(device_colour, "CHUNK", 1)
    assert_same(images, *drawn(6, 4))


def test_no_images():
    assert device_colour.change_colours(noise(0, 8, 8), *drawn(0), 128).shape == (0, 3, 8, 8)
    assert device_colour.normalise(noise(0, 8, 8), (0, 0, 0), (1, 1, 1)).shape == (0, 3, 8, 8)


def test_nothing_waits_for_the_device():
    """On torch's shape-only device any look at a value, and any shape that depends on one, is an error."""
    factors, choices = drawn(5)
    got = device_colour.change_colours(
        noise(5, 24, 18).to("meta"), factors.to("meta"), choices.to("meta"), 128
    )  # fmt: skip
    assert (got.device.type, got.shape) == ("meta", (5, 3, 24, 18))
    assert device_colour.normalise(got, (0.5,) * 3, (0.5,) * 3).device.type == "meta"


def test_autocast_does_not_reach_in():
    images, (factors, choices) = noise(4, 24, 18), drawn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(images, factors, choices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_normalise(dtype: torch.dtype):
    images = noise(3, 7, 5)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    exact = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    got = device_colour.normalise(images, mean, std, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=5e-7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.zeros(2, 3, 4, 4)}, "images must be bytes"),
        ({"images": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}, "images must be bytes"),
        ({"factors": torch.zeros(2, 4)}, "factors must be"),
        ({"choices": torch.zeros(3, 9, dtype=torch.uint8)}, "choices must be"),
        ({"choices": torch.zeros(2, 9)}, "choices must be"),
        ({"threshold": 256}, "between 0 and 255"),
    ],
)
@pytest.mark.untyped
def test_what_does_not_fit_is_refused(change: dict, words: str):
    factors, choices = drawn(2)
    given = {"images": noise(2, 4, 4), "factors": factors, "choices": choices, "threshold": 128} | change
    with pytest.raises(UserError, match=words):
        device_colour.change_colours(**given)
    with pytest.raises(UserError, match="three numbers"):
        device_colour.normalise(noise(2, 4, 4), (0.5,), (0.5,))
