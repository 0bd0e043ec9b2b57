"""Stages `loaders` and `dali`: images/s of every engine, nothing trained, and DALI's pixels beside the reference's."""

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.images import ORIGINALS, repeated
from benchmarks.gpu.task import Task
from fastpmae_kernels import photometric
from fastpmae_loaders import Batch, Beton, PairedViews, ViewSettings
from fastpmae_loaders.machine import usable_cores

MEAN_APART = 1.0
"""Largest mean difference of DALI's pixels from the reference's, of 255: its resize and its hue are its own."""


def open_views(task: Task, beton: Path, engine: str, **settings: Any) -> PairedViews:
    """The trainer's two views of a file."""
    settings = {"workers": usable_cores(), "ahead": 2 if engine == "dali" else 4} | settings
    batch = settings.pop("batch", task.sizes.batch)
    return PairedViews(beton, batch, engine=engine, settings=ViewSettings(), **settings)


def timed(task: Task, views: PairedViews) -> dict[str, float]:
    """Images/s after the first batches, and how long the first one took."""
    start = time.perf_counter()
    batches = endless(views)
    next(batches)
    first = time.perf_counter() - start
    for _ in range(3):
        next(batches)
    task.wait()
    start, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < task.sizes.seconds or count == 0:
        count += len(next(batches))
    task.wait()
    return {"images_per_second": count / max(taken, time.perf_counter() - start), "first_batch_seconds": first}


def endless(views: PairedViews) -> Iterator[Batch]:
    """The batches of one epoch after another."""
    epoch = 0
    while True:
        views.set_epoch(epoch)
        yield from views
        epoch += 1


def originals(task: Task) -> Path:
    return repeated(Beton(task.data / ORIGINALS), task.folder / "repeated.beton", task.sizes.epoch_images)


def loaders(task: Task) -> None:
    """Our engines, with colours on the CPU and on the device, on all cores and on one."""
    beton, cores = originals(task), usable_cores()
    cases = [
        (engine, on, workers)
        for engine in ("native", "torch")
        for on, workers in (("device", cores), ("cpu", cores), ("device", 1))
    ]
    for engine, on, workers in cases:
        name = f"{engine}, colours on {'the device' if on == 'device' else 'the CPU'}, {workers} threads"
        with (
            task.record.trying(name),
            open_views(
                task, beton, engine, workers=workers, augment_on=on, device=task.device,
                colour=photometric if on == "device" else None,
            ) as views,
        ):  # fmt: skip
            task.record.note(name, **timed(task, views))


def dali(task: Task) -> None:
    """DALI: the same crops, flips and masks as the reference, near pixels, and images/s by its two settings."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        task.record.note("dali", ok=True, skipped="DALI is not installed here")
        return
    from fastpmae_loaders import DaliSettings

    beton = originals(task)
    device = task.device if task.cuda else None
    with task.record.trying("dali pixels"):
        with open_views(task, beton, "torch", batch=min(64, task.sizes.batch)) as views:
            expected = next(iter(views))
        with open_views(task, beton, "dali", batch=min(64, task.sizes.batch), device=device) as views:
            found = next(iter(views)).to("cpu")
        same = all(
            torch.equal(getattr(found, name), getattr(expected, name))
            for name in ("visible", "folds", "boxes", "flips", "index")
        )
        task.record.note("dali: the same crops, flips and masks", ok=same)
        for name, ours, theirs in zip(("simple", "complex"), found.views, expected.views, strict=True):
            apart = (ours.int() - theirs.int()).abs().double()
            figures = {"p99": percentile(apart, 0.99), "most": int(apart.max())}
            task.record.check(f"dali: {name} view", float(apart.mean()), MEAN_APART, **figures)
    for hardware in (0.0, 0.65, 1.0) if task.cuda else (0.0,):
        for part in (64, 128, 256) if task.cuda else (32,):
            name = f"dali, parts of {part}, hardware decoder {hardware:g}"
            settings = DaliSettings(part=part, hw_decoder_load=hardware)
            with (
                task.record.trying(name),
                open_views(
                    task, beton, "dali", device=device, dali=settings, colour=photometric if task.cuda else None,
                    augment_on="device" if task.cuda else "cpu",
                ) as views,
            ):  # fmt: skip
                task.record.note(name, **timed(task, views))


def percentile(values: Tensor, share: float) -> float:
    """Of every 97th value: quantiles of more than 16 million are refused."""
    return float(values.flatten()[::97].quantile(share))
