"""The loader as a `LightningDataModule`: made for the trainer's ranks, its position in the trainer's checkpoints."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from fastpmae_loaders.adapters.base import EpochAdapter
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.values import checked

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""Where Lightning may be installed from; one that is imported already is taken before the other."""

MakeLoader = Callable[[int, int], EpochAdapter[Any]]
"""Takes a rank and the number of ranks."""


@checked
def lightning_data_module(train: MakeLoader, val: MakeLoader | None = None) -> Any:
    """A `LightningDataModule` whose loaders are adapters:

        def train(rank, world_size):
            loader = PairedViews("images.beton", 64, views=views, rank=rank, world_size=world_size)
            return LightlyLoader(loader)

        trainer.fit(model, datamodule=lightning_data_module(train))

    Each loader is made when the trainer asks for it, with the trainer's ranks. The module's state is the training
    loader's position: a checkpoint within an epoch, by Lightning's own `ModelCheckpoint`, is resumed at the next batch,
    with the views that an uninterrupted run would have shown, also on another number of ranks.

    A fit without a checkpoint begins at the first epoch, whatever the module was used for before.

    Args:
        train: makes the training loader of a rank; the batch size is that of one rank.
        val: likewise for validation, which begins anew each time.

    Raises:
        UserError: where neither `lightning` nor `pytorch_lightning` is installed.
    """
    base: Any = _lightning().LightningDataModule

    class FastpmaeDataModule(base):
        def __init__(self) -> None:
            super().__init__()
            self.loader: EpochAdapter[Any] | None = None
            self._asked: dict[str, int] = {}  # by `load_state_dict`, for the fit that comes
            self._left: dict[str, int] = {}  # where the last fit ended, for `state_dict` alone
            if val is not None:  # Lightning takes a method that is there for a loader that is there
                make: MakeLoader = val
                self.val_dataloader = lambda: make(self.trainer.global_rank, self.trainer.world_size)

        def train_dataloader(self) -> EpochAdapter[Any]:
            self.loader = train(self.trainer.global_rank, self.trainer.world_size)
            if self._asked:
                self.loader.load_state_dict(self._asked)
            return self.loader

        def state_dict(self) -> dict[str, int]:
            return (self._asked or self._left) if self.loader is None else self.loader.state_dict()

        def load_state_dict(self, state_dict: dict[str, int]) -> None:
            self._asked = dict(state_dict)

        def teardown(self, stage: str) -> None:
            if stage == "fit" and self.loader is not None:
                self._asked, self._left = {}, self.loader.state_dict()
                self.loader.close()
                self.loader = None

    FastpmaeDataModule.__qualname__ = "FastpmaeDataModule"  # its key in a checkpoint
    return FastpmaeDataModule()


def _lightning() -> Any:
    for name in sorted(PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UserError("a data module is Lightning's, which is not installed: pip install lightning")
