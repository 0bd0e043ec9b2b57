"""An adapter as a torch data set, for code that insists on a `torch.utils.data.DataLoader`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset

from fastpmae_loaders.adapters.base import Adapter
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.values import typed


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
