"""Each adapter's batches against what the codebase's own loader would hand over: types, shapes, order, values."""

import dataclasses
import itertools
import math
import tarfile
import threading
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.transforms import Normalize

from fastpmae_loaders import (
    ImageFolder,
    Mixture,
    PairedViews,
    TarShards,
    UserError,
    View,
    ViewSettings,
    dino_global,
    dino_local,
    draw_samples,
    mae_view,
    plain_view,
)
from fastpmae_loaders.adapters import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AdapterDataset,
    CAPILoader,
    DINOLoader,
    DINOv2Loader,
    DINOv3Loader,
    EpochAdapter,
    IBOTLoader,
    IterationAdapter,
    LightlyLoader,
    LightlyTrainLoader,
    MAELoader,
    TimmLoader,
)
from fastpmae_loaders.blockwise import DINOv2Masks, DINOv3Masks, IBOTMasks
from fastpmae_loaders.multiblock import CAPIMasks
from fastpmae_loaders.write.sets import write_set
from fastpmae_loaders.write.sources import SourceSettings
from tests.made import made_image

SETTINGS = ViewSettings(image_size=32, patch_size=8, folds=3)
PAIR = [dino_global("t1", 32), dino_global("t2", 32)]
LOCALS = [dino_local(16), dino_local(16), dino_local(16)]
BATCH = 6


def loader(path: Path, views: list[Any], **changes: Any) -> PairedViews:
    arguments = {"engine": "torch", "settings": SETTINGS, "seed": 11, "workers": 1, "views": views} | changes
    return PairedViews(path, arguments.pop("batch_size", BATCH), **arguments)


EPOCHAL: dict[str, Callable[..., EpochAdapter[Any]]] = {
    "mae": lambda path, **changes: MAELoader(loader(path, [mae_view(32)], **changes), masks="ours"),
    "ibot": lambda path, **changes: IBOTLoader(loader(path, PAIR + LOCALS, **changes)),
    "timm": lambda path, **changes: TimmLoader(loader(path, [mae_view(32)], **changes)),
    "lightly": lambda path, **changes: LightlyLoader(loader(path, PAIR, **changes)),
    "lightly-train": lambda path, **changes: LightlyTrainLoader(loader(path, PAIR + LOCALS, **changes)),
}
ADAPTERS: dict[str, Callable[..., EpochAdapter[Any] | IterationAdapter[Any]]] = {
    **EPOCHAL,
    "dinov2": lambda path, **changes: DINOv2Loader(loader(path, PAIR + LOCALS, **changes)),
    "dinov3": lambda path, **changes: DINOv3Loader(loader(path, PAIR + LOCALS, **changes)),
    "capi": lambda path, **changes: CAPILoader(loader(path, [mae_view(32)], **changes)),
}


def equal(one: Any, other: Any) -> bool:
    """The same types, shapes and values all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def normalised(images: torch.Tensor) -> torch.Tensor:
    return Normalize(IMAGENET_MEAN, IMAGENET_STD)(images / 255)


# What they have in common.


@pytest.mark.parametrize("name", EPOCHAL)
def test_a_pass_is_an_epoch_and_the_next_one_shows_new_views(name, mixed):
    adapter = EPOCHAL[name](mixed)
    first, second = list(adapter), list(adapter)
    assert len(first) == len(second) == len(adapter) == 23 // BATCH
    assert adapter.loader.epoch == 1
    assert not equal(first[0], second[0])
    adapter.sampler.set_epoch(0)
    assert equal(list(adapter), first)
    adapter.dataset.set_epoch(1)
    assert equal(list(adapter), second)
    # asked for again by name, an epoch is shown again
    adapter.set_epoch(1)
    assert equal(list(adapter), second)
    assert len(adapter.dataset) == 23
    assert len(adapter.sampler) == 18
    assert adapter.batch_size == BATCH


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_saved_position_goes_on_at_that_batch(name, mixed):
    adapter = ADAPTERS[name](mixed)
    adapter.set_epoch(4)
    batches = iter(adapter)
    next(batches)
    state = adapter.state_dict()
    expected = [next(batches), next(batches)]
    end = adapter.state_dict()
    resumed = ADAPTERS[name](mixed)
    resumed.load_state_dict(state)
    # as every training loop does
    resumed.set_epoch(4)
    rest = iter(resumed)
    assert equal([next(rest), next(rest)], expected)
    following = ADAPTERS[name](mixed)
    following.load_state_dict(end)
    after = ADAPTERS[name](mixed)
    after.set_epoch(5)
    assert equal(next(iter(following)), next(iter(after)))


@pytest.mark.parametrize("name", EPOCHAL)
def test_a_finished_epoch_that_is_asked_for_after_a_resume_is_over(name, mixed):
    adapter = EPOCHAL[name](mixed)
    list(adapter)
    resumed = EPOCHAL[name](mixed)
    resumed.load_state_dict(adapter.state_dict())
    resumed.set_epoch(0)
    assert list(resumed) == []
    resumed.set_epoch(1)
    assert equal(list(resumed), list(adapter))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_pass_that_was_broken_off_does_not_shorten_the_next(name, mixed):
    """A look at a batch, Lightning's sanity check, a limit on the batches of an epoch: a DataLoader begins anew."""
    adapter, expected = ADAPTERS[name](mixed), []
    for epoch in range(3):
        adapter.set_epoch(epoch)
        expected.append(list(itertools.islice(adapter, 23 // BATCH)))
    for limit in (1, 2):
        adapter = ADAPTERS[name](mixed)
        assert equal(list(itertools.islice(adapter, limit)), expected[0][:limit])
        # as with a DataLoader the views are new ones
        assert equal(list(itertools.islice(adapter, limit)), expected[1][:limit])
        assert equal(list(itertools.islice(adapter, 23 // BATCH)), expected[2])
        # an epoch that is asked for by name is shown from its beginning
        adapter.set_epoch(1)
        list(itertools.islice(adapter, limit))
        adapter.set_epoch(1)
        assert equal(list(itertools.islice(adapter, 23 // BATCH)), expected[1])


def test_every_validation_sees_every_image(mixed):
    """Two batches for a look, and then all of them, each time."""
    adapter = LightlyLoader(loader(mixed, [plain_view(32)], shuffle=False, drop_last=False))
    list(itertools.islice(adapter, 2))
    for _ in range(2):
        assert sum(len(labels) for _, labels, _ in adapter) == 23


@pytest.mark.parametrize("name", EPOCHAL)
def test_it_has_what_a_dataloader_has(name, mixed):
    for drop_last in (True, False):
        changes: Any = {"drop_last": drop_last, "workers": 2, "rank": 1, "world_size": 2, "batch_size": 4}
        adapter = EPOCHAL[name](mixed, **changes)
        theirs = DataLoader(TensorDataset(torch.arange(23)), 4, num_workers=2, drop_last=drop_last)
        for attribute in ("batch_size", "num_workers", "drop_last", "pin_memory"):
            assert getattr(adapter, attribute) == getattr(theirs, attribute), attribute
        assert len(adapter.batch_sampler) == len(adapter)
        assert adapter.batch_sampler.batch_size == 4
        assert adapter.batch_sampler.drop_last == drop_last
        adapter.batch_sampler.set_epoch(3)
        batches = list(adapter.batch_sampler)
        assert list(adapter.sampler) == list(adapter.batch_sampler.sampler) == list(itertools.chain(*batches))
        assert len(adapter.sampler) == sum(map(len, batches))
        if name == "lightly-train":  # it has no labels, and names the files
            assert [len(batch) for batch in batches] == [len(batch["filename"]) for batch in adapter]
        else:  # labels are ten times the index
            assert [[index * 10 for index in batch] for batch in batches] == [batch[1].tolist() for batch in adapter]
        batch = next(iter(adapter))
        assert equal(adapter.collate_fn(batch), batch)
        assert str(mixed) in str(adapter.dataset)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_dataloader_of_its_batches(name, mixed):
    adapter, plain = ADAPTERS[name](mixed), ADAPTERS[name](mixed)
    batches = AdapterDataset(adapter)
    wrapped: DataLoader[Any] = DataLoader(batches, batch_size=None, collate_fn=adapter.collate_fn)
    assert equal(list(itertools.islice(wrapped, 3)), list(itertools.islice(plain, 3)))
    batches.set_epoch(4)
    plain.set_epoch(4)
    taken = iter(wrapped)
    assert equal(next(taken), next(iter(plain)))
    plain.load_state_dict(batches.state_dict())
    batches.load_state_dict(plain.state_dict())
    assert equal(next(iter(wrapped)), next(iter(plain)))
    if isinstance(adapter, EpochAdapter):
        assert len(wrapped) == len(adapter)
    else:
        with pytest.raises(TypeError):
            len(wrapped)


@pytest.mark.parametrize(
    "kind",
    [MAELoader, DINOLoader, IBOTLoader, TimmLoader, LightlyLoader, LightlyTrainLoader, DINOv2Loader, DINOv3Loader,
     CAPILoader],
)  # fmt: skip
@pytest.mark.parametrize("given", [3, None, "images.beton"])
def test_an_adapter_of_no_loader_is_a_sentence(kind, given):
    with pytest.raises(UserError, match=f"^loader is {given!r}; expected PairedViews$"):
        kind(given)


@pytest.mark.parametrize(
    ("kind", "wrong", "says"),
    [
        (DINOv2Loader, {"global_crops": "2"}, "global_crops is '2'; expected a whole number or None"),
        (DINOv2Loader, {"start_iter": "5"}, "start_iter is '5'; expected a whole number"),
        (DINOv2Loader, {"start_iter": -1}, "start_iter = -1 must be an iteration"),
        (DINOv2Loader, {"masks": "ours"}, "masks is 'ours'; expected DINOv2Masks or None"),
        (DINOv2Loader, {"dtype": "fp16"}, "dtype is 'fp16'; expected dtype"),
        (IBOTLoader, {"masks": 0.3}, "masks is 0.3; expected IBOTMasks or None"),
        (IBOTLoader, {"patch_size": "8"}, "patch_size is '8'; expected a whole number or None"),
        (IBOTLoader, {"global_crops": 1.5}, "global_crops is 1.5; expected a whole number or None"),
        (MAELoader, {"masks": 1}, "masks is 1; expected 'theirs' or 'ours'"),
        (MAELoader, {"mean": 0.5}, "mean is 0.5; expected several values, each a number"),
        (MAELoader, {"mean": (0.5, 0.5)}, r"mean is \(0.5, 0.5\): give one number for each"),
        (DINOLoader, {"std": (0.5, "1", 1)}, "std is .*; expected several values, each a number"),
        (LightlyLoader, {"std": (0.5, 0, 1)}, r"std is \(0.5, 0.0, 1.0\): images are divided by it"),
        (LightlyLoader, {"std": (0.5, 1e-320, 1)}, "std is .*: images are divided by it, so that it must be above 0"),
        (MAELoader, {"std": [math.nan] * 3}, r"std is \(nan, nan, nan\): give numbers that float32 holds"),
        (MAELoader, {"mean": (0, 0, 1e300)}, "mean is .*: give numbers that float32 holds"),
        (LightlyLoader, {"dtype": torch.int64}, "the images' dtype is torch.int64, and"),
        (TimmLoader, {"img_dtype": "bf16"}, "img_dtype is 'bf16'; expected dtype"),
        (TimmLoader, {"mixup": 0.8}, "mixup is 0.8; expected Callable or None"),
        (TimmLoader, {"random_erasing": 0.25}, "random_erasing is 0.25; expected Callable or None"),
    ],
)
def test_an_adapters_wrong_argument_is_a_sentence(kind, wrong, says, mixed):
    with loader(mixed, PAIR) as views, pytest.raises(UserError, match=f"^{says}"):
        kind(views, **wrong)


def test_a_mean_may_be_a_tensor(mixed):
    with loader(mixed, PAIR) as views:
        given, usual = (MAELoader(views, mean=mean) for mean in (torch.tensor([0.5, 0.25, 0.125]), (0.5, 0.25, 0.125)))
        images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
        assert torch.equal(given.normalised(images), usual.normalised(images))


def test_an_adapter_without_collate_says_what_to_define(mixed):
    class Mine(EpochAdapter[Any]):
        pass

    with loader(mixed, PAIR) as views, pytest.raises(UserError, match=r"^Mine does not say .*: define collate\(self"):
        next(iter(Mine(views)))


@pytest.mark.untyped
@pytest.mark.parametrize("given", [3, None, []])
def test_a_data_set_of_no_adapter_is_a_sentence(given):
    with pytest.raises(UserError, match=r"^adapter is .*; expected Adapter$"):
        AdapterDataset(given)


def test_a_dataloader_with_processes_is_refused(mixed):
    batches = AdapterDataset(ADAPTERS["mae"](mixed))
    with pytest.raises(UserError, match="num_workers=0"):
        next(iter(DataLoader(batches, batch_size=None, num_workers=1, multiprocessing_context="fork")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae", "ibot", "timm", "lightly"])
def test_ranks_share_an_epoch(name, mixed):
    def labels(batch):
        return batch[1].tolist()

    whole = [labels(batch) for batch in EPOCHAL[name](mixed)]
    ranks = [EPOCHAL[name](mixed, rank=rank, world_size=2, batch_size=BATCH // 2) for rank in (0, 1)]
    parts = [[labels(batch) for batch in rank] for rank in ranks]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_a_pass_that_ends_early_leaves_no_thread(mixed):
    before = set(threading.enumerate())  # a test of stores may have left one that waits for an answer
    for name, make in ADAPTERS.items():
        for _ in make(mixed):
            break
        iter(make(mixed))
        adapter = make(mixed)
        batches = iter(adapter)
        next(batches)
        adapter.close()
        assert list(batches) == []
        assert not [thread for thread in set(threading.enumerate()) - before if "fastpmae" in thread.name], name


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_programs_defaults_change_nothing(name, mixed):
    with closing(ADAPTERS[name](mixed)) as adapter:
        expected = next(iter(adapter))
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        with closing(ADAPTERS[name](mixed)) as adapter:
            batch = next(iter(adapter))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert equal(batch, expected)


def test_two_passes_at_once_begin_at_the_same_batch(mixed):
    adapter = EPOCHAL["mae"](mixed)
    for one, other in zip(adapter, adapter, strict=True):
        assert equal(one, other)


# MAE and SdAE.


def test_mae_and_sdae_get_normalised_images_and_labels(mixed):
    adapter = MAELoader(loader(mixed, [mae_view(32)]))
    for handed, batch in zip(adapter, loader(mixed, [mae_view(32)]), strict=True):
        images, labels = handed
        assert type(handed) is tuple
        assert images.shape == (BATCH, 3, 32, 32)
        assert images.dtype == torch.float32
        torch.testing.assert_close(images, normalised(batch.simple), rtol=0, atol=2e-6)
        assert torch.equal(labels, 10 * batch.index)
    assert -2.2 < images.min() < images.max() < 2.7


@pytest.mark.untyped
def test_mae_takes_our_masks_in_place_of_its_noise(mixed):
    """MAE cuts a permutation at len_keep = int(L * (1 - mask_ratio)); what is left is SdAE's ids_unkeep."""
    adapter = MAELoader(loader(mixed, [mae_view(32)]), masks="ours")
    for (_, _, ids_shuffle), batch in zip(adapter, loader(mixed, [mae_view(32)]), strict=True):
        assert ids_shuffle.dtype == torch.int64
        assert torch.equal(ids_shuffle.sort(1).values, torch.arange(16).expand(BATCH, 16))
        keep = int(16 * (1 - 0.75))
        assert torch.equal(ids_shuffle[:, :keep], batch.visible)
        assert torch.equal(ids_shuffle[:, keep:], batch.folds)
    with pytest.raises(UserError, match="masks is 'none'; expected 'theirs' or 'ours'"):
        MAELoader(loader(mixed, [mae_view(32)]), masks="none")  # type: ignore[arg-type]


# iBOT.


def ibot_collated(batch: Any, masks: list[np.ndarray]) -> Any:
    """Sample by sample as its data set returns them, put together by torch as its DataLoader does."""
    samples = [
        ([normalised(view[row]) for view in batch.views], int(batch.label[row]), [mask[row] for mask in masks])
        for row in range(len(batch))
    ]
    return default_collate(samples)


@pytest.mark.parametrize("views", [PAIR, PAIR + LOCALS])
@pytest.mark.parametrize("shape", ["block", "rand"])
def test_ibot_gets_views_labels_and_masks(views, shape, mixed):
    drawn = IBOTMasks(pred_ratio=[0.0, 0.5], pred_ratio_var=[0.0, 0.2], pred_shape=shape)
    adapter, plain = IBOTLoader(loader(mixed, views), drawn), loader(mixed, views)
    adapter.sampler.set_epoch(2)
    adapter.dataset.set_epoch(2)
    plain.set_epoch(2)
    for (images, labels, masks), batch in zip(adapter, plain, strict=True):
        order = batch.index.numpy()
        theirs = ibot_collated(batch, [drawn.draw(11, 2, order, view, (4, 4)) for view in (0, 1)])
        assert type(images) is type(masks) is list
        for one, other in zip(images, theirs[0], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
        assert equal(labels, theirs[1])
        assert equal(masks, theirs[2])
        assert [mask.shape for mask in masks] == [(BATCH, 4, 4)] * 2
    assert torch.stack(masks).any()


def test_ibots_masks_of_a_sample_are_the_same_in_any_batch(mixed):
    def masks(**changes):
        adapter = IBOTLoader(loader(mixed, PAIR, **changes), IBOTMasks(0.4, 0.2))
        return {int(label): both for _, labels, pair in adapter for label, *both in zip(labels, *pair, strict=True)}

    six, four = masks(), masks(batch_size=4, shuffle=False, drop_last=False)
    assert len(four) == 23
    for label, both in six.items():
        assert equal(both, four[label])
        assert not equal(*both) or not torch.stack(both).any()


def test_ibot_masks_nothing_before_pred_start_epoch(mixed):
    adapter = IBOTLoader(loader(mixed, PAIR), IBOTMasks(0.5, pred_start_epoch=1))
    epochs = [torch.cat([torch.cat(masks) for _, _, masks in adapter]) for _ in range(2)]
    assert not epochs[0].any()
    assert epochs[1].any()


def test_ibot_takes_our_masks(mixed):
    adapter, plain = IBOTLoader(loader(mixed, PAIR), masks=None), loader(mixed, PAIR)
    for (_, _, masks), batch in zip(adapter, plain, strict=True):
        for row in range(BATCH):
            assert masks[0][row].flatten().nonzero().flatten().tolist() == sorted(batch.folds[row].tolist())
        assert (masks[1].sum((1, 2)) == 12).all()
        assert not torch.equal(*masks)
    with pytest.raises(UserError, match="patch_size=16"):
        IBOTLoader(loader(mixed, PAIR), masks=None, patch_size=16)
    with pytest.raises(UserError, match="does not divide"):
        IBOTLoader(loader(mixed, PAIR), patch_size=9)
    assert next(iter(IBOTLoader(loader(mixed, PAIR), patch_size=16)))[2][0].shape == (BATCH, 2, 2)


# timm.


class Batches(list):
    """What PrefetchLoader asks of a DataLoader."""

    sampler = dataset = batch_sampler = collate_fn = None


def prefetched(path: Path, **arguments: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """timm's own prefetcher over the same bytes."""
    batches = Batches((batch.simple, batch.label) for batch in loader(path, [mae_view(32)]))
    return list(PrefetchLoader(batches, device=torch.device("cpu"), **arguments))  # type: ignore[arg-type]


def test_timm_gets_what_its_prefetcher_gives(mixed):
    adapter = TimmLoader(loader(mixed, [mae_view(32)]))
    assert equal(list(adapter), prefetched(mixed))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    assert equal(list(TimmLoader(loader(mixed, [mae_view(32)]), mean, std)), prefetched(mixed, mean=mean, std=std))
    half = TimmLoader(loader(mixed, [mae_view(32)]), img_dtype=torch.bfloat16)
    for (ours, _), (theirs, _) in zip(half, prefetched(mixed, img_dtype=torch.bfloat16), strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.04)
    for name in ("__len__", "__iter__", "sampler", "batch_sampler", "dataset", "mixup_enabled", "loader"):
        assert hasattr(adapter, name)
    assert len(adapter.batch_sampler) == len(adapter) == 3


def test_timms_mixup_works_on_its_batches(mixed):
    arguments: Any = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "num_classes": 230, "label_smoothing": 0.1}
    mixup = timm.data.Mixup(**arguments)
    np.random.seed(0)  # noqa: NPY002, timm draws from it
    ours = list(TimmLoader(loader(mixed, [mae_view(32)]), mixup=mixup))
    np.random.seed(0)  # noqa: NPY002
    theirs = [mixup(*batch) for batch in prefetched(mixed)]
    assert equal(ours, theirs)
    images, target = ours[0]
    torch.testing.assert_close(target.sum(1), torch.ones(BATCH))
    logits = torch.nn.Linear(3 * 32 * 32, 230)(images.flatten(1))
    SoftTargetCrossEntropy()(logits, target).backward()
    with pytest.raises(UserError, match=r"timm\.data\.Mixup"):
        TimmLoader(loader(mixed, [mae_view(32)]), mixup=timm.data.FastCollateMixup(**arguments))


def test_timms_loop_switches_mixup_off(mixed):
    adapter = TimmLoader(loader(mixed, [mae_view(32)]))
    assert adapter.mixup_enabled is False
    adapter.mixup_enabled = True
    assert adapter.mixup_enabled is False
    mixup = timm.data.Mixup(num_classes=230, label_smoothing=0.0)
    adapter = TimmLoader(loader(mixed, [mae_view(32)]), mixup=mixup)
    assert adapter.mixup_enabled is True
    adapter.mixup_enabled = False
    assert mixup.mixup_enabled is False
    for (images, target), (plain, label) in zip(adapter, prefetched(mixed), strict=True):
        assert torch.equal(images, plain)
        assert torch.equal(target, torch.nn.functional.one_hot(label, 230).float())


def test_timms_random_erasing_comes_last(mixed):
    erase = RandomErasing(probability=1.0, mode="const", device="cpu")
    for images, _ in TimmLoader(loader(mixed, [mae_view(32)]), random_erasing=erase):
        assert (images == 0).flatten(2).any(2).all()


def test_timm_validates_on_every_image_once(mixed):
    views = [plain_view(32, 0.875)]
    adapter = TimmLoader(loader(mixed, views, shuffle=False, drop_last=False))
    batches = list(adapter)
    assert [len(target) for _, target in batches] == [6, 6, 6, 5]
    assert torch.cat([target for _, target in batches]).tolist() == [10 * number for number in range(23)]
    assert equal(batches, list(adapter))


def test_timm_wants_labels(tmp_path):
    for number in range(4):
        made_image(number, 40, 40).save(tmp_path / f"{number}.jpg")
    with pytest.raises(UserError, match="without a label"):
        TimmLoader(PairedViews(tmp_path, 2, engine="torch", settings=SETTINGS))


# lightly.


def test_lightly_gets_views_labels_and_numbers_for_names(mixed):
    adapter, plain = LightlyLoader(loader(mixed, [*PAIR, LOCALS[0]])), loader(mixed, [*PAIR, LOCALS[0]])
    for (views, labels, names), batch in zip(adapter, plain, strict=True):
        assert type(views) is list
        assert [view.shape for view in views] == [(BATCH, 3, 32, 32), (BATCH, 3, 32, 32), (BATCH, 3, 16, 16)]
        for view, bytes_ in zip(views, batch.views, strict=True):
            torch.testing.assert_close(view, normalised(bytes_), rtol=0, atol=2e-6)
        assert torch.equal(labels, batch.label)
        assert names == [str(number) for number in batch.index.tolist()]


def test_lightly_gets_the_names_of_files(tmp_path):
    for number in range(8):
        place = tmp_path / f"class_{number % 2}"
        place.mkdir(exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), 30 * number, np.uint8)).save(place / f"{number}.png")
    adapter = LightlyLoader(PairedViews(tmp_path, 4, engine="torch", settings=SETTINGS, views=[mae_view(32)]))
    for (view,), labels, names in adapter:
        for row, label, name in zip(view, labels, names, strict=True):
            assert Path(name).parts[:-1] == (f"class_{int(label)}",)
            colour = (row * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) * 255
            assert round(float(colour.mean())) == 30 * int(Path(name).stem)


# DINOv2.


def collated(batch: Any, masks: np.ndarray, upperbound: int) -> dict[str, Any]:
    """Its collate in plain words, from a batch of bytes and the masks of its crops."""

    def stacked(views):
        return torch.stack([normalised(view[row]) for view in views for row in range(len(batch))]).half()

    places, weights = [], []
    for crop, mask in enumerate(masks):
        for patch in range(mask.size):
            if mask[patch]:
                places.append(crop * mask.size + patch)
                weights.append(1 / mask.sum())
    return {
        "collated_global_crops": stacked(batch.views[:2]),
        "collated_local_crops": stacked(batch.views[2:]),
        "collated_masks": torch.tensor(masks),
        "mask_indices_list": torch.tensor(places, dtype=torch.int64),
        "masks_weight": torch.tensor(weights, dtype=torch.float32),
        "upperbound": upperbound,
        "n_masked_patches": torch.tensor([len(places)]),
    }


def test_dinov2_gets_the_dictionary_of_its_collate(mixed):
    drawn = DINOv2Masks()
    adapter, plain = DINOv2Loader(loader(mixed, PAIR + LOCALS), drawn), loader(mixed, PAIR + LOCALS)
    plain.set_epoch(0)
    for ours, batch in zip(itertools.islice(adapter, 3), plain, strict=True):
        masks, upperbound = drawn.draw(11, 0, batch.index.numpy(), 2, (4, 4))
        theirs = collated(batch, masks, upperbound)
        assert list(ours) == list(theirs)
        for key in ("collated_global_crops", "collated_local_crops"):
            assert ours[key].dtype == torch.float16
            torch.testing.assert_close(ours.pop(key), theirs.pop(key), rtol=0, atol=2e-3)
        torch.testing.assert_close(ours.pop("masks_weight"), theirs.pop("masks_weight"), rtol=0, atol=1e-7)
        assert equal(ours, theirs)
        assert type(ours["upperbound"]) is int
        assert ours["upperbound"] >= ours["n_masked_patches"].item() > 0
        # half of the crops are masked
        assert (ours["collated_masks"].any(1)).sum() <= BATCH


def test_dinov2s_patch_loss_adds_up(mixed):
    """Weights make every masked crop count once: their sum is the number of such crops."""
    for data in itertools.islice(DINOv2Loader(loader(mixed, PAIR + LOCALS)), 3):
        masks = data["collated_masks"]
        tokens = torch.randn(2 * BATCH, 16, 8)
        picked = torch.index_select(tokens.flatten(0, 1), 0, data["mask_indices_list"])
        assert torch.equal(picked, tokens[masks])
        buffer = tokens.new_zeros(data["upperbound"], 8)
        buffer[: data["n_masked_patches"].item()].copy_(picked)
        assert data["masks_weight"].sum().item() == pytest.approx(masks.any(1).sum().item())


def test_dinov2_goes_on_without_end_and_from_any_iteration(mixed):
    adapter = DINOv2Loader(loader(mixed, PAIR + LOCALS))
    with pytest.raises(TypeError):
        len(adapter)  # type: ignore[arg-type]
    seen = list(itertools.islice(adapter, 8))
    for one, other in itertools.combinations(seen, 2):
        assert not equal(one, other)
    for start in (1, 3, 5, 7):
        resumed = DINOv2Loader(loader(mixed, PAIR + LOCALS), start_iter=start)
        assert equal(list(itertools.islice(resumed, 8 - start)), seen[start:])


def test_dinov2_without_local_crops_and_with_our_masks(mixed):
    adapter = DINOv2Loader(loader(mixed, PAIR), masks=None, dtype=torch.float32)
    data, batch = next(iter(adapter)), next(iter(loader(mixed, PAIR)))
    assert data["collated_local_crops"].shape == (0, 3, 32, 32)
    assert data["collated_global_crops"].dtype == torch.float32
    for row in range(BATCH):
        assert data["collated_masks"][row].nonzero().flatten().tolist() == sorted(batch.folds[row].tolist())
    assert data["upperbound"] == data["n_masked_patches"].item() == 2 * BATCH * 12


# DINOv3, CAPI and LightlyTrain.


def test_dinov3_gets_dinov2s_dictionary_and_gram_crops(mixed):
    drawn = DINOv3Masks(mask_random_circular_shift=True)
    views = [*PAIR, *LOCALS, View(48, crop_of=0), View(48, crop_of=1)]
    adapter, plain = DINOv3Loader(loader(mixed, views), drawn, gram_crops=2), loader(mixed, views)
    plain.set_epoch(0)
    for ours, batch in zip(itertools.islice(adapter, 3), plain, strict=True):
        masks, upperbound = drawn.draw(11, 0, batch.index.numpy(), 2, (4, 4))
        gram = torch.cat([normalised(view) for view in batch.views[-2:]]).to(torch.bfloat16)
        # half a step of bfloat16 at 2.6, the largest number of a normalised image
        torch.testing.assert_close(ours.pop("collated_gram_teacher_crops"), gram, rtol=0, atol=0.016)
        theirs = collated(dataclasses.replace(batch, views=batch.views[:-2]), masks, upperbound)
        assert list(ours) == list(theirs)
        for key in ("collated_global_crops", "collated_local_crops"):
            assert ours[key].dtype == torch.bfloat16
            torch.testing.assert_close(ours.pop(key).half(), theirs.pop(key), rtol=0, atol=0.016)
        torch.testing.assert_close(ours.pop("masks_weight"), theirs.pop("masks_weight"), rtol=0, atol=1e-7)
        assert equal(ours, theirs)
        assert ours["upperbound"] == ours["n_masked_patches"].item() > 0, "what the rectangles leave is made up for"
    for wrong in (1, 3, -2):
        with pytest.raises(UserError, match=f"gram_crops = {wrong}: of 7 views there are 2 global crops"):
            DINOv3Loader(loader(mixed, views), gram_crops=wrong)


def test_capi_gets_the_indices_of_its_collate(mixed):
    """CAPI's rule in a loop over the images: what is seen and what is predicted, counted through the batch."""
    drawn = CAPIMasks(mask_ratio=0.65, prediction_subsampling=0.4)
    adapter, plain = CAPILoader(loader(mixed, [mae_view(32)]), drawn), loader(mixed, [mae_view(32)])
    plain.set_epoch(0)
    for ours, batch in zip(itertools.islice(adapter, 3), plain, strict=True):
        masks = drawn.draw(11, 0, batch.index.numpy(), (4, 4))
        flat = torch.from_numpy(masks.masks).flatten()
        assert list(ours) == ["images", "visible_indices", "predict_indices"]
        assert torch.equal(ours["visible_indices"], (~flat).nonzero().flatten())
        assert len(ours["predict_indices"]) == BATCH * int(int(16 * 0.65) * 0.4)
        assert flat[ours["predict_indices"]].all()
        assert ours["predict_indices"].unique().shape == ours["predict_indices"].shape
        assert torch.equal(ours["images"], normalised(batch.views[0]).to(torch.bfloat16))


@pytest.mark.parametrize("kind", [DINOv3Loader, CAPILoader])
def test_the_others_too_go_on_without_end_and_from_any_iteration(kind, mixed):
    seen = list(itertools.islice(kind(loader(mixed, PAIR + LOCALS)), 8))
    for one, other in itertools.combinations(seen, 2):
        assert not equal(one, other)
    for start in (1, 3, 7):
        assert equal(
            list(itertools.islice(kind(loader(mixed, PAIR + LOCALS), start_iter=start), 8 - start)), seen[start:]
        )
    with pytest.raises(UserError, match="start_iter = -1 must be an iteration"):
        kind(loader(mixed, PAIR + LOCALS), start_iter=-1)


def test_lightly_train_gets_names_and_views(mixed):
    batch, plain = (
        next(iter(LightlyTrainLoader(loader(mixed, PAIR + LOCALS)))),
        next(iter(loader(mixed, PAIR + LOCALS))),
    )
    assert list(batch) == ["filename", "views"]
    assert batch["filename"] == [str(number) for number in plain.samples]
    for ours, view in zip(batch["views"], plain.views, strict=True):
        torch.testing.assert_close(ours, normalised(view), rtol=0, atol=1e-5)


def test_our_masks_are_those_of_the_plan(mixed):
    """From draw_samples alone, without any loader."""
    adapter = IBOTLoader(loader(mixed, PAIR), masks=None)
    _, labels, masks = next(iter(adapter))
    samples = adapter.loader.samples
    for label, mask in zip(labels, masks[0], strict=True):
        one = np.array([int(label) // 10])
        drawn = draw_samples(11, 0, one, samples.height[one], samples.width[one], PAIR, patches=16)
        assert set(drawn.order[0, 4:].tolist()) == set(mask.flatten().nonzero().flatten().tolist())


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
def test_local_crops_may_be_as_large_as_global_ones(name, mixed):
    views = [*PAIR, dino_local(32), dino_local(32)]
    kind: Any = {"ibot": IBOTLoader, "dinov2": DINOv2Loader}[name]
    handed = next(iter(kind(loader(mixed, views), global_crops=2)))
    if name == "dinov2":
        shapes = [len(handed[key]) for key in ("collated_global_crops", "collated_local_crops", "collated_masks")]
        assert shapes == [2 * BATCH] * 3
        # two, as DINOv2 has them, unless told otherwise
        assert equal(next(iter(kind(loader(mixed, views)))), handed)
    else:
        assert [len(part) for part in (handed[0], handed[2])] == [4, 2]
        assert len(next(iter(kind(loader(mixed, views))))[2]) == 4
    for wrong in (0, 3):
        with pytest.raises(UserError, match=f"global_crops = {wrong}: .* the first 2 are alike"):
            kind(loader(mixed, PAIR + LOCALS), global_crops=wrong)


def test_timm_takes_what_has_labels_and_nothing_else(tmp_path: Path):
    def shard(name: str, classes: list[int]) -> TarShards:
        with tarfile.open(tmp_path / name, "w") as tar:
            for number, label in enumerate(classes):
                made_image(number, 40, 40).save(tmp_path / "image.png")
                tar.add(tmp_path / "image.png", f"{number}.png")
                (tmp_path / "label.cls").write_text(str(label))
                tar.add(tmp_path / "label.cls", f"{number}.cls")
        return TarShards(tmp_path / name)

    def folder(name: str, *names: str) -> ImageFolder:
        for number, image in enumerate(names):
            (tmp_path / name / image).parent.mkdir(parents=True, exist_ok=True)
            made_image(number, 40, 40).save(tmp_path / name / image)
        return ImageFolder(tmp_path / name)

    def timm_loader(samples: Any, **options: Any) -> TimmLoader:
        options = {"batch_size": 2, "shuffle": False, "drop_last": False} | options
        return TimmLoader(loader(samples, [mae_view(32)], **options))

    def targets(samples: Any, **options: Any) -> list[int]:
        return torch.cat([target for _, target in timm_loader(samples, **options)]).tolist()

    numbered = Mixture([shard("x.tar", [3, 7, 9]), shard("y.tar", [1, 2, 0])])
    assert sorted(targets(numbered)) == [0, 1, 2, 3, 7, 9]
    named, flat = folder("named", "a/0.png", "b/1.png"), folder("flat", "0.png", "1.png")
    for unlabelled in (flat, Mixture([named, flat]), Mixture([shard("x.tar", [3]), flat])):
        with pytest.raises(UserError, match="holds images without a label"):
            timm_loader(unlabelled)
    assert targets(Mixture([named, flat]), indices=[1, 0]) == [1, 0]
    for name, labels in (("numbers", [3, 7, 9, 1]), ("one-without", [3, 7, 9, -1])):
        shard("z.tar", labels)
        write_set(tmp_path / "z.tar", tmp_path / name, 2, listing=SourceSettings(), workers=1)
    assert targets(tmp_path / "numbers") == [3, 7, 9, 1]
    with pytest.raises(UserError, match="holds images without a label"):
        targets(tmp_path / "one-without")


def test_each_sample_that_does_not_decode_is_told_once(tmp_path: Path):
    for number in range(12):
        path = tmp_path / f"{number:02}.jpg"
        made_image(number, 64, 64).save(path)
        if number in (3, 4, 9):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    adapter = MAELoader(loader(tmp_path, [mae_view(32)], shuffle=False, bad_fraction=1.0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            assert [len(images) for images, _ in adapter] == [6, 6]
    said = [f"{tmp_path}: sample {sample} does not decode; the next good one stands in" for sample in (3, 4, 9)]
    assert [str(warning.message) for warning in told] == said
