"""Machines that share no disk are one run: what one of them has written the others do not look for on their own."""

from pathlib import Path
from typing import Any

import pytest

from fastpmae import Config, pretrain
from fastpmae.run.stored_run import whole_checkpoints
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.stores.client import Store
from tests.distributed.test_several_ranks import LOSSES, assert_same_weights, run_forked, settings
from tests.test_train import rows_of


def on_machines(config: Config, folder: Path, *scenarios: dict[str, Any]) -> tuple[list[list[int]], str]:
    """How the ranks of each scenario have ended, each on a machine of its own, and what they said."""
    return run_forked(config, folder, [{"name": "run", "ranks": 2, "apart": True} | scenario for scenario in scenarios])


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_what_follows_pixels_begins_alike_on_every_machine(small_beton: Path, tmp_path: Path, shard: bool):
    config = settings(small_beton).using(epochs=2, pixel_epochs=1, shard=shard)
    ended, said = on_machines(config, tmp_path, {"settings": {}})
    assert ended == [[0, 0]], said
    alone, together = pretrain(config.using(shard=False, out=tmp_path / "alone")), tmp_path / "machine-0" / "run"
    for one, other in zip(rows_of(alone), rows_of(together), strict=True):
        for figure in (name for name in LOSSES if name in one):
            assert one[figure] == pytest.approx(other[figure], rel=1e-5), figure
    assert_same_weights(alone, together, 10)


@pytest.mark.slow
def test_a_checkpoint_that_is_not_in_the_store_yet_goes_there_and_to_every_machine(
    small_beton: Path, tmp_path: Path, place: Address
):
    config = settings(small_beton).using(out="run", upload=str(place), save_steps=2, keep=9)
    first, said = on_machines(config, tmp_path, {"settings": {"steps": 4}})
    assert first == [[0, 0]], said
    # as a run leaves it that is killed between writing a checkpoint and the end of taking it there
    Store(place).delete(f"{place.key}/checkpoints/step-00000004.whole")
    second, said = on_machines(config, tmp_path, {"settings": {"steps": 6, "resume": "auto"}})
    assert second == [[0, 0]], said
    assert [stored.step for stored in whole_checkpoints(Store(place), place)] == [6, 4, 2]
    assert (tmp_path / "machine-1" / "run" / "checkpoints" / "step-00000004.safetensors").exists()
    rows = rows_of(tmp_path / "machine-0" / "run")
    alone = rows_of(pretrain(config.using(steps=6, out=tmp_path / "alone", upload=None)))
    for one, other in zip(alone, rows, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_that_one_machine_alone_has_is_told_once(small_beton: Path, tmp_path: Path):
    config = settings(small_beton)
    ended, said = on_machines(config, tmp_path, {"settings": {"steps": 1}}, {"settings": {"resume": "auto"}})
    assert ended == [[0, 0], [2, 2]], said
    assert said.count("the first machine goes on from run/checkpoints/step-00000001.safetensors, which another") == 1


@pytest.mark.slow
def test_shards_that_would_lie_on_several_disks_are_refused(small_beton: Path, tmp_path: Path):
    ended, said = on_machines(
        settings(small_beton).using(sharded_checkpoints=True), tmp_path, {"settings": {"steps": 1}}
    )
    assert ended == [[2, 2]], said
    assert said.count("--sharded-checkpoints: run is another folder on each machine") == 1
    assert not list(tmp_path.glob("machine-*/run")), "what is refused leaves no folder"
