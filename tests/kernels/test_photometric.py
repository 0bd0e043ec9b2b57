"""Colours of a batch: the fast form and the plain one against the loaders' torch form, which follows torchvision."""

import itertools

import pytest
import torch
from torch import Tensor

from fastpmae_kernels import backend, photometric, photometric_ref
from fastpmae_kernels.photometric import mirrored
from fastpmae_loaders.pixels.device_colour import change_colours, normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ORDERS = list(itertools.permutations(range(4)))
SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (12, 11), (17, 40), (33, 31), (64, 48)]


def noise(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    smooth = torch.randint(256, (count, 3, height, 1), generator=generator)
    return ((smooth + torch.randint(70, (count, 3, height, width), generator=generator)) % 256).byte()


def drawn(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Every order in turn, every mixture of coins, factors wider than DINO's."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.rand(count, 5, generator=generator, dtype=torch.float64) * 2
    factors[:, 3] = factors[:, 3] / 2 - 0.5
    factors[:, 4] = factors[:, 4] * 1.5 + 0.05
    choices = torch.randint(2, (count, 9), generator=generator, dtype=torch.uint8)
    choices[:, :4] = torch.tensor([ORDERS[i % 24] for i in range(count)]).view(-1, 4)
    return factors, choices


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_form_gives_the_loaders_bytes(height: int, width: int):
    images, (factors, choices) = noise(24, height, width), drawn(24, height)
    expected = change_colours(images, factors, choices, 100)
    before = images.clone()
    for run in (photometric, photometric_ref):
        assert torch.equal(run(images, factors, choices, 100), expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize("column", range(5))
@pytest.mark.parametrize("value", [0.0, 0.05, 0.5, 1.0, 2.0])
def test_factors_at_the_edge(column: int, value: float):
    images, (factors, choices) = noise(8, 20, 14), drawn(8)
    factors[:, column] = max(value, 0.05) if column == 4 else value
    factors[::2, 3] *= -1
    choices[:, 4] = choices[:, 6] = 1
    assert torch.equal(photometric(images, factors, choices), change_colours(images, factors, choices, 128))


@pytest.mark.parametrize("threshold", [0, 1, 255])
def test_thresholds(threshold: int):
    images, (factors, choices) = noise(8, 20, 14), drawn(8)
    choices[:, 7] = 1
    expected = change_colours(images, factors, choices, threshold)
    for run in (photometric, photometric_ref):
        assert torch.equal(run(images, factors, choices, threshold), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_normalised(dtype: torch.dtype):
    images, (factors, choices) = noise(5, 20, 14), drawn(5)
    changed = photometric(images, factors, choices).double() / 255
    exact = (changed - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)
    for run in (photometric, photometric_ref):
        got = run(images, factors, choices, dtype=dtype)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=5e-7)
    loaders = normalise(photometric(images, factors, choices), MEAN, STD, torch.float32)
    torch.testing.assert_close(photometric(images, factors, choices, dtype=torch.float32), loaders)


def test_strides_and_threads_change_nothing():
    images, (factors, choices) = noise(30, 20, 14), drawn(30)
    expected = photometric(images, factors, choices)
    apart = images.repeat_interleave(2, dim=0)[::2].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(photometric(apart, factors, choices.T.contiguous().T), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(photometric(images, factors, choices), expected)
    finally:
        torch.set_num_threads(threads)


def test_no_images():
    for dtype in (torch.uint8, torch.bfloat16):
        for run in (photometric, photometric_ref):
            got = run(noise(0, 8, 6), *drawn(0), dtype=dtype)
            assert (got.shape, got.dtype) == ((0, 3, 8, 6), dtype)


def test_a_mirror_between_mirrors():
    assert [mirrored(place, 3) for place in range(-5, 8)] == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]
    assert {mirrored(place, 1) for place in range(-5, 8)} == {0}


def test_the_plain_form_can_be_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastpmae_kernels.cpu.photometric._change", None)
    images, (factors, choices) = noise(2, 8, 6), drawn(2)
    with backend.use("ref"):
        photometric(images, factors, choices)
    with pytest.raises(TypeError):
        photometric(images, factors, choices)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.zeros(2, 3, 8, 8)}, "must be bytes"),
        ({"images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, "must be bytes"),
        ({"factors": torch.zeros(2, 4)}, "factors must be"),
        ({"factors": torch.zeros(2, 5, dtype=torch.int64)}, "factors must be"),
        ({"choices": torch.zeros(1, 9, dtype=torch.uint8)}, "choices must be"),
        ({"threshold": -1}, "is no byte"),
    ],
)
@pytest.mark.untyped
def test_what_does_not_fit_is_refused(change: dict, words: str):
    factors, choices = drawn(2)
    given = {"images": noise(2, 8, 8), "factors": factors, "choices": choices, "threshold": 128} | change
    for run in (photometric, photometric_ref):
        with pytest.raises(ValueError, match=words):
            run(**given)
