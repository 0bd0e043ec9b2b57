"""Labelled images for an evaluation: two sets that agree on their classes, and the features of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from fastpmae.distributed.ranks import has_bf16, to_device
from fastpmae.evaluate.backbone import Backbone, features
from fastpmae.evaluate.features import Pool
from fastpmae.run.images import fingerprint
from fastpmae_loaders import PlainViews, Samples, open_samples
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.engines import base
from fastpmae_loaders.engines.names import DEFAULT_ENGINE
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import loader_threads
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.sources.splits import TRAIN_SPLITS, are_splits, split_of_folder
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.stores.cache import CacheSettings
from fastpmae_loaders.values import checked

Engine = Literal["auto", "native", "ffcv", "dali", "torch"]
VAL_SPLITS = ("val", "valid", "validation", "holdout", "heldout", "dev", "eval", "evaluation", "test", "testing")


@dataclass(frozen=True)
class Labelled:
    """Images with a class for each.

    Attributes:
        samples: the images.
        labels: the class of each, 0 ... classes - 1, as `names` counts them.
        names: what the classes are called.
    """

    samples: Samples
    labels: Int[Tensor, " images"]
    names: list[str]

    @property
    def path(self) -> Path | Address:
        """Where the images lie."""
        return self.samples.path

    def describe(self) -> dict[str, object]:
        """What a result records about the images."""
        return {"path": str(self.path), "images": len(self.samples), "fingerprint": fingerprint(self.samples)}


@checked
def open_labelled(
    train: Address | Path | str | tuple[str, ...],
    val: Address | Path | str | tuple[str, ...] | None,
    cache: CacheSettings | None = None,
) -> tuple[Labelled, Labelled | None]:
    """The images to learn from and the images to test on.

    Where `val` is None and `train` is a folder with a training and a validation split, those are taken. Classes are
    told apart by their names where both sets have names, and by their numbers otherwise.

    Args:
        train, val: whatever `open_samples` opens; of several sources each image counts once.
        cache: what keeps parts of sets in stores on this machine.

    Raises:
        UserError: for sets that cannot be opened or have no labels, or a validation class that is not trained on.
    """
    if val is None and isinstance(train, Path) and train.is_dir():
        try:
            folders = {path.name for path in train.iterdir() if path.is_dir()}
        except OSError as error:
            raise UserError(f"{printable(str(train))} cannot be read: {error.strerror or error}") from None
        # with a split to train on and another there is no doubt that these are splits; of several others, by this order
        named = {split_of_folder(name): name.lower() for name in sorted(folders)} if are_splits(folders) else {}
        split = next((named[word] for word in VAL_SPLITS if word in named), None)
        # by its name, or the loader would say that the other split is not taken
        own = [name.lower() for name in folders if split_of_folder(name) in TRAIN_SPLITS]
        samples = open_samples(train, own[0] if split is not None and len(own) == 1 else None)
        rest = None if split is None else open_samples(train, split)
    else:
        samples = open_samples(train, cache=cache)
        rest = None if val is None else open_samples(val, cache=cache)
    train_set = _labelled(samples)
    if rest is None:
        return train_set, None
    val_set = _labelled(rest)
    ours, theirs = samples.class_names, rest.class_names
    # By their numbers, a class is called as the training set calls it.
    called = val_set.names if ours is not None and theirs is not None else _by_number(val_set, theirs, ours)
    place = {name: number for number, name in enumerate(train_set.names)}
    unknown = [called[number] for number in val_set.labels.unique().tolist() if called[number] not in place]
    if unknown:
        raise UserError(
            f"{rest.path}: its class {short(unknown[0])!r} is none of the {len(train_set.names)} classes of "
            f"{samples.path}"
        )
    labels = torch.tensor([place.get(name, -1) for name in called])[val_set.labels]
    return train_set, Labelled(rest, labels, train_set.names)


def _by_number(val: Labelled, theirs: list[str] | None, ours: list[str] | None) -> list[str]:
    """What the training set calls the classes of another set, where not both have names for them."""
    numbers = [int(name) for name in val.names[len(theirs or []) :]]
    return [
        printable(ours[number]) if ours is not None and number < len(ours) else str(number)
        for number in [*range(len(theirs or [])), *numbers]
    ]


@runtime_checkable
class _Set(Protocol):
    @property
    def path(self) -> object: ...


Found = TypeVar("Found", bound=_Set)


def needed(val: Found | None, train: Found) -> Found:
    """The validation set. Raises UserError where there is none."""
    if val is None:
        raise UserError(f"--val is missing: {printable(str(train.path))} has no validation split of its own")
    return val


def engine_for(samples: Samples, engine: Engine) -> str:
    """The engine that reads these images: as asked for, or the default for a .beton and Pillow for files."""
    return base.engine_for(samples, DEFAULT_ENGINE) if engine == "auto" else engine


def check_readable(images: Labelled, engine: Engine, *, image_size: int, batch_size: int, crop_ratio: float) -> None:
    """Raise UserError now where an engine reads no such files, or a number makes no batch of whole images."""
    kind = engine_for(images.samples, engine)
    PlainViews(
        images.samples, batch_size, image_size=image_size, crop_ratio=crop_ratio, engine=kind, workers=loader_threads()
    ).close()


def half(device: torch.device) -> torch.autocast:
    """Evaluation's precision: bf16 where the device has it, else that of the weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def extract(
    model: nn.Module,
    backbone: Backbone,
    images: Labelled,
    pools: tuple[Pool, ...],
    *,
    device: torch.device,
    engine: Engine = "auto",
    batch_size: int = 64,
    crop_ratio: float = 0.875,
    workers: int = 0,
    progress: Progress | None = None,
) -> list[Float[Tensor, "images dim"]]:
    """Frozen features of whole images in the set's order, one matrix in fp32 on the CPU for each pooling.

    `workers` are the loader's threads, 0 for all cores that may be used.
    """
    model = model.to(device).eval()

    def embed(pictures: UInt8[Tensor, "batch 3 side side"]) -> list[Float[Tensor, "batch dim"]]:
        with half(device):
            return features(model, backbone.normalised(pictures), pools)

    return over_images(
        embed,
        images,
        image_size=backbone.image_size,
        device=device,
        engine=engine,
        batch_size=batch_size,
        crop_ratio=crop_ratio,
        workers=workers,
        progress=progress,
    )


@torch.no_grad()
def over_images(
    embed: Callable[[UInt8[Tensor, "batch 3 side side"]], list[Float[Tensor, "batch dim"]]],
    images: Labelled,
    *,
    image_size: int,
    device: torch.device,
    engine: Engine = "auto",
    batch_size: int = 64,
    crop_ratio: float = 0.875,
    workers: int = 0,
    progress: Progress | None = None,
) -> list[Float[Tensor, "images dim"]]:
    """What `embed` makes of whole images on the device, in the set's order: matrices in fp32 on the CPU.

    `workers` are the loader's threads, 0 for all cores that may be used.
    """
    progress = progress or Progress()
    batches: list[list[Tensor]] = []
    views = PlainViews(
        images.samples,
        batch_size,
        image_size=image_size,
        crop_ratio=crop_ratio,
        engine=engine_for(images.samples, engine),
        workers=loader_threads(workers),
        pin_memory=device.type == "cuda",
    )
    with views, progress.count(len(images.samples), "images"):
        for pictures, _, _ in views:
            batches.append([rows.float().cpu() for rows in embed(to_device(pictures, device))])
            progress.advance(len(pictures))
    return [torch.cat(rows) for rows in zip(*batches, strict=True)]


def _labelled(samples: Samples) -> Labelled:
    labels = torch.from_numpy(np.array(samples.label, np.int64))
    if int(labels.min()) < 0:
        raise UserError(f"{samples.path} holds images without a label; an evaluation needs one for each")
    # Numbers without a name may be of any size, so only those that are there are classes.
    names = [printable(name) for name in samples.class_names or []]
    nameless = labels[labels >= len(names)].unique()
    labels = torch.where(labels < len(names), labels, len(names) + torch.searchsorted(nameless, labels))
    return Labelled(samples, labels, names + [str(number) for number in nameless.tolist()])
