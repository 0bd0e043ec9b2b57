"""Sliding windows against mmsegmentation's definition, written out, and against the whole image."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpmae.evaluate.dense.windows import sliding_logits, window_starts


def pointwise(windows: Tensor) -> Tensor:
    """A network that sees one pixel at a time: where windows lie cannot matter."""
    return torch.cat([windows.sum(dim=1, keepdim=True), windows[:, :1] * 2], dim=1)


def placed(windows: Tensor) -> Tensor:
    """A network whose answer depends on the place in the window, at half the resolution."""
    rows = torch.arange(windows.shape[2] // 2).view(-1, 1).float()
    return F.avg_pool2d(windows, 2) + rows


@pytest.mark.parametrize(("extent", "window", "stride"), [(20, 8, 5), (8, 8, 5), (5, 8, 5), (17, 8, 8), (9, 8, 1)])
def test_windows_cover_everything_and_none_leaves_the_image(extent: int, window: int, stride: int):
    starts = window_starts(extent, window, stride)
    assert starts == sorted(set(starts))
    covered = {pixel for start in starts for pixel in range(start, start + min(window, extent))}
    assert covered == set(range(extent))
    assert all(later - earlier <= stride for earlier, later in itertools.pairwise(starts))


def test_where_one_window_covers_the_image_it_is_whole_image_inference():
    image = torch.randn(1, 3, 24, 32)
    assert torch.equal(
        sliding_logits(placed, image, window=32, stride=21, patch_size=8, least=0),
        F.interpolate(placed(image), (24, 32), mode="bilinear", align_corners=False),
    )


def test_a_network_of_single_pixels_gives_the_same_by_windows():
    image = torch.randn(1, 3, 45, 37)
    for window, stride in ((16, 10), (16, 16), (64, 40)):
        found = sliding_logits(pointwise, image, window=window, stride=stride, patch_size=8, least=0, batch_size=3)
        torch.testing.assert_close(found, pointwise(image))


def test_windows_are_averaged_as_mmsegmentation_averages_them():
    """Its `slide_inference`, line by line, for a window and a stride that do not divide the image."""
    image, crop, stride = torch.randn(1, 3, 20, 28), 8, 5
    rows, columns = max(20 - crop + stride - 1, 0) // stride + 1, max(28 - crop + stride - 1, 0) // stride + 1
    total, times = torch.zeros(1, 3, 20, 28), torch.zeros(1, 1, 20, 28)
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride + crop, 20), min(column * stride + crop, 28)
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            part = placed(image[:, :, top:bottom, left:right])
            large = F.interpolate(part, (crop, crop), mode="bilinear", align_corners=False)
            total += F.pad(large, (left, 28 - right, top, 20 - bottom))
            times[:, :, top:bottom, left:right] += 1
    found = sliding_logits(placed, image, window=crop, stride=stride, patch_size=8, least=0, batch_size=5)
    torch.testing.assert_close(found, total / times)


def test_180_rows_are_padded_to_whole_patches_and_cut_again():
    sizes = []

    def network(windows: Tensor) -> Tensor:
        sizes.append(tuple(windows.shape[2:]))
        return windows

    image = torch.randn(1, 3, 180, 240)
    torch.testing.assert_close(sliding_logits(network, image, window=256, stride=170, patch_size=16, least=0), image)
    torch.testing.assert_close(sliding_logits(network, image, window=256, stride=170, patch_size=16, least=256), image)
    assert sizes == [(192, 240), (256, 256)]
