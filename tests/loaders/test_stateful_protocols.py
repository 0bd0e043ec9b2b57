"""The loader in torchdata's StatefulDataLoader and in Lightning's data module: stopped within an epoch, it goes on."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastpmae_loaders import PairedViews, ViewSettings, mae_view
from fastpmae_loaders.adapters import AdapterDataset, EpochAdapter, MAELoader, lightning_data_module
from fastpmae_loaders.errors import UserError

BATCHES = 5
"""Of an epoch of the 23 images."""


def adapter(path: Path, rank: int = 0, ranks: int = 1) -> EpochAdapter[Any]:
    views, settings = [mae_view(32)], ViewSettings(image_size=32, patch_size=8, folds=3)
    return MAELoader(
        PairedViews(
            path, 4 // ranks, engine="torch", settings=settings, seed=11, workers=1, views=views, rank=rank,
            world_size=ranks,
        )
    )  # fmt: skip


def labels(batches: Any) -> list[list[int]]:
    return [batch[1].tolist() for batch in batches]


@pytest.mark.filterwarnings("ignore")  # torchdata's own
@pytest.mark.parametrize("done", [0, 2, BATCHES])
def test_torchdata_goes_on_within_an_epoch(done: int, mixed: Path):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def made() -> Any:
        batches = AdapterDataset(adapter(mixed))
        return stateful(batches, batch_size=None, collate_fn=batches.adapter.collate_fn)

    straight = adapter(mixed)
    epochs = [labels(straight) for _ in range(3)]
    first = made()
    batches = iter(first)
    assert labels(itertools.islice(batches, done)) == epochs[0][:done]
    state = first.state_dict()
    assert labels(batches) == epochs[0][done:]
    assert labels(first) == epochs[1]
    resumed = made()
    resumed.load_state_dict(state)
    if done < BATCHES:
        assert labels(resumed) == epochs[0][done:]
    else:
        assert labels(resumed) in ([], epochs[1]), "an epoch that is over is not shown again"
    last = next(pass_ for pass_ in iter(lambda: labels(resumed), None) if pass_)
    assert last in (epochs[1], epochs[2])


class Killed(Exception):
    pass


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("pytorch_lightning")


def model_of(lightning: Any, seen: list[list[int]], stop_after: int | None = None) -> Any:
    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch: Any, number: int) -> Any:
            if stop_after is not None and len(seen) == stop_after:
                raise Killed
            seen.append(batch[1].tolist())
            return self.layer(batch[0].mean((2, 3))).square().mean()

        def validation_step(self, batch: Any, number: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Model()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's own, of many kinds
@pytest.mark.parametrize("stop_after", [3, 5, 8])
def test_lightning_goes_on_within_an_epoch(lightning: Any, stop_after: int, mixed: Path, tmp_path: Path):
    def fit(seen: list[list[int]], stop: int | None = None, **named: Any) -> None:
        every = lightning.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, callbacks=[every], enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        module = lightning_data_module(lambda rank, ranks: adapter(mixed, rank, ranks), lambda *_: adapter(mixed))
        assert isinstance(module, lightning.LightningDataModule)
        trainer.fit(model_of(lightning, seen, stop), datamodule=module, **named)

    straight = adapter(mixed)
    expected = list(itertools.chain.from_iterable(labels(straight) for _ in range(3)))
    seen: list[list[int]] = []
    with pytest.raises(Killed):
        fit(seen, stop_after)
    assert seen == expected[:stop_after]
    fit(seen, ckpt_path=tmp_path / "last.ckpt")
    assert seen == expected


def test_a_second_fit_begins_anew_and_a_checkpoint_is_gone_to(monkeypatch: pytest.MonkeyPatch, mixed: Path):
    class Module:
        def __init__(self) -> None:
            pass

    stand_in = SimpleNamespace(LightningDataModule=Module)
    monkeypatch.setattr("fastpmae_loaders.adapters.lightning._lightning", lambda: stand_in)
    module = lightning_data_module(lambda rank, ranks: adapter(mixed, rank, ranks))
    module.trainer = SimpleNamespace(global_rank=0, world_size=1)

    def fit(steps: int, first_epoch: int = 0) -> list[list[int]]:
        """As Lightning does: each epoch is named before it."""
        loader, seen = module.train_dataloader(), []
        epochs = itertools.count(first_epoch)
        while len(seen) < steps:
            loader.set_epoch(next(epochs))
            seen += labels(itertools.islice(loader, steps - len(seen)))
        return seen

    straight = adapter(mixed)
    expected = list(itertools.chain.from_iterable(labels(straight) for _ in range(2)))
    assert fit(BATCHES + 2) == expected[: BATCHES + 2]
    module.teardown("fit")
    state = module.state_dict()
    assert (state["epoch"], state["batch"]) == (1, 2)
    assert fit(BATCHES) == expected[:BATCHES]
    module.teardown("fit")
    module.load_state_dict(state)
    assert module.state_dict() == state
    assert fit(BATCHES - 2, 1) == expected[BATCHES + 2 :]
    module.teardown("fit")
    assert fit(2) == expected[:2]


def test_without_lightning_a_sentence(monkeypatch: pytest.MonkeyPatch, mixed: Path):
    monkeypatch.setattr("fastpmae_loaders.adapters.lightning.PACKAGES", ("no_such_lightning",))
    with pytest.raises(UserError, match="not installed: pip install lightning"):
        lightning_data_module(lambda rank, ranks: adapter(mixed, rank, ranks))
