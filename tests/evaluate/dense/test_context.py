"""k-NN in context: memory, votes and labels of patches against plain counts; the yardsticks; the linear layer."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from fastpmae.evaluate.dense.context import Memory, at_mask_size, cell_labels, chosen_patches, grid_of, patch_labels
from fastpmae.evaluate.dense.labelled import IGNORE
from fastpmae.evaluate.dense.mask_pictures import best_median_worst, class_colours, errors_in_red, painted
from fastpmae.evaluate.dense.patch_linear import LinearSettings, PatchLinear, train_patch_linear
from fastpmae.evaluate.dense.yardsticks import PositionPrior, colour_features
from fastpmae_loaders import epoch_order
from fastpmae_loaders.cli.progress import Progress


def test_an_image_that_is_no_multiple_of_the_patch_is_filled_up_and_cut():
    grid = grid_of(180, 240, 8)
    assert (grid.rows, grid.columns, grid.scaled) == (23, 30, (180, 240))
    scores = torch.rand(23, 30, 4)
    found = at_mask_size(scores, grid)
    assert found.shape == (4, 180, 240)
    whole = torch.nn.functional.interpolate(scores.permute(2, 0, 1)[None], scale_factor=8, mode="bilinear")[0]
    assert torch.equal(found, whole[:, :180])


def test_a_large_image_is_scaled_down_and_its_scores_up():
    grid = grid_of(600, 1000, 16, short_side=300)
    assert grid.scaled == (300, 500)
    assert (grid.rows, grid.columns) == (19, 32)
    assert at_mask_size(torch.rand(19, 32, 3), grid).shape == (3, 600, 1000)
    assert grid_of(200, 300, 16, short_side=300).scaled == (200, 300)


def counted(mask: np.ndarray, size: int, classes: int) -> np.ndarray:
    """The share of each class in each patch, pixel by pixel."""
    rows, columns = -(-mask.shape[0] // size), -(-mask.shape[1] // size)
    found = np.zeros((rows, columns, classes))
    for y, line in enumerate(mask):
        for x, number in enumerate(line):
            if number != IGNORE:
                found[y // size, x // size, number] += 1
    return found / np.maximum(found.sum(axis=2, keepdims=True), 1)


def test_labels_of_patches_are_shares_of_the_pixels_that_count():
    mask = np.random.default_rng(0).integers(-1, 3, (21, 30)).astype(np.int16)
    mask[:8, :8] = IGNORE
    found = patch_labels(mask, grid_of(21, 30, 8), 3)
    assert np.allclose(found.numpy(), counted(mask, 8, 3), atol=1e-6)
    assert found[0, 0].sum() == 0
    # scaled to a half, a patch of 4 covers the same pixels
    even = mask[:20, :24]
    half = patch_labels(even, grid_of(20, 24, 4, short_side=10), 3)
    assert np.allclose(half.numpy(), counted(even, 8, 3), atol=1e-6)


@pytest.mark.parametrize("cosine", [True, False])
def test_votes_are_those_of_scikit_learns_neighbours(cosine: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastpmae.evaluate.dense.context.CHUNK_BYTES", 4 * 50 * 7)  # several parts
    generator = torch.Generator().manual_seed(0)
    rows, queries = torch.randn(50, 6, generator=generator), torch.randn(20, 6, generator=generator)
    labels = torch.rand(50, 3, generator=generator)
    if cosine:
        rows, queries = torch.nn.functional.normalize(rows), torch.nn.functional.normalize(queries)
    memory = Memory(rows, labels, None if cosine else -rows.square().sum(dim=1) / 2)
    distances, places = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(rows.numpy()).kneighbors(queries.numpy())
    weights = torch.softmax(torch.from_numpy(-(distances**2) / 2 / 0.1), dim=1)
    expected = (weights[:, :, None] * labels[torch.from_numpy(places)]).sum(dim=1)
    assert torch.allclose(memory.vote(queries, 5, 0.1).double(), expected.double(), atol=1e-4)
    # no more neighbours than there are
    assert memory.vote(queries, 500, 0.1).shape == (20, 3)


def test_patches_are_drawn_where_they_are_too_many():
    assert chosen_patches(5, 9, 0, 0).tolist() == [0, 1, 2, 3, 4]
    some = chosen_patches(100, 9, 0, 0)
    assert len(set(some.tolist())) == 9
    assert some.tolist() == chosen_patches(100, 9, 0, 0).tolist() != chosen_patches(100, 9, 0, 1).tolist()


def test_the_prior_of_a_place_is_the_commonest_class_there():
    top_and_bottom = np.zeros((40, 60), np.int16)
    top_and_bottom[20:] = 1
    prior = PositionPrior(2)
    for mask in (top_and_bottom, top_and_bottom, 1 - top_and_bottom):
        prior.add(mask)
    assert (prior.scores(80, 30).argmax(dim=0).numpy() == np.repeat([0, 1], 40)[:, None]).all()
    assert torch.allclose(cell_labels(top_and_bottom, 4, 2)[:, 0, 0], torch.tensor([1.0, 1, 0, 0]))


def test_colours_of_a_patch():
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :8] = (255, 0, 51)
    image[::2, 8:] = 255
    found = colour_features(image, grid_of(8, 16, 8))
    assert np.allclose(found[0, 0, :4], [1, 0, 0.2, 0], atol=1e-3)
    assert np.allclose(found[0, 1, :4], [0.5, 0.5, 0.5, 0.5], atol=1e-3)
    assert found[0, :, 4].tolist() == [0.5, 0.5]
    assert found[0, :, 5].tolist() == [0.25, 0.75]


def test_a_linear_layer_learns_what_is_linear_and_passes_void_over():
    generator = torch.Generator().manual_seed(0)
    masks = [np.random.default_rng(seed).integers(0, 3, (4, 5)).astype(np.int16) for seed in range(6)]
    maps = [torch.eye(3)[torch.from_numpy(mask.astype(np.int64))] * 50 + 7 for mask in masks]
    maps = [found + torch.randn(found.shape, generator=generator) for found in maps]
    masks[0][:] = IGNORE
    labels = [(mask, grid_of(4, 5, 1)) for mask in masks]
    settings = LinearSettings(steps=120, batch_size=1, rate=0.02, weight_decay=0.0, seed=0)
    state = torch.random.get_rng_state()
    layer = train_patch_linear(
        lambda place: maps[place], lambda place: labels[place], 6, 3, settings, torch.device("cpu"), Progress()
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(bool(parameter.isfinite().all()) for parameter in layer.parameters())
    for found, mask in zip(maps[1:], masks[1:], strict=True):
        assert (layer(found.flatten(0, 1)).argmax(dim=1).numpy() == mask.ravel()).all()


def test_a_linear_layer_is_that_of_all_images_scores_at_once():
    """Bit for bit, though one image's pixels are held at a time."""
    generator = torch.Generator().manual_seed(0)
    grids = [grid_of(24, 40, 8), grid_of(21, 30, 8), grid_of(16, 16, 8)]
    maps = [torch.randn(grid.rows, grid.columns, 6, generator=generator) for grid in grids]
    random = np.random.default_rng(0)
    masks = [random.integers(-1, 3, (grid.height, grid.width)).astype(np.int16) for grid in grids]
    settings = LinearSettings(steps=4, batch_size=3, rate=0.02, weight_decay=0.1, seed=0)
    layer = train_patch_linear(
        lambda place: maps[place],
        lambda place: (masks[place], grids[place]),
        3, 3, settings, torch.device("cpu"), Progress(),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = PatchLinear(6, 3)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.02, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for epoch in range(4):
        order = epoch_order(0, epoch, 3).tolist()
        scores = whole(torch.cat([maps[place].flatten(0, 1) for place in order]))
        parts = scores.split([grids[place].rows * grids[place].columns for place in order])
        total = torch.zeros(())
        for part, place in zip(parts, order, strict=True):
            pixels = at_mask_size(part.view(grids[place].rows, grids[place].columns, -1), grids[place])
            truth = torch.from_numpy(masks[place].astype(np.int64))
            total = total + torch.nn.functional.cross_entropy(
                pixels[None], truth[None], ignore_index=IGNORE, reduction="sum"
            )
        optimizer.zero_grad()
        (total / sum(int((mask != IGNORE).sum()) for mask in masks)).backward()
        optimizer.step()
        schedule.step()
    ours, theirs = layer.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_a_picture_shows():
    assert best_median_worst(np.array([3.0, np.nan, 1.0, 2.0])) == {"best": 0, "median": 3, "worst": 2}
    assert best_median_worst(np.array([3.0])) == {"best": 0}
    assert best_median_worst(np.array([np.nan])) == {"first": 0}
    colours = class_colours(20)
    assert len({tuple(colour) for colour in colours.tolist()}) == 20
    assert colours[0].tolist() == [128, 0, 0]
    image = np.full((1, 3, 3), 200, np.uint8)
    truth, predicted = np.array([[0, 1, IGNORE]], np.int16), np.array([[0, 0, 0]], np.int16)
    assert painted(image, truth, colours)[0, 2].max() < 100
    shown = errors_in_red(image, truth, predicted)[0].astype(int)
    assert shown[0].tolist() == [200, 200, 200]
    assert shown[1, 0] > 1.5 * shown[1, 1]
    assert shown[2].max() < 100
