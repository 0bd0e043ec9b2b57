"""What commands write over: nothing unasked, never an input, never a file of a run."""

import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastpmae import Config, UserError, export_encoder, pretrain, read_config, write_beton
from fastpmae.demo.demo import write_demo_betons
from fastpmae.evaluate.backbone import find_backbone
from fastpmae.evaluate.datasets import open_labelled
from fastpmae.evaluate.finetune import train_classifier
from fastpmae.evaluate.finetune_state import Setting
from fastpmae.evaluate.recipe import FINETUNE_PRESETS
from fastpmae.evaluate.result_files import ResultFiles, free_files
from fastpmae.pictures.report import write_report
from fastpmae.pictures.view import draw_run, draw_views
from fastpmae.run.checkpoint import checkpoints_in, find_checkpoint
from fastpmae_loaders.cli.outputs import check_output
from fastpmae_loaders.files import atomic_write
from tests.made import module_of, tiny_settings, write_tree


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_beton: Path) -> Path:
    return pretrain(tiny_settings(small_beton).using(out=tmp_path_factory.mktemp("runs") / "run", steps=1))


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be harmed."""
    return shutil.copytree(run, tmp_path / "own")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_to_device(path: Path, force: bool) -> None:
    write_beton(path.parent / "images", path, force=force)


def test_force_replaces_what_is_no_input_and_no_runs(tmp_path: Path, own: Path):
    out, given = tmp_path / "out.bin", tmp_path / "given.bin"
    check_output(out)
    out.write_text("mine")
    given.write_text("given")
    with pytest.raises(UserError, match=r"out\.bin exists already; --force replaces it"):
        check_output(out)
    check_output(out, force=True, inputs=[given, tmp_path / "not-there"])
    (tmp_path / "link.bin").symlink_to(given)
    os.link(given, tmp_path / "twin.bin")
    for same in (given, tmp_path / "link.bin", tmp_path / "twin.bin"):
        with pytest.raises(UserError, match="is what this command reads"):
            check_output(same, force=True, inputs=[given])
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_text("an image")
    with pytest.raises(UserError, match="is what this command reads"):
        check_output(tmp_path / "images/a.png", force=True, inputs=[tmp_path / "images"])
    check_output(tmp_path / "images/new.png", inputs=[tmp_path / "images"])
    with pytest.raises(UserError, match="is a folder"):
        check_output(tmp_path / "images", force=True)
    os.mkfifo(tmp_path / "pipe.beton")
    for refuse in (check_output, write_to_device):
        with pytest.raises(UserError, match="is a device, a pipe or a socket; name a file to write"):
            refuse(tmp_path / "pipe.beton", force=True)
    with pytest.raises(UserError, match="is a device, a pipe or a socket"), atomic_write(tmp_path / "pipe.beton"):
        pass
    assert (tmp_path / "pipe.beton").is_fifo()
    with pytest.raises(UserError, match="there is no folder"):
        check_output(tmp_path / "none/out.bin")
    with pytest.raises(UserError, match=r"s3:// is not supported"):
        check_output(Path("s3://bucket/out.bin"))


@pytest.mark.parametrize(
    "name",
    ["config.json", "metrics.jsonl", "train.log", "machine.jsonl", ".lock", "report.html", "events.out.tfevents.1",
     "classifier.safetensors", "checkpoints/step-00000001.safetensors", "checkpoints/step-00000009.safetensors",
     "eval/knn-student.json"],
)  # fmt: skip
def test_a_runs_own_files(own: Path, tmp_path: Path, name: str):
    """Also those that are not there yet: what bears such a name would be taken for the run's."""
    (own / "eval").mkdir()
    (tmp_path / "link").symlink_to(own)
    for folder in (own, tmp_path / "link"):
        with pytest.raises(UserError, match="belongs to the run in"):
            check_output(folder / name, force=True)
    check_output(own / "features.npz")
    # a folder that is no run may hold files of any name
    (tmp_path / "plain/checkpoints").mkdir(parents=True)
    check_output(tmp_path / "plain" / Path(name).name)


@pytest.mark.slow
def test_an_export_leaves_the_run_and_others_files_alone(own: Path, tmp_path: Path):
    (checkpoint,), before = checkpoints_in(own), contents(own)
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("my own page\n")
    for out in (own, checkpoint, own / "checkpoints", own / "eval" / "x.safetensors"):
        for force in (False, True):
            with pytest.raises(UserError, match=r"belongs to the run|is a folder|there is no folder"):
                export_encoder(own, out, force=force)
    assert contents(own) == before
    with pytest.raises(UserError, match=r"README\.md exists already; --force"):
        export_encoder(own, project, force=False)
    assert contents(project) == {"README.md": b"my own page\n"}
    export_encoder(own, project, force=True)
    assert (project / "README.md").read_text().startswith("---\nlibrary_name: timm")
    with pytest.raises(UserError, match="exists already"):
        export_encoder(own, project, force=False)
    export_encoder(own, project)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be made"):
        export_encoder(own, tmp_path / "file", force=True)
    shutil.copy(checkpoint, tmp_path / "copy.safetensors")
    with pytest.raises(UserError, match="is what this command reads"):
        export_encoder(tmp_path / "copy.safetensors", tmp_path / "copy.safetensors", force=True)
    find_checkpoint(own)
    assert contents(own) == before


def test_an_export_that_fails_half_way_leaves_nothing(own: Path, tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastpmae.export.export.save_tensors", full)
    with pytest.raises(UserError, match="No space left"):
        export_encoder(own, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_report(own: Path, tmp_path: Path, small_beton: Path):
    write_report(own, samples=1)
    write_report(own, samples=1)  # its own page is renewed
    with pytest.raises(UserError, match="belongs to the run"):
        write_report(own, own / "config.json", force=True)
    out = tmp_path / "mine.html"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_report(own, out, force=False)
    assert out.read_text() == "mine"
    with pytest.raises(UserError, match="is what this command reads"):
        write_report(own, small_beton, force=True)
    write_report(own, out, force=True, samples=1)
    read_config(own / "config.json")


def test_pictures(own: Path, tmp_path: Path, small_beton: Path):
    images = write_tree(tmp_path / "images", 4)
    picture = images / "class_0" / "0009.png"
    Image.new("RGB", (60, 50)).save(picture)
    before = picture.read_bytes()
    with pytest.raises(UserError, match="is what this command reads"):
        draw_run(own, images, picture, force=True)
    out = tmp_path / "views.png"
    out.write_bytes(before)
    draws: list[Callable[..., object]] = [
        lambda **more: draw_views(small_beton, out, samples=1, engine="torch", **more),
        lambda **more: draw_run(own, small_beton, out, samples=1, **more),
    ]
    for draw in draws:
        with pytest.raises(UserError, match="exists already"):
            draw(force=False)
        assert out.read_bytes() == before
    draws[0]()
    assert out.read_bytes() != before


@pytest.mark.slow
def test_a_beton(own: Path, tmp_path: Path):
    tree = write_tree(tmp_path / "tree", 4)
    image = next(tree.rglob("*.jpg"))
    before = image.read_bytes()
    with pytest.raises(UserError, match="is a file of the source"):
        write_beton(tree, image, force=True)
    assert image.read_bytes() == before
    with pytest.raises(UserError, match="belongs to the run"):
        write_beton(tree, own / "config.json", force=True)
    (tmp_path / "a.beton.bad.txt").write_text("mine")
    with pytest.raises(UserError, match=r"a\.beton\.bad\.txt exists already"):
        write_beton(tree, tmp_path / "a.beton")
    assert (tmp_path / "a.beton.bad.txt").read_text() == "mine"
    for _ in range(2):
        write_beton(tree, tree / "inside.beton", force=True)  # no image: renewed


def test_embed_and_plan(own: Path, tmp_path: Path, small_beton: Path, monkeypatch, capsys):
    """As the commands do it: the sentence comes before any work."""

    def called(name: str, *words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", [name, *map(str, words)])
        return import_module(module_of(name)).main(), capsys.readouterr().err

    data = tmp_path / "d.beton"
    shutil.copy(small_beton, data)
    before = data.read_bytes()
    for more in ((), ("--force",)):
        status, said = called("embed", own, data, data, *more)
        assert status == 2, said
        assert "is what this command reads" in said
    assert data.read_bytes() == before
    out = tmp_path / "f.npz"
    out.write_text("mine")
    assert "exists already; --force replaces it" in called("embed", own, data, out)[1]
    assert out.read_text() == "mine"
    assert called("embed", own, data, out, "--force", "--workers", 1)[0] == 0
    assert np.load(out)["features"].shape == (44, 32)
    config = (own / "config.json").read_bytes()
    flags = ("--config", own / "config.json", "--images", 1000, "--loader-rate", 100)
    status, said = called("plan", *flags, "--json", own / "config.json", "--force")
    assert status == 2
    assert "belongs to the run" in said
    assert (own / "config.json").read_bytes() == config
    assert "exists already" in called("plan", *flags, "--json", out)[1]
    assert "both name" in called("plan", *flags, "--json", "x.png", "--plot", "x.png")[1]


@pytest.mark.slow
def test_a_run_begins_on_nobodys_files(tiny: Config, tmp_path: Path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text('{"mine": 1}')
    for resume in (None, "auto"):
        with pytest.raises(UserError, match=r"holds a config\.json that is no run's"):
            pretrain(tiny.using(out=project, steps=1, resume=resume))
    (project / "config.json").unlink()
    (project / "metrics.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match=r"holds a metrics\.jsonl that is no run's"):
        pretrain(tiny.using(out=project, steps=1, resume="auto"))
    assert contents(project) == {"metrics.jsonl": b'{"mine": 1}\n'}
    # of a run that was killed before its first row there are settings alone
    folder = pretrain(tiny.using(steps=1))
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.jsonl").unlink()
    pretrain(tiny.using(steps=1))


@pytest.mark.slow
def test_a_training_begins_on_nobodys_files(run: Path, small_beton: Path, tmp_path: Path):
    train, _ = open_labelled(small_beton, None)
    folder = tmp_path / "tuned"
    folder.mkdir()
    setting = Setting(find_backbone(str(run)), train, train, folder, torch.device("cpu"), workers=1, feature_batch=44)
    config = dataclasses.replace(FINETUNE_PRESETS["small"], batch_size=22)
    for name, words in (("classifier.safetensors", "mine"), ("metrics.jsonl", '{"mine": 1}\n')):
        (folder / name).write_text(words)
        for resume in (False, True):
            with pytest.raises(UserError, match=f"holds a {name}"):
                train_classifier(setting, config, resume=resume)
        assert (folder / name).read_text() == words
        (folder / name).unlink()


def test_a_result_takes_a_name_of_its_own_beside_others_files(tmp_path: Path):
    """Whichever of the files that an evaluation may leave is there."""
    record = {"train": {"path": "/a/birds/train.beton", "fingerprint": "1"}, "val": None}
    files = free_files(tmp_path, "knn-student", record)
    assert files == ResultFiles(tmp_path, "knn-student")
    assert len(set(files.every)) == 5
    for path in files.every:
        path.write_text("mine")
        assert free_files(tmp_path, "knn-student", record).stem == "knn-student-birds-train"
        path.unlink()
    files.figures.write_text(json.dumps(record))
    assert free_files(tmp_path, "knn-student", record) == files  # the same images: renewed


def test_results_of_other_weights_do_not_replace_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    images = {"train": {"path": ".", "fingerprint": "1"}, "val": {"path": "/", "fingerprint": "2"}}
    found = []
    for weights in ("mae.pth", "dino.pth", "a/dino.pth", "timm:vit_base.mae", "mae.pth", str(tmp_path / "dino.pth")):
        files = free_files(tmp_path, "knn", images | {"weights": weights})
        files.figures.write_text(json.dumps(images | {"weights": weights}))
        found.append(files.stem)
    assert found == ["knn", "knn-dino", "knn-dino-2", "knn-timm-vit_base", "knn", "knn-dino"]
    others = {**images, "val": {"path": "b/val", "fingerprint": "3"}, "weights": "mae.pth"}
    assert free_files(tmp_path, "knn", others).stem == "knn-b-val"


def test_a_run_goes_on_with_its_results_from_wherever_it_is_named(tmp_path: Path):
    images = {"train": {"path": "a/b", "fingerprint": "1"}, "val": None}
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    folder = tmp_path / "run/eval"
    folder.mkdir()
    files = ResultFiles(folder, "knn-student")
    files.figures.write_text(json.dumps(images | {"weights": "old/run"}))
    assert free_files(folder, "knn-student", images | {"weights": str(tmp_path / "run")}) == files
    assert free_files(folder, "knn-student", images | {"weights": "other.pth"}).stem == "knn-student-other"
    for odd in ("\0", "x" * 5000):
        files.figures.write_text(json.dumps(images | {"weights": odd}))
        assert free_files(folder, "knn-student", images | {"weights": "other.pth"}).stem == "knn-student-other"


@pytest.mark.parametrize("path", [".", "..", "/", "../.."])
def test_images_may_lie_in_the_folder_itself(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder without a name of its own is called by the one that it leads to."""
    (tmp_path / "birds/train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "birds/train")
    record = {"train": {"path": path, "fingerprint": "1"}, "val": None, "weights": "mae.pth"}
    assert free_files(tmp_path, "knn", record).stem == "knn"
    (tmp_path / "knn.json").write_text("mine")
    wanted = {".": "knn-birds-train", "..": f"knn-{tmp_path.name}-birds"}
    found = free_files(tmp_path, "knn", record).stem
    assert found == wanted.get(path, found)


def test_the_demo_takes_no_folder_of_others(tmp_path: Path):
    (tmp_path / "images/holiday").mkdir(parents=True)
    (tmp_path / "images/holiday/a.jpg").write_text("mine")
    with pytest.raises(UserError, match=r"a\.jpg is none of the demo's images: choose another --folder"):
        write_demo_betons(tmp_path)
    assert contents(tmp_path) == {"images/holiday/a.jpg": b"mine"}


ADDRESSES = [
    ("export", "{url} {here}/x"),
    ("export", "{run} {url}"),
    ("export", "{run} {url}.safetensors"),
    ("embed", "{url} {beton} {here}/x.npz"),
    ("embed", "{run} {url} {here}/x.npz"),
    ("embed", "{run} {beton} {url}"),
    ("report", "{url}"),
    ("report", "{run} --out {url}"),
    ("report", "{run} --beton {url} --out {here}/x.html"),
    ("view", "{url} {here}/x.png"),
    ("view", "{beton} {url}.png"),
    ("view", "{beton} {here}/x.png --run {url}"),
    ("eval", "knn {url} --train {beton}"),
    ("eval", "knn {run} --train {url}"),
    ("eval", "knn {run} --train {beton} --val {url}"),
    ("eval", "knn {run} --train {beton} --out {url}"),
    ("eval", "finetune {run} --train {beton} --val {beton} --out {url}"),
    ("plan", "--images 1000 --loader-rate 100 --json {url}"),
    ("plan", "--images 1000 --loader-rate 100 --plot {url}.png"),
    ("plan", "--config {url}"),
    ("train", "--beton {beton} --batch-size 8 --eval-every 1 --eval-val {url}"),
    ("demo", "--folder {url}"),
    ("demo", "--folder {here} --out {url}"),
]


@pytest.mark.parametrize(("name", "words"), ADDRESSES, ids=lambda part: part.replace("{", "").replace("}", ""))
def test_an_address_that_cannot_be_reached_is_said_before_anything_is_written(
    name: str, words: str, run: Path, small_beton: Path, tmp_path: Path, monkeypatch, capsys
):
    """And never taken for a folder of this name. The demo alone, which reads its run back, takes none."""
    for variable in [variable for variable in os.environ if variable.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    for variable in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    places = {"url": "s3://bucket/run", "run": run, "beton": small_beton, "here": tmp_path, "tree": small_beton.parent}
    monkeypatch.setattr("sys.argv", [name, *(word.format(**places) for word in words.split())])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # fastpmae-write sets its own
    before = contents(run)
    assert import_module(module_of(name)).main() == 2
    said = capsys.readouterr().err
    why = "s3:// is not supported" if name == "demo" else "no credentials were found"
    assert re.fullmatch(rf"\S+: error: s3://bucket(/run(\.\w+|/index\.json)?)?: {why}[;,] .*\n", said), said
    assert list(tmp_path.iterdir()) == []
    assert contents(run) == before


def test_commands_replace_nothing_unasked(own: Path, small_beton: Path, tmp_path: Path, monkeypatch, capsys):
    for name, words in (
        ("export", f"{own} {{out}}.safetensors"),
        ("embed", f"{own} {small_beton} {{out}}.npz"),
        ("report", f"{own} --out {{out}}.html"),
        ("view", f"{small_beton} {{out}}.png"),
        ("view", f"{small_beton} {{out}}.svg --run {own}"),
        ("plan", "--images 1000 --loader-rate 100 --json {out}.json"),
    ):
        monkeypatch.setattr("sys.argv", [name, *words.format(out=tmp_path / "out").split()])
        out = next(Path(word) for word in sys.argv if Path(word).parent == tmp_path and Path(word).stem == "out")
        out.write_text("mine")
        assert import_module(module_of(name)).main() == 2
        assert f"{out} exists already; --force replaces it" in capsys.readouterr().err
        assert out.read_text() == "mine"
