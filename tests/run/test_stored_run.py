"""A run in a store: its whole checkpoints in either form, which of them a start goes on from, and copies to read."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from fastpmae import PRESETS, UserError
from fastpmae.run.checkpoint import checkpoint_path, find_checkpoint, read_checkpoint, write_checkpoint
from fastpmae.run.shards import write_shards
from fastpmae.run.stored_run import (
    bring_back,
    brought_here,
    local_copy,
    local_folder,
    marker_of,
    resumed_from,
    whole_checkpoints,
)
from fastpmae.run.uploads import Uploads
from fastpmae_loaders.stores import copies
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.stores.cache import CacheSettings
from fastpmae_loaders.stores.client import Missing, Store
from tests.run.test_checkpoint_writer import made, progress
from tests.stores import put_folder


def write(folder: Path, step: int, *, sharded: bool = False, value: float = 0.0) -> Path:
    """A checkpoint of made tensors."""
    path = checkpoint_path(folder, step, sharded=sharded)
    tensors = {name: tensor.contiguous() for name, tensor in made().items()} | {"value": torch.tensor(value)}
    if sharded:
        write_shards(path, tensors, progress(step), None)
    else:
        write_checkpoint(path, tensors, progress(step), 9)
    return path


def value_of(path: Path) -> float:
    return float(read_checkpoint(path).tensors["value"])


def take(path: Path, place: Address, keep: int = 9) -> Uploads:
    with Uploads(Store(place), place, path.parent.parent, keep) as uploads:
        uploads.checkpoint(path)
        uploads.finish()
    return Uploads(Store(place), place, path.parent.parent, keep)


def names(place: Address) -> list[str]:
    return [stored.name for stored in whole_checkpoints(Store(place), place)]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_goes_to_a_store_and_comes_back(place, tmp_path, sharded):
    path = write(tmp_path / "run", 4, sharded=sharded)
    take(write(tmp_path / "run", 2, sharded=sharded), place)
    take(path, place)
    older = f"step-00000002{path.suffix}"
    assert names(place) == [path.name, older]
    bring_back(place, tmp_path / "other")
    back = tmp_path / "other" / "checkpoints" / path.name
    assert [each.name for each in back.parent.iterdir()] == [path.name]
    assert all(read_checkpoint(back).tensors[name].equal(tensor) for name, tensor in made().items())
    bring_back(place, tmp_path / "other", older)
    assert find_checkpoint(back.parent / older).progress["step"] == 2
    # with --keep 0 the older goes
    take(path, place, keep=0)
    assert names(place) == [path.name]
    assert not [key for key, _ in Store(place).files(f"{place.key}/checkpoints") if "00000002" in key]


def test_what_is_refused_leaves_no_folder(place, tmp_path):
    name = checkpoint_path(tmp_path, 1).name
    for address, wanted in ((Address("s3", "no-such-bucket", "run"), None), (place / "none", name)):
        with pytest.raises(UserError):
            bring_back(address, tmp_path / "run", wanted)
    bring_back(place / "none", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shards_without_their_marker_or_in_part_are_no_checkpoint(place, tmp_path):
    path = write(tmp_path / "run", 4, sharded=True)
    put_folder(path, place / "checkpoints" / path.name)
    assert names(place) == []
    store = Store(place)
    store.put(f"{place.key}/checkpoints/step-00000004.shards.whole", marker_of(path))
    assert names(place) == [path.name]
    store.delete(f"{place.key}/checkpoints/{path.name}/checkpoint.json")
    with pytest.raises(UserError, match=r"step-00000004\.shards is not what its marker says"):
        bring_back(place, tmp_path / "other")


def test_what_is_here_and_is_another_run_of_the_same_steps_comes_anew(place, tmp_path):
    """Another machine has gone on from an earlier step: the files have the same size."""
    take(write(tmp_path / "theirs", 4, value=1.0), place)
    ours = write(tmp_path / "ours", 4, value=2.0)
    bring_back(place, tmp_path / "ours")
    assert value_of(ours) == 1.0
    before = ours.stat().st_mtime_ns
    bring_back(place, tmp_path / "ours")
    assert ours.stat().st_mtime_ns == before, "it is there by now"


def test_checkpoints_past_the_one_that_a_run_goes_on_from_count_no_more(place, tmp_path):
    for step in (2, 4):
        uploads = take(write(tmp_path / "run", step), place)
    uploads.leave_past(2)
    assert names(place) == ["step-00000002.safetensors"]
    marks = [key.rpartition("/")[2] for key, _ in Store(place).files(place.key)]
    assert "step-00000004.past" in marks
    assert "step-00000004.safetensors" in marks
    take(write(tmp_path / "run", 4, value=3.0), place)
    assert names(place) == ["step-00000004.safetensors", "step-00000002.safetensors"]
    assert not [key for key, _ in Store(place).files(place.key) if key.endswith(".past")]


def test_a_start_goes_on_from_a_named_checkpoint_of_a_store(place, tmp_path):
    for step in (2, 4):
        take(write(tmp_path / "run", step), place)
    named = str(place / "checkpoints" / "step-00000002.safetensors")
    settings = CacheSettings(tmp_path / "cache")
    config = PRESETS["demo"].using(cache=settings.folder, resume=named)
    assert config.run.upload == str(place)
    folder = local_folder(place, settings)
    assert resumed_from(config) == folder / "checkpoints" / "step-00000002.safetensors"
    # into a run of its own: neither folder nor store of the other is touched
    apart = resumed_from(config.using(out=tmp_path / "new", upload=None))
    assert apart is not None
    assert apart.name == "step-00000002.safetensors"
    assert not apart.is_relative_to(folder)
    # the run itself is its newest
    assert resumed_from(PRESETS["demo"].using(cache=settings.folder, resume=str(place))) == folder
    assert find_checkpoint(folder).progress["step"] == 4
    missing = PRESETS["demo"].using(resume=str(place / "checkpoints" / "step-00000003.safetensors"))
    with pytest.raises(UserError, match=r"step-00000003.safetensors is no whole checkpoint; there are step-00000004"):
        resumed_from(missing)


def test_a_copy_of_a_run_has_the_newest_checkpoint_the_log_and_the_results(place, tmp_path):
    folder = tmp_path / "run"
    for step in (2, 4):
        take(write(folder, step), place)
    (folder / "eval").mkdir()
    (folder / "eval" / "knn.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "huge.bin").write_bytes(b"x")
    for name in ("eval/knn.json", "metrics.jsonl", "huge.bin"):
        Store(place).put(f"{place.key}/{name}", folder / name)
    copy = local_copy(place)
    found = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file() and path.name[0] != "."}
    assert found == {"checkpoints/step-00000004.safetensors", "eval/knn.json", "metrics.jsonl"}
    assert local_copy(str(copy)) == copy, "a path is itself"
    # what the store has by now comes, and what it has not goes
    take(write(folder, 6), place)
    Store(place).put(f"{place.key}/metrics.jsonl", b"{}\n{}\n")
    Store(place).delete(f"{place.key}/eval/knn.json")
    assert local_copy(place) == copy
    found = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file() and path.name[0] != "."}
    assert found == {"checkpoints/step-00000006.safetensors", "metrics.jsonl"}
    assert (copy / "metrics.jsonl").read_text() == "{}\n{}\n"
    one = local_copy(place / "checkpoints" / "step-00000002.safetensors")
    assert one.parent.parent != copy
    assert find_checkpoint(one).progress["step"] == 2


def test_a_file_of_weights_and_what_is_none(place, tmp_path):
    store = Store(place)
    data = os.urandom(40 << 20)
    store.put(f"{place.key}/mae.pth", data)
    store.put(f"{place.key}/photos/1.jpg", b"x")
    assert local_copy(place / "mae.pth").read_bytes() == data
    for address, words in (
        (place / "nothing.pth", "nothing.pth does not exist"),
        (place / "nothing", "nothing does not exist"),
        (place / "photos", "holds neither a whole checkpoint of a run nor exported weights"),
    ):
        with pytest.raises(UserError, match=words):
            local_copy(address)
    with pytest.raises(UserError) as error, brought_here(place / "mae.pth") as here:
        raise UserError(f"{here} is damaged")
    assert str(error.value) == f"{place}/mae.pth is damaged"
    with pytest.raises(Missing), brought_here(place / "nothing.pth"):
        pass


def test_copies_that_nobody_uses_make_room(place, tmp_path, monkeypatch):
    store = Store(place)
    for number in range(3):
        store.put(f"{place.key}/{number}.pth", bytes(1000))
    monkeypatch.setattr(copies, "bytes_of", lambda size: 2500)
    first, second = (local_copy(place / f"{number}.pth") for number in range(2))
    os.utime(first.parent / ".used", (1, 1))
    third = local_copy(place / "2.pth")
    assert first.exists(), "this process uses it"
    # as after its end
    os.close(copies._kept.pop(first.parent))
    os.utime(second.parent / ".used", (2, 2))
    local_copy(place / "2.pth")
    assert not first.parent.exists()
    assert second.exists()
    assert third.exists()
    assert json.loads((third.parent / ".versions.json").read_text())["2.pth"][1] == 1000
    shutil.rmtree(tmp_path / "caches")
    assert local_copy(place / "1.pth").exists(), "also when somebody has cleared the caches away"
