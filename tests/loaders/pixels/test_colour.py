import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from PIL import Image

from fastpmae_loaders.engines.scratch import make_scratch
from fastpmae_loaders.pixels import colour
from tests.loaders.files import photographs
from tests.made import SHARED_DATA


def images():
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 256, (3, side, side), dtype=np.uint8) for side in (64, 40, 17, 12)]
    made.append((rng.integers(0, 2, (3, 50, 50)) * 255).astype(np.uint8))
    made.append(np.full((3, 32, 32), 77, np.uint8))
    # every pair of red and green beside a few blues: all the hues' borders
    red, green = np.meshgrid(np.arange(256), np.arange(256))
    made += [np.stack([red, green, np.full_like(red, blue)]).astype(np.uint8) for blue in (0, 128, 255)]
    if (SHARED_DATA / "imagenet_sample_400.tar").exists():
        for photograph in photographs("imagenet_sample_400", 6):
            square = np.array(Image.fromarray(photograph).resize((224, 224)))
            made.append(np.ascontiguousarray(square.transpose(2, 0, 1)))
    return made


OPERATIONS = {
    "brightness": (lambda i, f, s: colour.brightness(i, f), reference.adjust_brightness, (0.0, 0.6, 0.93, 1.0, 1.4)),
    "contrast": (lambda i, f, s: colour.contrast(i, f), reference.adjust_contrast, (0.0, 0.6, 0.93, 1.0, 1.4)),
    "saturation": (lambda i, f, s: colour.saturation(i, f), reference.adjust_saturation, (0.0, 0.8, 0.93, 1.0, 1.2)),
    "hue": (lambda i, f, s: colour.hue(i, f), reference.adjust_hue, (-0.5, -0.1, -0.013, 0.0, 0.07, 0.1, 0.5)),
    "grayscale": (lambda i, f, s: colour.grayscale(i), lambda t, f: reference.rgb_to_grayscale(t, 3), (0,)),
    "solarise": (lambda i, f, s: colour.solarise(i, f), reference.solarize, (128, 0, 255)),
    "blur": (
        lambda i, f, s: colour.blur(i, f, s),
        lambda t, f: reference.gaussian_blur(t, [23, 23], [f, f]),
        (0.1, 0.31, 0.7, 1.3, 2.0),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_within_one_of_torchvision(name):
    ours, theirs, factors = OPERATIONS[name]
    means = []
    for image in images():
        scratch = make_scratch(8, 8, image.shape[1])
        for factor in factors:
            changed = image.copy()
            ours(changed, factor, scratch)
            expected = theirs(torch.from_numpy(image), factor).numpy().astype(int)
            difference = np.abs(changed.astype(int) - expected)
            assert difference.max() <= 1, (image.shape, factor)
            means.append(difference.mean())
    # one off here and there is rounding; one off everywhere would be a mistake
    assert np.mean(means) < (0.2 if name == "blur" else 0.01)


def test_blur_of_images_smaller_than_its_reach():
    """torchvision refuses these; a mirror that mirrors again is the only sensible meaning."""
    rng = np.random.default_rng(3)
    for side in (1, 2, 5, 9):
        image = rng.integers(0, 256, (3, side, side), dtype=np.uint8)
        changed = image.copy()
        colour.blur(changed, 2.0, make_scratch(8, 8, side))
        taps = np.exp(-0.5 * (np.arange(-11, 12) / 2.0) ** 2)
        taps /= taps.sum()
        places = np.arange(-11, side + 11)
        period = max(2 * side - 2, 1)
        mirrored = np.abs((places % period + period) % period)
        mirrored = np.where(mirrored >= side, period - mirrored, mirrored)
        padded = image[:, mirrored][:, :, mirrored].astype(float)
        rows = np.stack([(padded[:, y : y + 23] * taps[None, :, None]).sum(1) for y in range(side)], 1)
        expected = np.stack([(rows[:, :, x : x + 23] * taps).sum(2) for x in range(side)], 2)
        assert np.abs(changed - expected).max() <= 1.01


def test_the_taps_sum_to_one_exactly():
    taps = np.zeros((12, 2), np.int16)
    for sigma in np.linspace(0.05, 5, 200):
        reach = colour.fill_taps(sigma, taps)
        assert taps[0, 0] + 2 * int(taps[1:, 0].astype(int).sum()) == 1 << 14
        assert 0 <= reach <= 11
        assert (taps[reach + 1 :] == 0).all()
