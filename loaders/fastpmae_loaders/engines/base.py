"""What the loaders ask of an engine, and what an engine is given to fill."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from fastpmae_loaders.engines.dali_settings import DaliSettings
from fastpmae_loaders.engines.scratch import Scratch, make_scratch
from fastpmae_loaders.engines.views import Rows
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import usable_memory
from fastpmae_loaders.recipes import View, recipes_of
from fastpmae_loaders.sampling import CHOICES, FACTORS
from fastpmae_loaders.sources.places import Column, Largest, Places
from fastpmae_loaders.stores.address import Address

ATTEMPTS = 64
"""How many samples in a row are tried before a row is given up."""
_STRETCH = 1 << 20


@runtime_checkable
class Samples(Protocol):
    """Images that an engine can read: a Beton, a BetonSet, a Mixture, an ImageFolder, TarShards.

    `height`, `width` int64 [n], pixels; `size` [n], stored bytes; `mode` uint8 [n], 0 JPEG, 1 raw RGB, 2 any other
    encoded image; `label` int64 [n], -1 where there is none; `page_of` int64 [n], what lies near to what on the
    disk; `nbytes` of all. Of many files they are Columns, which find what they are asked for.
    """

    class_names: list[str] | None

    @property
    def path(self) -> Path | Address: ...

    def __len__(self) -> int: ...

    @property
    def height(self) -> np.ndarray | Column: ...

    @property
    def width(self) -> np.ndarray | Column: ...

    @property
    def size(self) -> np.ndarray | Column: ...

    @property
    def mode(self) -> np.ndarray | Column: ...

    @property
    def label(self) -> np.ndarray | Column: ...

    @property
    def page_of(self) -> np.ndarray | Column: ...

    @property
    def nbytes(self) -> int: ...

    def payload(self, index: int) -> np.ndarray:
        """The stored bytes of one image, uint8."""
        ...


@runtime_checkable
class Located(Samples, Protocol):
    """Images in .beton files, which compiled code reads by itself."""

    def locate(self, indices: np.ndarray) -> tuple[Places, object]:
        """Where some images lie, and what keeps their files open meanwhile."""
        ...


def engine_for(samples: Samples, wanted: str) -> str:
    """The engine that reads these images where nobody has asked for one: that of a run, or the default, for .beton
    files, and Pillow for others."""
    return wanted if isinstance(samples, Located) else "torch"


@dataclass(frozen=True)
class Source:
    """What the rows are made from: images, the views of each, its masks (none where patches is 0), the seed.

    With `colours` false the views' colours are left for the device to change. `workers` is how many threads the
    loader was given, for engines that bring their own; `device` is where batches are handed over (None: the host's
    memory), for engines that can make them there; where one does, `made_on_device` says so and it brings the memory of
    the views. With `pin_memory` what is made on the host lies where the system leaves it, so that a GPU's copy of it
    need not be waited for. `following` says which sample stands in for one that does not decode, where that is not the
    next of the file: int64 [n] (see `in_a_circle`), or empty.
    """

    samples: Samples
    views: tuple[View, ...]
    seed: int
    patches: int = 0
    visible: int = 0
    colours: bool = True
    workers: int = 1
    device: torch.device | None = None
    made_on_device: bool = False
    pin_memory: bool = False
    dali: DaliSettings = field(default_factory=DaliSettings)
    following: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def after(self, index: int) -> int:
        """The sample that stands in for one that does not decode."""
        return int(self.following[index]) if len(self.following) else (index + 1) % len(self.samples)

    def recipes(self) -> np.ndarray:
        """The views as compiled code takes them."""
        return recipes_of(self.views)

    def scratch(self) -> Scratch:
        """Memory for one thread, enough for the largest image."""
        sides = [view.size for view in self.views]
        height, width, pixels, stored = largest(self.samples)
        # of other sources Python reads the files
        stored = stored if isinstance(self.samples, Located) else 0
        return make_scratch(height, width, max(sides), self.patches, 3 * pixels, min(sides), stored)


def largest(samples: Samples) -> Largest:
    """What memory must be there for any of the images."""
    found = getattr(samples, "largest", None)
    if found is None:
        height, width = np.asarray(samples.height), np.asarray(samples.width)
        pixels, stored = int((width * height).max()), int(np.asarray(samples.size).max())
        found = Largest(int(height.max()), int(width.max()), pixels, stored)
    return found


@dataclass
class Job:
    """One batch in the making. Threads take its rows one by one from `counter` until none is left.

    `rows` and `label` are views of the tensors. `keys` are what the rows' random choices are drawn by: the samples'
    numbers, but for one that the epoch has shown before. `left` counts the rows that are not yet done; the stream keeps
    it. `ready` is recorded where views are made on a device and a row that is done may still be under way there.
    """

    epoch: int
    indices: np.ndarray
    views: list[torch.Tensor]
    tensors: dict[str, torch.Tensor]
    rows: Rows
    label: np.ndarray
    keys: np.ndarray
    counter: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    left: int = 0
    ready: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Let the caller's stream wait for views that are still under way, and keep their memory until it is done."""
        if self.ready is None:
            return
        stream = torch.cuda.current_stream(self.views[0].device)
        stream.wait_event(self.ready)
        for view in self.views:
            view.record_stream(stream)


@runtime_checkable
class Engine(Protocol):
    """Turns jobs into batches. `fill` is called by several threads at once, each with its own scratch.

    An engine that brings its own threads says so by `threads` = 1: then one thread alone calls it.
    """

    @property
    def threads(self) -> int | None: ...

    def fill(self, job: Job, scratch: Scratch) -> int:
        """Do rows of the job until none is left to take; how many this call did."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...


def make_job(indices: np.ndarray, epoch: int, source: Source, keys: np.ndarray | None = None) -> Job:
    """A job with memory of its own, so that a batch belongs to who takes it.

    Args:
        keys: what the rows' random choices are drawn by; the samples' numbers where it is None.
    """
    count, views = len(indices), source.views

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=source.pin_memory and 0 not in shape)

    # of no rows nothing is made: such a job is done as it is
    in_host = () if source.made_on_device and count else views
    pictures = [empty(count, 3, view.size, view.size, dtype=torch.uint8) for view in in_host]
    tensors = {
        "visible": empty(count, source.visible, dtype=torch.int64),
        "folds": empty(count, source.patches - source.visible, dtype=torch.int64),
        "boxes": empty(count, len(views), 4, dtype=torch.int32),
        "flips": empty(count, len(views), dtype=torch.bool),
        "factors": empty(count, len(views), FACTORS, dtype=torch.float64),
        "choices": empty(count, len(views), CHOICES, dtype=torch.uint8),
        "size": empty(count, 2, dtype=torch.int32),
        "index": empty(count, dtype=torch.int64),
        "label": empty(count, dtype=torch.int64),
    }
    addresses = np.array([picture.data_ptr() for picture in pictures], np.int64)
    columns = {name: tensor.numpy() for name, tensor in tensors.items()}
    label = columns.pop("label")
    indices = np.ascontiguousarray(indices, np.int64)
    keys = indices if keys is None else keys
    return Job(epoch, indices, pictures, tensors, Rows(addresses, **columns), label, keys, left=count)


def larger_than_memory(samples: Samples) -> bool:
    """Whether images leave too little of the memory that this process may use to be kept in it."""
    memory = usable_memory()
    return memory is not None and samples.nbytes > 0.8 * memory


def shown(samples: Samples) -> int:
    """How many of the images an epoch shows: all, but for the duplicates of a set."""
    return getattr(samples, "shown", len(samples))


def by_page(samples: Samples) -> bool:
    """Whether an epoch goes page by page where nothing else is asked for: in many files, or larger than memory."""
    return hasattr(samples, "part_of") or larger_than_memory(samples)


def identity(samples: Samples) -> int:
    """A number of 48 bits that tells the images from others."""
    told = getattr(samples, "identity", None)
    if told is None:  # by their sizes, which an image keeps in whatever file it lies
        return digest(np.asarray(samples.height), np.asarray(samples.width))
    return int(told[:12], 16)


def check_whole(samples: Samples, unchanged: bool = False) -> None:
    """Raise UserError when a .beton file has become shorter under its reader (see `Beton.check_whole`)."""
    check = getattr(samples, "check_whole", None)
    if check is not None:
        check(unchanged)


def advice(samples: Samples, index: int) -> str:
    """How a user finds out what is wrong with a sample that does not decode."""
    source_of = getattr(samples, "source_of", None)
    if source_of is not None:
        return advice(*source_of(index))
    place_of = getattr(samples, "place_of", None)
    if place_of is not None:
        file, place = place_of(index)
        return f"look at sample {place} of its part {file} with fastpmae-write --check {samples.path / file}"
    if samples.path.suffix == ".beton":
        return f"look at the file with fastpmae-write --check {samples.path}"
    return "look at those files"


def chosen(samples: Samples, indices: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    """The numbers of some samples: int64 [m].

    Raises:
        UserError: for none at all, what is no list of whole numbers, and samples that are not there.
    """
    found = np.asarray(indices.cpu() if isinstance(indices, torch.Tensor) else indices)
    if found.shape == (0,):
        raise UserError("indices names no sample: give whole numbers, or leave it out to have all of them")
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise UserError(f"indices must be a list of whole numbers, not {found.dtype.name} {list(found.shape)}")
    for index in found[(found < 0) | (found >= len(samples))]:
        raise UserError(f"{samples.path} has no sample {index}: it holds {len(samples)}, counted from 0")
    return found.astype(np.int64)


def digest(*columns: np.ndarray) -> int:
    """A number of 48 bits that tells columns [n] of whole numbers from others."""
    total = hashlib.blake2b(digest_size=6)
    for column in columns:
        for start in range(0, len(column), _STRETCH):
            total.update(np.ascontiguousarray(column[start : start + _STRETCH], np.int64).data)
    return int.from_bytes(total.digest(), "big")


def in_a_circle(indices: np.ndarray, count: int) -> np.ndarray:
    """For each of some of `count` samples the next one of them, after the last the first: int64 [count].

    What stands in for a broken image then is one of them too, and never, say, one that was kept for validation.
    """
    members = np.unique(indices)
    following = np.full(count, members[0], np.int64)
    following[members] = np.roll(members, -1)
    return following
