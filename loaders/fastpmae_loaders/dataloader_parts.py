"""What a torch `DataLoader` has beside its batches, as an adapter shows it: data set, sampler, batch sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.values import typed

if TYPE_CHECKING:
    from fastpmae_loaders.adapters import Adapter


class Epochs:
    """What a codebase calls `set_epoch` on, its data set or its sampler, with the real one's length."""

    def __init__(self, adapter: Adapter[Any], count: int) -> None:
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

    def __init__(self, adapter: Adapter[Any]) -> None:
        super().__init__(adapter, len(adapter.loader))
        self.batch_size = adapter.loader.batch_size
        self.drop_last = adapter.loader.drop_last

    @property
    def sampler(self) -> Sampler:
        """The samples that the batches are made of."""
        return Sampler(self._adapter)

    def __iter__(self) -> Iterator[list[int]]:
        loader = self._adapter.loader
        order = loader.order(loader.epoch)
        for number in range(len(loader)):
            yield order[loader.share(number)].tolist()


class Sampler(Epochs):
    """This rank's samples in the loader's epoch, in their order."""

    def __init__(self, adapter: Adapter[Any]) -> None:
        last = adapter.loader.share(len(adapter.loader) - 1)
        super().__init__(adapter, (len(adapter.loader) - 1) * adapter.batch_size + last.stop - last.start)

    def __iter__(self) -> Iterator[int]:
        for batch in BatchSampler(self._adapter):
            yield from batch


def as_it_is(batch: Any) -> Any:
    """A batch that needs no collating. (torch's own function for this makes lists of tuples.)"""
    return batch


class AdapterDataset(IterableDataset[Any]):
    """An adapter as a data set of whole batches, for code that insists on a `torch.utils.data.DataLoader`:

        data_loader = DataLoader(AdapterDataset(adapter), batch_size=None, collate_fn=adapter.collate_fn)

    Every pass is a pass of the adapter, and so are `set_epoch`, `state_dict` and `load_state_dict`. The DataLoader has
    no processes of its own (`num_workers=0`, its default): the loader's threads do the work. Ranks are the
    `PairedViews`' own, so that nothing else may share its batches out (accelerate: do not `prepare` it).

    Raises:
        UserError: for what is no adapter, and when it is iterated in a process of the DataLoader's.
    """

    def __init__(self, adapter: Adapter[Any]) -> None:
        from fastpmae_loaders.adapters import Adapter  # which needs this module

        super().__init__()
        adapter = typed(adapter, Adapter, "adapter")
        self.adapter = adapter
        self._batches: Any = adapter  # of which not every one has a length

    def __len__(self) -> int:
        """Batches an epoch, as a DataLoader with `batch_size=None` counts."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        if torch.utils.data.get_worker_info() is not None:
            raise UserError("the loader has threads of its own: give the DataLoader of its batches num_workers=0")
        return iter(self._batches)

    def set_epoch(self, epoch: int) -> None:
        """Show that epoch's views, in that epoch's order."""
        self.adapter.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """The loader's position."""
        return self.adapter.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position: the next pass continues there."""
        self.adapter.load_state_dict(state)
