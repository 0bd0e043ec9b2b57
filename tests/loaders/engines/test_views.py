"""Lists of views: each is what its recipe says, whatever stands beside it, and an image is decoded once."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastpmae_loaders import (
    Batch,
    Beton,
    DaliSettings,
    PairedViews,
    PlainViews,
    UserError,
    View,
    ViewSettings,
    dino_global,
    dino_local,
    draw_samples,
    mae_view,
    plain_view,
)
from fastpmae_loaders.recipes import MOST_VIEWS
from tests.engines import FFCV

MANY = (mae_view(32), dino_global("t1", 32), dino_global("t2", 48), dino_local(24), plain_view(40), dino_local(24))


def batch_of(file, views, engine="torch", seed=3, epoch=0, side=32, **options) -> Batch:
    """The whole file as one batch, in its own order."""
    settings = ViewSettings(image_size=side, patch_size=8)
    count = len(Beton(file))
    with PairedViews(file, count, engine, settings, seed, shuffle=False, views=views, **options) as loader:
        loader.set_epoch(epoch)
        return next(iter(loader))


@pytest.mark.parametrize("engine", ["native", FFCV, "torch"])
def test_each_view_has_its_recipes_size_and_all_draw_apart(mixed, engine):
    batch = batch_of(mixed, MANY, engine)
    assert [tuple(view.shape) for view in batch.views] == [(23, 3, view.size, view.size) for view in MANY]
    assert batch.boxes.shape == (23, 6, 4)
    assert batch.visible.shape == (23, 4)
    # the two local crops follow one recipe and are not the same crops
    assert (batch.boxes[:, 3] != batch.boxes[:, 5]).any(1).sum() > 15
    beton = Beton(mixed)
    draws = draw_samples(3, 0, np.arange(23), beton.height, beton.width, MANY, patches=16)
    assert (batch.boxes.numpy() == draws.boxes).all()
    assert (batch.flips.numpy() == draws.flips).all()
    assert (batch.factors.numpy() == draws.factors).all()
    assert (batch.choices.numpy() == draws.choices).all()
    assert (torch.cat([batch.visible, batch.folds], 1).numpy() == draws.order).all()


def test_a_view_does_not_depend_on_those_after_it(mixed):
    together = batch_of(mixed, MANY)
    for count in (1, 2, 4):
        alone = batch_of(mixed, MANY[:count])
        assert torch.equal(alone.visible, together.visible)
        for a, b in zip(alone.views, together.views, strict=False):
            assert torch.equal(a, b)


def test_the_pair_is_the_list_of_its_two_recipes(mixed):
    settings = ViewSettings(image_size=32, patch_size=8)
    pair = batch_of(mixed, None)
    named = batch_of(mixed, [mae_view(32), dino_global("coin", 32)])
    assert settings.views == (mae_view(32), dino_global("coin", 32))
    for a, b in zip(pair.views, named.views, strict=True):
        assert torch.equal(a, b)


def test_geometry_is_pillows_bicubic(mixed):
    batch = batch_of(mixed, [mae_view(32), View(50, scale=(0.05, 0.4)), plain_view(40, 0.8)])
    beton = Beton(mixed)
    for row in range(len(batch)):
        image = Image.fromarray(beton.decode(row))
        for view in (0, 1):
            top, left, height, width = batch.boxes[row, view].tolist()
            side = batch.views[view].shape[2]
            whole = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
            truth = np.array(whole).transpose(2, 0, 1).astype(int)
            if batch.flips[row, view]:
                truth = truth[:, :, ::-1]
            difference = np.abs(batch.views[view][row].numpy() - truth)
            assert difference.max() <= 2
            assert difference.mean() <= 0.25


@pytest.mark.parametrize("engine", ["native", FFCV, "torch"])
def test_a_plain_view_is_that_of_evaluation_in_every_epoch(mixed, engine):
    with PlainViews(mixed, 23, 40, engine=engine) as plain:
        ((images, label, index),) = plain
    for epoch in (0, 5):
        batch = batch_of(mixed, [dino_local(24), plain_view(40)], engine, epoch=epoch, side=24)
        assert torch.equal(batch.views[1], images)
        assert torch.equal(batch.label, label)
        assert torch.equal(batch.index, index)
        assert (batch.boxes[:, 1, 2:] == batch.source_size).all()


def test_one_decode_a_sample(mixed, monkeypatch):
    from fastpmae_loaders.engines import torch_engine

    decoded = []
    real = torch_engine.decode
    monkeypatch.setattr(
        torch_engine, "decode", lambda samples, index, *boxes: decoded.append(index) or real(samples, index)
    )
    batch_of(mixed, MANY)
    assert sorted(decoded) == list(range(23))


def test_single_view_training_carries_labels(mixed):
    batch = batch_of(mixed, [mae_view(32)])
    assert len(batch.views) == 1
    assert (batch.label == batch.index * 10).all()
    with pytest.raises(IndexError):
        _ = batch.complex


def test_no_masks_where_no_patch_fits(mixed):
    with PairedViews(mixed, 23, "torch", views=[mae_view(33)]) as loader:
        (batch,) = loader
    assert batch.views[0].shape == (23, 3, 33, 33)
    assert batch.visible.shape == batch.folds.shape == (23, 0)
    assert batch.fold_sizes == ()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"size": 1}, "size"),
        ({"shorter": 100}, "shorter"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"flip": -0.1}, "flip"),
        ({"blur": (0.5, 1.5)}, "blur"),
        ({"jitter": (0.4, 0.4, 0.2, 0.9)}, "jitter"),
        ({"sigma": (1.0, 9.0)}, "sigma"),
        ({"solarise_threshold": -1}, "solarise_threshold"),
    ],
)
def test_impossible_views_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        View(**wrong)


@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_a_view_may_show_anothers_crop(engine, augment_on, mixed):
    if engine == "dali":
        pytest.importorskip("nvidia.nvimgcodec", reason="NVIDIA DALI is not installed (the extra dali-cuda130)")
    first = dino_global("t2", 32, (0.3, 0.9))
    views = [
        dino_global("t1", 40), first,
        View(56, crop_of=1),  # another size, no colours
        replace(first, scale=(0.05, 0.1), size=24, crop_of=2, colours_of=1),  # a crop of a crop's crop
        View(32, crop_of=1, colours_of=1), View(32, colours_of=0),
    ]  # fmt: skip
    options: dict[str, Any] = {"engine": engine, "shuffle": False, "augment_on": augment_on}
    with PairedViews(mixed, 23, views=views, **options) as loader:
        (batch,) = loader
    for other in (2, 3, 4):
        assert torch.equal(batch.boxes[:, other], batch.boxes[:, 1])
        assert torch.equal(batch.flips[:, other], batch.flips[:, 1])
    for other, one in ((3, 1), (4, 1), (5, 0)):
        assert torch.equal(batch.factors[:, other], batch.factors[:, one])
        assert torch.equal(batch.choices[:, other], batch.choices[:, one])
    assert torch.equal(batch.views[4], batch.views[1])
    assert not torch.equal(batch.boxes[:, 5], batch.boxes[:, 0])
    # the others' draws are as they are without the sharers, and the bare copy is the crop before its colours
    with PairedViews(mixed, 23, views=[*views[:2], View(8), View(8), View(8), View(32)], **options) as loader:
        (alone,) = loader
    assert torch.equal(alone.views[0], batch.views[0])
    assert torch.equal(alone.views[1], batch.views[1])
    assert torch.equal(alone.boxes[:, 5], batch.boxes[:, 5])
    bare = [View(8), replace(View(56), scale=first.scale)]
    with PairedViews(mixed, 23, views=bare, **options) as loader:
        (uncoloured,) = loader
    assert torch.equal(uncoloured.views[1], batch.views[2])


@pytest.mark.parametrize("wrong", [{"crop_of": 1}, {"crop_of": 2}, {"crop_of": -2}, {"colours_of": 1}])
def test_only_an_earlier_views_crop_is_shared(wrong, mixed):
    with pytest.raises(UserError, match=f"view 1: {next(iter(wrong))}"):
        batch_of(mixed, [View(32), View(32, **wrong)])


def test_a_centre_is_no_crop_to_share(mixed):
    with pytest.raises(UserError, match="that is a crop"):
        batch_of(mixed, [plain_view(32), View(32, crop_of=0)])
    with pytest.raises(UserError, match="crop_of"):
        batch_of(mixed, [View(32), replace(plain_view(32), crop_of=0)])


@pytest.mark.untyped
def test_another_blur_is_refused():
    with pytest.raises(UserError, match="blur is 'release'; expected 'paper' or 'code'"):
        dino_global("t1", blur="release")  # type: ignore[arg-type]


@pytest.mark.untyped
def test_impossible_lists_are_refused(mixed):
    for views in ([], [mae_view(32)] * (MOST_VIEWS + 1)):
        with pytest.raises(UserError, match="views"):
            batch_of(mixed, views)
    with pytest.raises(UserError, match="patch_size"):
        batch_of(mixed, [mae_view(33)])
    with pytest.raises(UserError, match="which"):
        dino_global("t3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="augment_on"):
        batch_of(mixed, None, augment_on="gpu")


@pytest.mark.parametrize("engine", ["native", FFCV, "torch"])
def test_colours_on_the_device_are_the_same(mixed, engine):
    pytest.importorskip("fastpmae_loaders.pixels.device_colour")
    here = batch_of(mixed, MANY, engine)
    there = batch_of(mixed, MANY, engine, augment_on="device")
    for view, a, b in zip(MANY, here.views, there.views, strict=True):
        assert (a.int() - b.int()).abs().max() <= (2 if view.coloured else 0)


def test_another_colour_function_gets_geometry_and_factors(mixed):
    given = []

    def colour(images, factors, choices, threshold):
        given.append((images, factors, choices, threshold))
        return 255 - images

    batch = batch_of(mixed, MANY, augment_on="device", colour=colour, device="cpu")
    bare = batch_of(mixed, [View(32, (0.2, 1.0)), View(32, (0.14, 1.0))])
    assert len(given) == 4
    images, factors, choices, threshold = given[0]
    assert torch.equal(images, bare.views[1])
    assert torch.equal(batch.views[1], 255 - images)
    assert torch.equal(batch.views[0], bare.views[0])
    assert torch.equal(factors, batch.factors[:, 1])
    assert torch.equal(choices, batch.choices[:, 1])
    assert threshold == 128


def test_arguments_that_would_do_nothing_are_refused(mixed):
    def made(views=None, **options):
        return PairedViews(mixed, 2, engine="torch", views=views, workers=1, **options)

    with pytest.raises(UserError, match="settings of engine 'dali' were given, and the engine is 'torch'"):
        made(dali=DaliSettings(part=7))
    with pytest.raises(UserError, match="colour= changes colours on the device"):
        made(colour=lambda images, *_: images)
    with pytest.raises(UserError, match="image_size 96 is not the first view's 32"):
        made([mae_view(32)], settings=ViewSettings(image_size=96))
    for settings in (ViewSettings(folds=2, mask_ratio=0.5), ViewSettings(image_size=32, folds=2, mask_ratio=0.5)):
        assert made([mae_view(32)], settings=settings).settings.image_size == 32


def test_an_epoch_of_numpys_is_written_as_any_other(mixed):
    views = PairedViews(mixed, 2, engine="torch", views=[mae_view(32)], workers=1)
    views.set_epoch(np.int64(3))
    assert json.loads(json.dumps(views.state_dict()))["epoch"] == 3
