"""The DALI engine on a GPU: the draws and nearly the pixels of the others, and the same bits wherever an image stands.

A setting under which an image's bits depend on its place in a batch is one that must not be offered: the second test
here is what decides.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastpmae_kernels import photometric
from fastpmae_loaders import DaliSettings, PairedViews, View, ViewSettings, mae_view
from fastpmae_loaders.pixels import device_colour
from fastpmae_loaders.sampling import SOLARISED
from tests.engines import FFCV
from tests.loaders.files import made_pixels, write_beton
from tests.made import made_image

pytestmark = pytest.mark.gpu

COUNT = 280
SETTINGS = ViewSettings(image_size=112, patch_size=16)
DRAWN = ("visible", "folds", "label", "index", "boxes", "flips", "factors", "choices", "source_size")
LOADS = (0.0, 0.4, 1.0)


@pytest.fixture(scope="module", autouse=True)
def dali() -> None:
    for package in ("nvidia.nvimgcodec", "nvidia.dali"):
        pytest.importorskip(package, reason="NVIDIA DALI is not installed (the extra dali-cuda130)")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of all kinds of colour sampling, some gray, some progressive (not for hardware), some raw pixels."""
    images, sizes = [], []
    for number in range(COUNT):
        width, height = 90 + number * 37 % 211, 70 + number * 53 % 173
        sizes.append((width, height))
        if number % 11 == 0:
            images.append(made_pixels(number, height, width))
            continue
        image = made_image(number, width, height)
        file = io.BytesIO()
        (image.convert("L") if number % 13 == 0 else image).save(
            file, "jpeg", quality=60 + number % 40, subsampling=number % 3, progressive=number % 7 == 0
        )
        images.append(file.getvalue())
    return write_beton(tmp_path_factory.mktemp("many") / "many.beton", images, sizes, page_size=1 << 22)


def seen(samples: Path, keep: Callable[[torch.Tensor], torch.Tensor] = torch.clone, **options):
    """Two epochs' views by sample, uint8 [epochs, samples, 3, S, S] of each view on the host, and what was drawn."""
    options = {"engine": "dali", "device": "cuda", "settings": SETTINGS, "drop_last": False, "workers": 4} | options
    pictures, drawn = [], []
    with PairedViews(samples, options.pop("batch_size", 64), **options) as loader:
        for epoch in range(2):
            loader.set_epoch(epoch)
            batches = [([keep(view) for view in batch.views], batch) for batch in loader]
            torch.cuda.synchronize()
            order = torch.cat([batch.index for _, batch in batches]).cpu().argsort()
            count = len(batches[0][0])
            pictures.append([torch.cat([views[i] for views, _ in batches]).cpu()[order] for i in range(count)])
            drawn.append(
                {name: torch.cat([getattr(batch, name) for _, batch in batches]).cpu()[order] for name in DRAWN}
            )
        assert loader.failed == []
    return [torch.stack(epochs) for epochs in zip(*pictures, strict=True)], drawn


def assert_same_draws(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for name in DRAWN:
            assert torch.equal(mine[name], other[name]), name


@pytest.mark.parametrize("load", LOADS)
def test_crops_flips_and_masks_are_the_torch_engines(many: Path, load: float):
    ours, drawn = seen(many, dali=DaliSettings(hw_decoder_load=load))
    reference, others = seen(many, engine="torch", device=None)
    assert_same_draws(drawn, others)
    # on the CPU 0.2 without colours and 0.5 with them; here the decoder is another one, too
    for mine, other, mean in zip(ours, reference, (0.5, 1.0), strict=True):
        away = (mine.int() - other.int()).abs().double()
        assert away.mean() < mean
        # picture by picture: none is another's
        assert away.mean((2, 3, 4)).max() < 6


@pytest.mark.parametrize("part", [64, 128, 256])
@pytest.mark.parametrize("load", LOADS)
def test_an_images_bits_do_not_depend_on_its_place_in_a_batch(many: Path, load: float, part: int):
    expected, draws = seen(many, batch_size=COUNT, shuffle=False, dali=DaliSettings(hw_decoder_load=load))
    for batch_size in (COUNT, 150, 37):
        found, again = seen(many, batch_size=batch_size, shuffle=True, dali=DaliSettings(part, load))
        assert_same_draws(again, draws)
        for mine, other in zip(found, expected, strict=True):
            differ = (mine != other).flatten(2).any(2)
            assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} pictures, batches of {batch_size}"


@pytest.mark.parametrize("load", LOADS)
def test_a_consumer_far_behind_sees_what_one_that_waits_sees(many: Path, load: float):
    """Batches are dropped while the consumer's stream has still to read them, on a stream that is not the default."""
    options = {"batch_size": 40, "dali": DaliSettings(20, load)}

    def waiting(view: torch.Tensor) -> torch.Tensor:
        torch.cuda.synchronize()
        return view.cpu()

    def late(view: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(20_000_000)
        return view.clone()

    expected, _ = seen(many, waiting, **options)
    with torch.cuda.stream(torch.cuda.Stream()):
        found, _ = seen(many, late, **options)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


def test_broken_images_are_replaced_as_by_the_other_engines(broken: Path, capfd: pytest.CaptureFixture[str]):
    shown = {}
    for engine, device in (("dali", "cuda"), ("torch", None)):
        options = {"settings": ViewSettings(image_size=32, patch_size=8), "shuffle": False, "bad_fraction": 1.0}
        with PairedViews(broken, 100, engine=engine, device=device, **options) as loader:
            batches = list(loader)
            shown[engine] = torch.cat([batch.index for batch in batches]).tolist(), loader.failed
    assert shown["dali"] == shown["torch"]
    assert shown["dali"][1] == [5, 6, 7, 399]


def test_an_empty_batch(tmp_path: Path):
    path = write_beton(tmp_path / "one.beton", [made_pixels(0, 20, 30)])
    with PairedViews(path, 1, "dali", SETTINGS, world_size=2, drop_last=False, device="cuda") as loader:
        (batch,) = loader
        assert len(batch) == 0
        assert [view.shape for view in batch.views] == [(0, 3, 112, 112)] * 2


def test_views_of_other_sizes(many: Path):
    views = [mae_view(96), mae_view(64)]
    ours, _ = seen(many, views=views)
    reference, _ = seen(many, views=views, engine="torch", device=None)
    assert [mine.shape[-1] for mine in ours] == [96, 64]
    for mine, other in zip(ours, reference, strict=True):
        assert (mine.int() - other.int()).abs().double().mean() < 0.5


@pytest.mark.parametrize("colour", [photometric, device_colour.change_colours], ids=["kernel", "torch"])
@pytest.mark.parametrize("engine", ["torch", FFCV])
def test_colours_on_the_device_are_the_cpus_within_two_levels(many: Path, engine: str, colour):
    there, draws = seen(many, engine=engine, augment_on="device", colour=colour)
    here, others = seen(many, engine=engine, device=None, augment_on="cpu")
    assert_same_draws(draws, others)
    assert torch.equal(there[0], here[0])
    away = (there[1].int() - here[1].int()).abs()
    # a level more or less on the far side of the solarisation's threshold is another colour
    solarised = np.stack([drawn["choices"][:, 1, SOLARISED].numpy() > 0 for drawn in draws])
    assert away[torch.from_numpy(~solarised)].max() <= 2
    assert (away > 2).double().mean() < 1e-4


def test_dali_changes_colours_as_the_compiled_functions_do(many: Path):
    on_gpu, _ = seen(many, dali=DaliSettings())
    left, draws = seen(many, augment_on="device", colour=lambda images, *_: images)
    for epoch, drawn in enumerate(draws):
        expected = device_colour.change_colours(
            left[1][epoch], drawn["factors"][:, 1].contiguous(), drawn["choices"][:, 1].contiguous(), 128
        )
        away = (on_gpu[1][epoch].int() - expected.int()).abs().double()
        assert away.mean() < 0.2
        assert np.percentile(away.numpy(), 99) <= 2


def test_host_memory_for_a_gpu_is_page_locked(many: Path):
    for asked, pinned in ((None, False), (True, True)):
        with PairedViews(many, 8, "torch", SETTINGS, pin_memory=asked) as loader:
            assert next(iter(loader)).simple.is_pinned() == pinned


def test_a_picture_is_the_one_of_its_file(many: Path, tmp_path: Path):
    """Whole images resized to their own size are what Pillow decodes, within the decoders' rounding."""
    images = [made_image(number, 128, 128) for number in range(6)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.jpg", quality=95, subsampling=0)
    view = View(128, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    for load in LOADS:
        with PairedViews(
            tmp_path, 6, "dali", views=[view], shuffle=False, device="cuda", dali=DaliSettings(0, load)
        ) as loader:
            found = next(iter(loader)).views[0].cpu()
        for number in range(6):
            expected = np.array(Image.open(tmp_path / f"{number}.jpg")).transpose(2, 0, 1)
            assert np.abs(found[number].numpy().astype(int) - expected).mean() < 1.0
