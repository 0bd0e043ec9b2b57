"""Every case of the loader's benchmark: ours in its forms, the ceiling, and the baselines, all opened the same way."""

import importlib.util
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.loader_baselines import Task, Views, dali_views, ffcv_views, timm_views, torchvision_views
from benchmarks.loader_peers import slipstream_views, spdl_views, torchcodec_views, webdataset_views
from fastpmae_loaders import Beton, PairedViews, View, dino_global, mae_view
from fastpmae_loaders.sources.jpeg import TURBO_DECOMPRESS, TURBO_RGB, TurboDecoders

TURBO_FAST = 2048 | 32768  # TJFLAG_FASTDCT, TJFLAG_LIMITSCANS
CHECKED = 8
"""So many samples of a case's first batch are compared with an independent computation."""


@dataclass(frozen=True)
class Shown:
    """A batch: its views, and for ours which samples in which epoch. The ceiling's views are whole images."""

    count: int
    views: Views
    index: Tensor | None = None
    epoch: int = 0


@dataclass(frozen=True)
class Case:
    """How a case is opened, and the packages without which it cannot be."""

    open: Callable[[Task], Iterator[Shown]]
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> str:
        """The first package that is not installed, or nothing."""
        return next((name for name in self.needs if not _installed(name)), "")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def our_views(side: int, colour: bool) -> tuple[View, View]:
    """MAE's view and DINO's, or, without `colour`, the same two crops and flips alone."""
    complex = dino_global("coin", side)
    if not colour:
        plain = {"jitter_probability": 0.0, "grayscale_probability": 0.0, "blur": (0.0, 0.0), "solarise": (0.0, 0.0)}
        complex = replace(complex, **plain)
    return mae_view(side), complex


def ours(
    task: Task, engine: str, colour: bool = True, on_device: bool = False, coefficients: bool = False
) -> Iterator[Shown]:
    """PairedViews, masks and folds included. The DALI engine works on the device, as does on_device's colour."""
    device = task.device if on_device or engine == "dali" else "cpu"
    loader = PairedViews(
        task.coefficients if coefficients else task.beton, task.batch,
        engine=engine, views=our_views(task.side, colour), workers=task.workers,
        augment_on="device" if on_device else "cpu", device=None if device == "cpu" else device,
    )  # fmt: skip
    epoch = 0
    with loader:
        while True:
            loader.set_epoch(epoch)
            for batch in loader:
                yield Shown(len(batch), batch.views, batch.index, epoch)
            epoch += 1


def decode_only(task: Task) -> Iterator[Shown]:
    """libjpeg-turbo called by `workers` threads into memory that each keeps: the most that it leaves to a loader.

    With its fast DCT, which no case of ours uses.
    """
    beton = Beton(task.beton)
    decoders = TurboDecoders()
    decode = TURBO_DECOMPRESS(decoders.function)
    data = beton.data.ctypes.data
    # plain integers, so that little of Python stands between two decodes
    pointer, size = beton.pointer.tolist(), beton.size.tolist()
    height, width = beton.height.tolist(), beton.width.tolist()
    largest = 3 * int((beton.height * beton.width).max())
    order = np.random.default_rng(0).permutation(len(beton)).tolist()
    changed = threading.Condition()
    begun = done = taken = 0
    stopped = False

    def decoded(handle: int, index: int, target: int) -> None:
        place = data + pointer[index], size[index], target
        decode(handle, *place, width[index], 0, height[index], TURBO_RGB, TURBO_FAST)

    # for the check, into memory of their own
    some = list(range(min(CHECKED, len(beton))))
    images = [torch.empty(height[index], width[index], 3, dtype=torch.uint8) for index in some]
    with decoders.lend() as handle:
        for index, image in zip(some, images, strict=True):
            decoded(handle, index, image.data_ptr())
    yield Shown(task.batch, tuple(images), torch.tensor(some))

    def work() -> None:
        with decoders.lend() as handle:
            work_with(handle)

    def work_with(handle: int) -> None:
        nonlocal begun, done
        pixels = np.empty(largest, np.uint8)
        target = pixels.ctypes.data
        while True:
            with changed:
                while begun >= taken + 3 * task.batch and not stopped:
                    changed.wait()
                if stopped:
                    return
                index = order[begun % len(order)]
                begun += 1
            decoded(handle, index, target)
            with changed:
                done += 1
                if done % task.batch == 0:
                    changed.notify_all()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(task.workers)]
    for thread in threads:
        thread.start()
    try:
        while True:
            with changed:
                while done < taken + task.batch:
                    changed.wait()
                taken += task.batch
                changed.notify_all()
            yield Shown(task.batch, ())
    finally:
        with changed:
            stopped = True
            changed.notify_all()
        for thread in threads:
            thread.join()


def of_others(views: Callable[..., Iterator[Views]], **options: Any) -> Callable[[Task], Iterator[Shown]]:
    """A baseline's views as Shown."""

    def opened(task: Task) -> Iterator[Shown]:
        for found in views(task, **options):
            yield Shown(len(found[0]), found)

    return opened


_VISION = ("torchvision",)
_DALI = ("nvidia.dali",)
_SPDL = ("spdl.pipeline", *_VISION)
_SLIPSTREAM = ("slipstream", *_VISION)
CASES: dict[str, Case] = {
    "ours-native": Case(partial(ours, engine="native")),
    "ours-native-coefficients": Case(partial(ours, engine="native", coefficients=True)),
    "ours-ffcv": Case(partial(ours, engine="ffcv"), ("ffcv",)),
    "ours-ffcv-device-colour": Case(partial(ours, engine="ffcv", on_device=True), ("ffcv",)),
    "ours-torch": Case(partial(ours, engine="torch")),
    "ours-dali": Case(partial(ours, engine="dali"), _DALI),
    "ffcv-stock": Case(of_others(ffcv_views), ("ffcv",)),
    "dali-stock": Case(of_others(dali_views), _DALI),
    "torchvision": Case(of_others(torchvision_views, tensors=False, colour=True), _VISION),
    "torchvision-tensor": Case(of_others(torchvision_views, tensors=True, colour=True), _VISION),
    "timm": Case(of_others(timm_views), ("timm", *_VISION)),
    "slipstream": Case(of_others(slipstream_views, colour=True), _SLIPSTREAM),
    "spdl": Case(of_others(spdl_views, colour=True), _SPDL),
    "torchcodec": Case(of_others(torchcodec_views), ("torchcodec", *_VISION)),
    "webdataset": Case(of_others(webdataset_views), ("webdataset", *_VISION)),
    "ours-native-geometry": Case(partial(ours, engine="native", colour=False)),
    "ours-native-coefficients-geometry": Case(partial(ours, engine="native", colour=False, coefficients=True)),
    "ours-ffcv-geometry": Case(partial(ours, engine="ffcv", colour=False), ("ffcv",)),
    "torchvision-geometry": Case(of_others(torchvision_views, tensors=False, colour=False), _VISION),
    "torchvision-tensor-geometry": Case(of_others(torchvision_views, tensors=True, colour=False), _VISION),
    "slipstream-geometry": Case(of_others(slipstream_views, colour=False), _SLIPSTREAM),
    "slipstream-yuv-geometry": Case(of_others(slipstream_views, colour=False, yuv=True), _SLIPSTREAM),
    "spdl-geometry": Case(of_others(spdl_views, colour=False), _SPDL),
    "decode-only": Case(decode_only, ("ffcv",)),
}
"""In the order in which they take turns."""
