"""What a torch `DataLoader` has beside its batches, as an adapter shows it: data set, sampler, batch sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from fastpmae_loaders.paired import PairedViews


@runtime_checkable
class LoaderAdapter(Protocol):
    """What an adapter's parts use of it."""

    loader: PairedViews

    @property
    def batch_size(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...


class Epochs:
    """What a codebase calls `set_epoch` on, its data set or its sampler, with the real one's length."""

    def __init__(self, adapter: LoaderAdapter, count: int) -> None:
        self._adapter = adapter
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        loader = self._adapter.loader
        return f"{type(self).__name__} of {self._count} from {loader.samples.path}, {loader.count} images"

    def set_epoch(self, epoch: int) -> None:
        """Show that epoch's views, in that epoch's order."""
        self._adapter.set_epoch(epoch)


class BatchSampler(Epochs):
    """Lists of this rank's samples in the loader's epoch, batch by batch."""

    def __init__(self, adapter: LoaderAdapter) -> None:
        super().__init__(adapter, len(adapter.loader))
        self.batch_size = adapter.loader.batch_size
        self.drop_last = adapter.loader.drop_last

    @property
    def sampler(self) -> Sampler:
        """The samples that the batches are made of."""
        return Sampler(self._adapter)

    def __iter__(self) -> Iterator[list[int]]:
        loader = self._adapter.loader
        for number in range(len(loader)):
            yield loader.samples_of(number).tolist()


class Sampler(Epochs):
    """This rank's samples in the loader's epoch, in their order."""

    def __init__(self, adapter: LoaderAdapter) -> None:
        last = adapter.loader.share(len(adapter.loader) - 1)
        super().__init__(adapter, (len(adapter.loader) - 1) * adapter.batch_size + last.stop - last.start)

    def __iter__(self) -> Iterator[int]:
        for batch in BatchSampler(self._adapter):
            yield from batch


def as_it_is(batch: Any) -> Any:
    """A batch that needs no collating. (torch's own function for this makes lists of tuples.)"""
    return batch
