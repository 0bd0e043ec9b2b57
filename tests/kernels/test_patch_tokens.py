"""Patches cut out and normalised, against one pixel at a time."""

import pytest
import torch
from torch import Tensor

from fastpmae_kernels import patch_tokens, patch_tokens_ref

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def made(batch: int, height: int, width: int) -> Tensor:
    return torch.randint(
        256, (batch, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "rows", "columns"), [(1, 2, 3), (3, 2, 5), (8, 4, 4), (16, 3, 2)])
def test_every_pixel(size: int, rows: int, columns: int, dtype: torch.dtype):
    images = made(3, rows * size, columns * size)
    ids = torch.randint(rows * columns, (3, 7), generator=torch.Generator().manual_seed(1))
    tokens = patch_tokens(images, ids, size, dtype)
    assert tokens.dtype == dtype
    assert tokens.shape == (3, 7, 3 * size * size)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for b in range(3):
        for n in range(7):
            top, left = int(ids[b, n]) // columns * size, int(ids[b, n]) % columns * size
            for c in range(3):
                for y in range(size):
                    line = images[b, c, top + y, left : left + size].double()
                    truth = (line / 255 - MEAN[c]) / STD[c]
                    got = tokens[b, n, (c * size + y) * size :][:size]
                    torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance)


def test_any_strides_and_no_patches():
    images, ids = made(5, 32, 48), torch.tensor([[0, 5, 3]] * 5)
    expected = patch_tokens(images, ids, 16)
    assert torch.equal(patch_tokens(images.to(memory_format=torch.channels_last), ids, 16), expected)
    assert torch.equal(patch_tokens(images, ids.to(torch.int32), 16), expected)
    assert patch_tokens(images, ids[:, :0], 16).shape == (5, 0, 768)
    assert patch_tokens(images[:0], ids[:0], 16).shape == (0, 3, 768)


def test_another_mean_and_spread():
    images, ids = made(2, 8, 8), torch.tensor([[0, 3], [2, 1]])
    got = patch_tokens(images, ids, 4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))
    torch.testing.assert_close(
        got, patch_tokens_ref(images, ids, 4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0)), rtol=1e-6, atol=1e-6
    )
    assert got.min() >= -2
    assert got.max() <= 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": torch.zeros(2, 3, 8, 8)}, ValueError, "must be bytes"),
        ({"images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, ValueError, "must be bytes"),
        ({"patch_size": 3}, ValueError, "do not fill"),
        ({"patch_size": 0}, ValueError, "do not fill"),
        ({"ids": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "must be integers"),
        ({"ids": torch.tensor([[0], [4]])}, IndexError, "from 0 to 4, there are 4 patches"),
        ({"ids": torch.tensor([[-1], [2]])}, IndexError, "from -1 to 2"),
    ],
)
@pytest.mark.untyped
def test_what_does_not_fit_is_refused(change: dict, error: type[Exception], words: str):
    arguments = {"images": made(2, 8, 8), "ids": torch.tensor([[0], [3]]), "patch_size": 4} | change
    with pytest.raises(error, match=words):
        patch_tokens(**arguments)
