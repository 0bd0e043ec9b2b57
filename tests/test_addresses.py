"""Every command takes an address wherever it takes a path: of images, runs, weights, and of what it writes."""

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from fastpmae import embed_images, export_encoder, load_encoder, pretrain, write_set
from fastpmae.run.stored_run import local_copy
from fastpmae_loaders.stores.address import Address, parse_address
from fastpmae_loaders.stores.client import Store
from tests.made import module_of, tiny_settings, write_tree
from tests.stores import BUCKET, Server, put_folder, told, unlisted_server

Command = Callable[..., tuple[object, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process: its status, and what it says."""

    def run(name: str, *words: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", [f"fastpmae-{name}", *map(str, words)])
        try:
            status = import_module(module_of(name)).main()
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


@pytest.fixture(scope="module")
def stored(s3: Server, small_beton: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Address, Path]:
    """A folder of the server's with a .beton, a set, and a run of two steps; and this machine's folder of the same."""
    here, there = tmp_path_factory.mktemp("here"), parse_address(f"s3://{BUCKET}/addresses")
    with told(s3), pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(here / "caches"))
        (here / "data").mkdir()
        write_set(write_tree(here / "tree", 24), here / "data" / "set", 3, workers=1)
        (here / "data" / "small.beton").write_bytes(small_beton.read_bytes())
        put_folder(here / "data", there)
        config = tiny_settings(small_beton).using(epochs=1, steps=2, save_steps=1)
        run = pretrain(config.using(out=str(there / "run"), beton=str(there / "small.beton")))
        run.rename(here / "run")
    return there, here


@pytest.fixture
def there(stored: tuple[Address, Path], place: Address) -> Address:
    """Its address, within a test whose environment names the server and whose caches are its own."""
    return stored[0]


def files(address: Address) -> set[str]:
    return {key.removeprefix(address.key + "/") for key, _ in Store(address).files(address.key)}


def read(address: Address) -> bytes:
    return bytes(Store(address).read(address.key))


def test_knn_of_a_run_on_a_set_puts_its_result_beside_the_checkpoints(command, there):
    status, said = command("eval", "knn", there / "run", "--train", there / "set", "--k", 3, "--workers", 1)
    assert status == 0, said
    assert f"wrote {there}/run/eval/knn-student.json" in said
    assert {f"eval/knn-student{ending}" for ending in (".json", "-classes.csv", "-confusion.png")} <= files(
        there / "run"
    )
    result = json.loads(read(there / "run" / "eval" / "knn-student.json"))
    assert result["train"]["path"] == str(there / "set")
    assert result["source"] == f"demo, {there}/run/checkpoints/step-00000002.safetensors"
    # of other images another file, by those that are there
    status, said = command("eval", "knn", there / "run", "--train", there / "small.beton", "--k", 3)
    assert status == 0, said
    assert f"wrote {there}/run/eval/knn-student-addresses-small.json" in said


def test_linear_on_two_sources_from_a_named_checkpoint(command, there, tmp_path):
    named = there / "run" / "checkpoints" / "step-00000001.safetensors"
    both = f"{there}/set {tmp_path}/small.beton"
    (tmp_path / "small.beton").write_bytes(read(there / "small.beton"))
    words = ("--val", there / "set", "--epochs", 2, "--choose-on", "val", "--out", tmp_path / "out")
    status, said = command("eval", "linear", named, "--train", both, *words)
    assert status == 0, said
    result = json.loads((tmp_path / "out" / "linear-sgd-student.json").read_text())
    assert result["train"]["images"] == 24 + 44
    assert result["val"]["path"] == str(there / "set")


@pytest.mark.slow
def test_a_fine_tuning_at_an_address_is_resumed_from_there(command, there):
    words = ("--train", there / "set", "--val", there / "set", "--preset", "small", "--epochs", 2, "--batch-size", 8)
    words += ("--aa", "", "--workers", 1, "--warmup-epochs", 0, "--no-tensorboard")
    out = there / "tuned"
    status, said = command("eval", "finetune", there / "run", *words, "--out", out, "--steps", 3)
    assert status == 0, said
    assert "checkpoints/step-00000003.whole" in files(out)
    os.environ["XDG_CACHE_HOME"] += "-of-another-machine"
    status, said = command("eval", "finetune", there / "run", *words, "--out", out)
    assert status == 2
    assert f"{out} already holds a run: add --resume" in said
    status, said = command("eval", "finetune", there / "run", *words, "--out", out, "--resume")
    assert status == 0, said
    assert {"classifier.safetensors", "finetune-student.json", "metrics.jsonl"} <= files(out)
    assert json.loads(read(out / "metrics.jsonl").splitlines()[-1])["step"] == 6
    status, said = command("export", out, there / "tuned.safetensors")
    assert status == 0, said


def test_embed(command, there, stored, tmp_path):
    rows, labels = embed_images(stored[1] / "run", stored[1] / "data" / "set")
    status, said = command("embed", there / "run", there / "set", there / "rows.npz")
    assert status == 0, said
    assert f"{there}/rows.npz: 24 features" in said
    (tmp_path / "rows.npz").write_bytes(read(there / "rows.npz"))
    with np.load(tmp_path / "rows.npz") as found:
        assert np.array_equal(found["features"], rows)
        assert np.array_equal(found["labels"], labels)
    status, said = command("embed", there / "run", there / "set", there / "rows.npz")
    assert status == 2
    assert f"{there}/rows.npz exists already; --force replaces it" in said
    # each image of several once, in their order
    small = stored[1] / "data" / "small.beton"
    both = embed_images(str(there / "run"), (f"{there}/set:0.1", f"{small}:0.9"))[0]
    assert np.array_equal(both, np.concatenate([rows, embed_images(stored[1] / "run", small)[0]]))


def test_views_of_sets_mixtures_and_runs(command, there, stored, tmp_path):
    status, said = command("view", there / "set", there / "views.png", "--samples", 1, "--image-size", 32)
    assert status == 0, said
    assert f"wrote {there}/views.png" in said
    assert read(there / "views.png").startswith(b"\x89PNG")
    small = f"{there}/small.beton:0.5 {stored[1]}/data/set:0.5"
    status, said = command("view", small, tmp_path / "both.png", "--samples", 2, "--image-size", 32)
    assert status == 0, said
    status, said = command("view", there / "set", tmp_path / "learnt.png", "--run", there / "run", "--samples", 2)
    assert status == 0, said
    assert (tmp_path / "learnt.png").stat().st_size > 1000


def test_report(command, there):
    status, said = command("report", there / "run", "--samples", 1)
    assert status == 0, said
    assert f"wrote {there}/run/report.html" in said
    page = read(there / "run" / "report.html").decode()
    assert "What was learnt of a few images" in page
    status, said = command("report", there / "run", "--samples", 1, "--out", there / "other.html")
    assert status == 0, said
    status, said = command("report", there / "run", "--out", there / "other.html")
    assert status == 2
    assert "other.html exists already" in said
    status, said = command("report", there / "set")
    assert status == 2
    assert f"{there}/set" in said


def test_export_to_a_file_and_a_folder(command, there, stored, tmp_path):
    status, said = command("export", there / "run", there / "encoder.safetensors")
    assert status == 0, said
    export_encoder(stored[1] / "run", tmp_path / "encoder.safetensors")
    assert read(there / "encoder.safetensors") == (tmp_path / "encoder.safetensors").read_bytes()
    status, said = command("export", there / "run", there / "exported")
    assert status == 0, said
    assert files(there / "exported") == {"README.md", "config.json", "model.safetensors"}
    assert local_copy(there / "exported").is_dir()
    # and from there, as anybody's weights
    encoder, _ = load_encoder(str(there / "run"))
    found = pretrained(stored[1], there / "exported")
    assert all(found[name].equal(tensor) for name, tensor in encoder.state_dict().items())


def pretrained(here: Path, init: Address) -> dict:
    """The student's encoder of a run that begins with weights and makes no step."""
    config = tiny_settings(here / "data" / "small.beton").using(epochs=1, steps=1, blr=0.0)
    run = pretrain(config.using(init=str(init), out=here / f"from-{init.name}", weight_decay=0.0))
    return load_encoder(run)[0].state_dict()


@pytest.mark.untyped
def test_plan_and_settings_of_a_run(command, there):
    words = ("--config", there / "run" / "config.json", "--loader-rate", 100, "--json", there / "plan.json")
    status, said = command("plan", *words)
    assert status == 0, said
    plan = json.loads(read(there / "plan.json"))
    assert plan["config"]["data"]["beton"] == [f"{there}/small.beton"]


def test_evaluation_during_training(there, small_beton, tmp_path):
    config = tiny_settings(small_beton).using(epochs=1, steps=5, eval_every=1, out=tmp_path / "run")
    run = pretrain(config.using(eval_train=str(there / "small.beton"), eval_val=str(there / "set")))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("knn_student" in row for row in rows)


def test_a_run_goes_on_from_a_named_step(command, there, stored, small_beton):
    named = there / "run" / "checkpoints" / "step-00000001.safetensors"
    status, said = command("train", "--resume", named, "--steps", 3)
    assert status == 0, said
    steps = sorted(name for name in files(there / "run") if name.endswith((".whole", ".past")))
    assert "checkpoints/step-00000003.whole" in steps
    last = local_copy(there / "run" / "checkpoints" / "step-00000003.safetensors")
    whole = pretrain(
        tiny_settings(small_beton).using(epochs=1, steps=3, out=stored[1] / "whole", beton=str(there / "small.beton"))
    )
    ours, theirs = (load_encoder(path)[0].state_dict() for path in (last, whole))
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())


def test_what_a_user_sees_of_an_address_that_cannot_be_read(command, there, stored, tmp_path, monkeypatch):
    run, images = there / "run", there / "set"
    for words, sentence in (
        (("eval", "knn", run, "--train", there / "nothing"), f"{there}/nothing/index.json does not exist"),
        (("eval", "knn", there / "nothing", "--train", images), f"{there}/nothing does not exist"),
        (("eval", "knn", "ftp://h/x", "--train", images), "ftp:// is not supported"),
        (("eval", "segment", run, "--train", images), "name a file or folder of this machine"),
        (("embed", run, images, "https://example.org/x.npz"), "https:// can only be read from"),
        (("train", "--resume", run / "checkpoints" / "step-00000009.safetensors"), "is no whole checkpoint; there are"),
        (("view", images, there / "views.jpg"), "must end in .png"),
    ):
        status, said = command(*words)
        assert status == 2, said
        assert sentence in said
        assert "Traceback" not in said
    # whose bucket may be read and not written
    with unlisted_server(stored[1]) as environment, told(environment):
        weights = "s3://run/checkpoints/step-00000002.safetensors"
        status, said = command("eval", "knn", weights, "--train", "s3://data/set", "--k", 3)
        assert status == 2
        assert "name another folder with --out" in said
        status, said = command("eval", "knn", weights, "--train", "s3://data/set", "--k", 3, "--out", tmp_path / "o")
        assert status == 0, said


@pytest.mark.slow
def test_a_run_in_shards_is_taken_there_and_goes_on(there, stored, small_beton):
    config = tiny_settings(small_beton).using(epochs=1, sharded_checkpoints=True, out=str(there / "sharded"))
    run = pretrain(config.using(steps=1))
    assert "checkpoints/step-00000001.shards.whole" in files(there / "sharded")
    run.rename(stored[1] / "sharded")
    again = pretrain(config.using(steps=3, resume="auto"))
    whole = pretrain(config.using(steps=3, out=stored[1] / "in-one-go", upload=None))
    ours, theirs = (load_encoder(path)[0].state_dict() for path in (again, whole))
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())
    assert "checkpoints/step-00000003.shards.whole" in files(there / "sharded")
