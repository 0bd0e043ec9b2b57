"""What every adapter has in common: passes over a loader, its position, normalised images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from fastpmae_loaders.adapters.parts import BatchSampler, Epochs, Sampler, as_it_is
from fastpmae_loaders.batch import Batch
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.paired import Iteration, PairedViews
from fastpmae_loaders.values import checked

if TYPE_CHECKING:  # the loaders alone need numpy, numba, torch and Pillow, no more
    from jaxtyping import Float, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Handed = TypeVar("Handed")


class Adapter(Generic[Handed]):
    """What all of them have in common: passes over a loader, its position, normalised images.

    Args:
        loader: where batches come from, and how they are normalised and handed over:
        mean, std: of each channel, for pixels between 0 and 1.
        dtype: of the images; they are normalised in float32.

    Raises:
        UserError: for arguments that are not what their annotations say, or do not fit.
    """

    @checked
    def __init__(
        self,
        loader: PairedViews,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.loader = loader
        self.dtype = dtype
        if not dtype.is_floating_point:
            raise UserError(f"the images' dtype is {dtype}, and normalised images are floats: name such a type")
        self._mean, self._std = _channels(mean, "mean"), _channels(std, "std")
        if not (self._std > 0).all():
            raise UserError(f"std is {std}: images are divided by it, so that it must be above 0")
        # whether since the last pass an epoch was asked for by name, and whether a position was
        self._told = False
        self._loaded = False
        self._closed = False
        self._failed: set[int] = set()

    def collate(self, batch: Batch, epoch: int) -> Handed:
        """A batch as the codebase takes it.

        Raises:
            UserError: in an adapter that does not say how.
        """
        raise UserError(
            f"{type(self).__name__} does not say what a batch becomes: define collate(self, batch, epoch) in it, as "
            'docs/adapters.md does under "An adapter of your own"'
        )

    @property
    def batch_size(self) -> int:
        """Samples in a batch of this rank."""
        return self.loader.batch_size

    @property
    def num_workers(self) -> int:
        """The loader's threads, as they were asked for."""
        return self.loader.workers

    @property
    def drop_last(self) -> bool:
        """Whether an epoch's last samples are left out where they make no whole batch."""
        return self.loader.drop_last

    @property
    def pin_memory(self) -> bool:
        """Whether batches are made where a GPU's copy of them need not be waited for."""
        return self.loader.pin_memory

    @property
    def collate_fn(self) -> Callable[[Any], Any]:
        """What leaves a batch as it is: they are whole when the adapter hands them over."""
        return as_it_is

    @property
    def sampler(self) -> Sampler:
        """The sampler's `set_epoch`, and this rank's samples an epoch."""
        return Sampler(self)

    @property
    def batch_sampler(self) -> BatchSampler:
        """The same, batch by batch."""
        return BatchSampler(self)

    @property
    def dataset(self) -> Epochs:
        """The data set's `set_epoch`, and all its samples."""
        return Epochs(self, self.loader.count)

    def set_epoch(self, epoch: int) -> None:
        """Turn to an epoch's beginning, or keep the position within it that `load_state_dict` has just set."""
        self.loader.set_epoch(epoch)
        self._told = True

    def state_dict(self) -> dict[str, int]:
        """The loader's position, as plain integers."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position: the next pass continues there."""
        self.loader.load_state_dict(state)
        self._told, self._loaded = False, True

    def close(self) -> None:
        """End the loader's passes and their threads."""
        self._closed = True
        self.loader.close()

    def normalised(self, images: UInt8[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch 3 side side"]:
        """Bytes as a network takes them, on the device where they are."""
        if self._mean.device != images.device:
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        return images.to(torch.float32).sub_(self._mean).div_(self._std).to(self.dtype)

    def _pass(self) -> Iterator[Handed]:
        """The loader's epoch; the next one where batches of it were taken and nobody asked for it again."""
        state = self.loader.state_dict()
        shown = state["batch"] >= (len(self.loader) if self._loaded else 1)
        if shown and not self._told:
            self.loader.set_epoch(state["epoch"] + 1)
        self._told = self._loaded = False
        # begun at once, so that the loader works ahead and a later set_epoch does not reach this pass
        return self._handed(iter(self.loader), self.loader.epoch)

    def _handed(self, batches: Iteration, epoch: int) -> Iterator[Handed]:
        with closing(batches):
            for batch in batches:
                self._tell_failed(batch)
                yield self.collate(batch, epoch)

    def _tell_failed(self, batch: Batch) -> None:
        """Warn of each sample that does not decode, once: what is handed over has no place for them."""
        for sample in batch.failed:
            if sample not in self._failed:
                self._failed.add(sample)
                warnings.warn(
                    f"{self.loader.samples.path}: sample {sample} does not decode; the next good one stands in",
                    stacklevel=3,
                )


class EpochAdapter(Adapter[Handed]):
    """An adapter whose passes are epochs."""

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Handed]:
        return self._pass()


def _channels(values: tuple[float, ...], name: str) -> Float[Tensor, "1 3 1 1"]:
    """A number of each channel, for pixels from 0 to 255; whatever the program's defaults are."""
    if len(values) != 3:
        raise UserError(f"{name} is {values}: give one number for each of the three channels")
    channels = torch.tensor([255 * value for value in values], dtype=torch.float32, device="cpu").view(1, 3, 1, 1)
    if not channels.isfinite().all():
        raise UserError(f"{name} is {values}: give numbers that float32 holds")
    return channels
