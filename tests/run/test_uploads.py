"""A run whose folder is an address: its checkpoints and log in the store, resumed from there, and what is refused."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from fastpmae import Config, pretrain
from fastpmae.run import uploads
from fastpmae.run.checkpoint import read_checkpoint, write_checkpoint
from fastpmae.run.stored_run import Stored, bring_back, whole_checkpoints
from fastpmae_loaders.errors import RunError, UserError
from fastpmae_loaders.stores import client
from fastpmae_loaders.stores.address import Address, parse_address
from fastpmae_loaders.stores.client import Store
from tests.made import REPOSITORY
from tests.run.test_checkpoint_writer import made, progress
from tests.stores import BUCKET, faulty_server, s3_server, told
from tests.test_train import flags_of


def names(place: Address) -> list[str]:
    store = Store(place)
    return [key.removeprefix(place.key + "/") for key, _ in store.files(place.key)]


def lines(config: Config) -> list[str]:
    """The command line of these settings, without where the run lies."""
    return flags_of(config.using(out=None))


@pytest.fixture
def short(tiny: Config) -> Config:
    return tiny.using(out=None, epochs=1, save_steps=2, keep=1, pixel_epochs=0)


@pytest.mark.slow
def test_a_run_at_an_address_is_there_and_goes_on_on_another_machine(short, place, tmp_path):
    whole = pretrain(short.using(out=tmp_path / "whole"))
    first = pretrain(short.using(out=str(place), steps=2))
    assert "config.json" in names(place)
    assert {"checkpoints/step-00000002.safetensors", "checkpoints/step-00000002.whole"} <= set(names(place))
    with pytest.raises(UserError, match=f"{place} already holds a run: add --resume"):
        pretrain(short.using(out=str(place)))
    # another machine has none of it
    shutil.rmtree(first)
    second = pretrain(short.using(out=str(place), resume="auto"))
    assert second == first
    ours, theirs = (read_checkpoint(folder / "checkpoints" / "step-00000005.safetensors") for folder in (second, whole))
    assert all(ours.tensors[name].equal(tensor) for name, tensor in theirs.tensors.items())
    assert (second / "metrics.jsonl").read_text().count("\n") == (whole / "metrics.jsonl").read_text().count("\n")
    # the newest, and --keep of the older ones
    steps = sorted(name for name in names(place) if name.endswith(".whole"))
    assert steps == ["checkpoints/step-00000004.whole", "checkpoints/step-00000005.whole"]


def test_what_is_not_whole_is_no_checkpoint(place):
    store = Store(place)
    for name in ("2.safetensors", "2.whole", "4.safetensors", "6.whole"):
        store.put(f"{place.key}/checkpoints/step-0000000{name}", b"x")
    assert whole_checkpoints(store, place) == [Stored("step-00000002.safetensors", {"step-00000002.safetensors": 1})]


def test_a_marker_that_says_another_size_is_refused(place, tmp_path):
    store = Store(place)
    store.put(f"{place.key}/checkpoints/step-00000002.safetensors", b"x")
    store.put(f"{place.key}/checkpoints/step-00000002.whole", b'{"bytes": 3}')
    with pytest.raises(UserError, match="not what its marker says"):
        bring_back(place, tmp_path / "run")


def test_a_bucket_that_cannot_be_written_is_refused_at_once(short, place, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(UserError, match="refuses these credentials"):
        pretrain(short.using(out=str(place)))
    with pytest.raises(UserError, match="can only be read from"):
        pretrain(short.using(out="https://example.org/run"))
    monkeypatch.setattr(client, "FIRST_TRY", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"cannot be (reached|connected to)"):
        pretrain(short.using(out=str(place)))


def test_a_store_that_goes_away_leaves_a_whole_run_here(tmp_path, short):
    with s3_server(tmp_path / "s3") as server, told(server):
        os.environ["XDG_CACHE_HOME"] = str(tmp_path / "caches")
        address = parse_address(f"s3://{BUCKET}/run")
        store = Store(address)
        store.deadline = 1.0
        path = tmp_path / "run" / "checkpoints" / "step-00000002.safetensors"
        write_checkpoint(path, made(), progress(2), 1)
        with uploads.Uploads(store, address, tmp_path / "run", 1) as taken:
            server.kill()
            taken.checkpoint(path)
            with pytest.raises(RunError, match=r"the run is whole in .*, and could not be taken to s3://bucket/run"):
                taken.finish()
            with pytest.raises(UserError, match="the newest checkpoint could not be taken to s3://bucket/run"):
                taken.is_done(1.0)
            assert any("could not be taken" in sentence for sentence in taken.remarks())
            server.start()
            store.deadline = 60.0
            taken.checkpoint(path)
            taken.finish()
        assert [stored.step for stored in whole_checkpoints(Store(address), address)] == [2]


@pytest.mark.slow
def test_a_signal_takes_the_last_checkpoint_there_and_the_command_goes_on_from_it(short, place, tmp_path):
    command = [sys.executable, "-m", "fastpmae.train", *lines(short.using(epochs=400, save_steps=0))]
    command += ["--out", str(place)]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step "):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert f"--resume --out {place}" in said
    (stored,) = whole_checkpoints(Store(place), place)
    shutil.rmtree(tmp_path / "caches")
    again = [sys.executable, "-m", "fastpmae.train", "--resume", "--out", str(place), "--steps", str(stored.step + 1)]
    done = subprocess.run(again, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert whole_checkpoints(Store(place), place)[0].step == stored.step + 1


@pytest.mark.slow
def test_a_run_on_images_in_a_store_gives_the_local_bits(short, small_beton, tmp_path):
    """With 20 ms of latency and one request in a hundred refused; the server is killed and comes back in mid-epoch."""
    (tmp_path / "data" / BUCKET).mkdir(parents=True)
    shutil.copy(small_beton, tmp_path / "data" / BUCKET / "small.beton")
    local = pretrain(short.using(out=tmp_path / "local"))
    with faulty_server(tmp_path / "data", latency_ms=20, error_rate=0.01) as server, told(server):
        server.kill()
        threading.Timer(1.0, server.start).start()
        there = short.using(beton=f"s3://{BUCKET}/small.beton", cache=tmp_path / "cache", out=tmp_path / "there")
        assert there.data.beton == (f"s3://{BUCKET}/small.beton",)
        pretrain(there)
    assert there.run.out is not None
    name = "checkpoints/step-00000005.safetensors"
    ours, theirs = (read_checkpoint(folder / name) for folder in (there.run.out, local))
    assert ours.progress["fingerprint"] == theirs.progress["fingerprint"]
    assert all(ours.tensors[name].equal(tensor) for name, tensor in theirs.tensors.items())
