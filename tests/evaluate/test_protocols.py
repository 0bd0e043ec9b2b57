"""`fastpmae-eval` as a user calls it: what it prints and writes, and what it refuses."""

import contextlib
import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from fastpmae import PRESETS, UserError, embed_images, export_encoder, load_encoder, pretrain, write_beton
from fastpmae.distributed.ranks import Ranks
from fastpmae.evaluate import finetune, protocols
from fastpmae.evaluate.backbone import features, find_backbone
from fastpmae.evaluate.datasets import open_labelled
from fastpmae.evaluate.metrics import Scores, rank, write_scores
from fastpmae.evaluate.result_files import ResultFiles
from fastpmae.model.build import make_encoder
from fastpmae.run.checkpoint import checkpoint_path
from fastpmae.run.init_weights import start_encoder
from fastpmae_loaders import ImageFolder
from fastpmae_loaders.write.pages import PageWriter
from tests.made import REPOSITORY, made_image, write_tree
from tests.pretraining.test_data import threads_of_loaders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and validation images as .beton files and as a folder with both splits, and a run of two steps."""
    root = tmp_path_factory.mktemp("eval")
    write_tree(root / "tree" / "train", 45)
    write_tree(root / "tree" / "val", 24)
    for split in ("train", "val"):
        write_beton(root / "tree" / split, root / f"{split}.beton")
    pretrain(
        PRESETS["demo"].using(
            beton=root / "train.beton", out=root / "run", image_size=32, width=32, heads=2, depth=2, decoder_width=32,
            decoder_depth=1, decoder_heads=2, head_hidden=32, head_bottleneck=16, prototypes=24, epochs=1,
            pixel_epochs=0, steps=2, batch_size=16, workers=1, device="cpu", tensorboard=False,
        )
    )  # fmt: skip
    return root


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["fastpmae-eval", *map(str, words), "--workers", "1"])
    return protocols.main()


def test_a_folder_that_cannot_be_read_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(self: Path):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(UserError, match=f"^{tmp_path} cannot be read: Permission denied$"):
        open_labelled(tmp_path, None)


@pytest.mark.slow
def test_images_are_decoded_with_all_cores(data: Path, tmp_path: Path, monkeypatch):
    seen = threads_of_loaders(monkeypatch, 3)
    words = ["knn", data / "run", "--train", data / "train.beton", "--val", data / "val.beton", "--out", tmp_path]
    monkeypatch.setattr("sys.argv", ["fastpmae-eval", *map(str, words)])
    assert protocols.main() == 0
    words = ["probe", data / "run", *words[2:6], "--out", tmp_path / "probe", "--steps", 1]
    monkeypatch.setattr("sys.argv", ["fastpmae-eval", *map(str, words)])
    assert protocols.main() == 0
    assert set(seen) == {3}


@pytest.mark.slow
def test_knn_is_scikit_learns_on_the_same_features(data: Path, tmp_path: Path, monkeypatch, capsys):
    words = ["knn", data / "run", "--train", data / "train.beton", "--val", data / "val.beton", "--k", 4, 9]
    assert call(monkeypatch, *words, "--out", tmp_path, "--network", "labelling_teacher") == 0
    result = json.loads((tmp_path / "knn-labelling-teacher.json").read_text())
    assert result["source"].endswith("step-00000002.safetensors")
    assert [(row["pool"], row["k"]) for row in result["table"]] == [
        ("class", 4),
        ("class", 9),
        ("mean", 4),
        ("mean", 9),
    ]
    for row in result["table"]:
        sets = [
            embed_images(data / "run", data / f"{split}.beton", network="labelling_teacher", pool=row["pool"])
            for split in ("train", "val")
        ]
        weights: Any = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
        reference = KNeighborsClassifier(row["k"], metric="cosine", algorithm="brute", weights=weights)
        reference.fit(sets[0][0].astype(np.float64), sets[0][1])
        predicted = reference.predict(sets[1][0].astype(np.float64))
        assert row["top1"] == pytest.approx(100 * (predicted == sets[1][1]).mean(), abs=1e-3)
    assert f"top-1 {result['top1']:.2f} %" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "knn-labelling-teacher-classes.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["class_0", "class_1", "class_2"]
    assert sum(float(row["top1"]) * int(row["images"]) for row in rows) / 24 == pytest.approx(result["top1"], abs=0.01)
    with Image.open(tmp_path / "knn-labelling-teacher-confusion.png") as picture:
        assert picture.size[0] > 500


@pytest.mark.slow
def test_results_lie_beside_the_run_and_folders_hold_both_splits(data: Path, monkeypatch):
    tree = data / "tree"
    assert call(monkeypatch, "knn", data / "run", "--train", tree, "--pool", "class", "--temperature", 0) == 0
    assert call(monkeypatch, "knn", checkpoint_path(data / "run", 2), "--train", tree, "--network", "random") == 0
    found = json.loads((data / "run" / "eval" / "knn-student.json").read_text())
    named = json.loads((data / "run" / "eval" / "step-00000002" / "knn-random.json").read_text())
    assert (found["train"]["images"], found["val"]["images"]) == (45, 24)
    assert found["table"] != named["table"]


@pytest.mark.slow
def test_a_second_data_set_keeps_the_figures_of_the_first(data: Path, tmp_path: Path, monkeypatch):
    write_tree(tmp_path / "birds", 30)
    write_beton(tmp_path / "birds", tmp_path / "birds.beton")
    out = tmp_path / "out"
    for _ in range(2):  # and each is found again
        for beton in (data / "train.beton", tmp_path / "birds.beton", data / "val.beton"):
            assert call(monkeypatch, "knn", data / "run", "--train", beton, "--pool", "class", "--out", out) == 0
    found = {path.name: json.loads(path.read_text())["images"] for path in out.glob("*.json")}
    mine, theirs = (f"knn-student-{folder.name}-{name}.json" for folder, name in ((tmp_path, "birds"), (data, "val")))
    assert found == {"knn-student.json": 45, mine: 30, theirs: 24}


def test_without_a_validation_set_each_image_is_left_out_once(data: Path, tmp_path: Path, monkeypatch):
    words = ["knn", data / "run", "--train", data / "train.beton", "--k", 1, "--pool", "class", "--out", tmp_path]
    assert call(monkeypatch, *words) == 0
    result = json.loads((tmp_path / "knn-student.json").read_text())
    assert result["leave_one_out"] is True
    assert result["images"] == 45
    assert result["top1"] < 100


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgd", "logistic"])
def test_linear_chooses_on_what_is_held_out_and_tests_on_the_rest(data: Path, tmp_path: Path, monkeypatch, method):
    words = ["linear", data / "run", "--train", data / "tree", "--method", method, "--epochs", 5, "--out", tmp_path]
    assert call(monkeypatch, *words) == 0
    result = json.loads((tmp_path / f"linear-{method}-student.json").read_text())
    choice = "c" if method == "logistic" else "rate"
    chosen = next(row for row in result["table"] if row[choice] == result["chosen"])
    assert result["top1"] == chosen["top1"]
    assert len(result["table"]) == (4 if method == "logistic" else 8)


@pytest.mark.slow
def test_lowshot_means_over_its_draws(data: Path, tmp_path: Path, monkeypatch):
    words = ["lowshot", data / "run", "--train", data / "tree", "--shares", 0.1, 0.4, "--draws", 2, "--out", tmp_path]
    assert call(monkeypatch, *words) == 0
    table = json.loads((tmp_path / "lowshot-student.json").read_text())["table"]
    assert [(row["share"], row["images"]) for row in table] == [(0.1, 6), (0.4, 18)]
    for row in table:
        assert row["top1"] == pytest.approx(np.mean([draw["top1"] for draw in row["draws"]]))


@pytest.mark.slow
def test_finetune_and_probe_go_on_where_they_stopped(data: Path, tmp_path: Path, monkeypatch, capsys):
    for name, more in (
        ("finetune", ["--preset", "small", "--model-ema-decay", 0.5, "--batch-size", 16]),
        ("probe", []),
    ):
        words = [name, data / "run", "--train", data / "tree", "--epochs", 2]
        words += ["--warmup-epochs", 1, "--out", tmp_path / name, *more]
        assert call(monkeypatch, *words, "--steps", 1) == 0
        assert call(monkeypatch, *words) == 2
        assert "add --resume" in capsys.readouterr().err
        assert call(monkeypatch, *words, "--resume") == 0
        result = json.loads((tmp_path / name / f"{name}-student.json").read_text())
        last = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["epoch"] == 2
        assert result["top1"] == last["top1"]
        # The probe's usual 16,384 are more than the images that there are.
        assert result["finetune"]["batch_size"] == (16 if name == "finetune" else result["train"]["images"])
        assert result["finetune"]["color_jitter"] == (0.3 if name == "finetune" else 0.0)


@pytest.mark.slow
def test_the_installed_command_speaks_in_sentences(data: Path):
    words = ["knn", str(data / "run"), "--train", str(data / "train.beton"), "--k", "99"]
    done = subprocess.run(
        [sys.executable, "-m", "fastpmae.evaluate.protocols", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fastpmae-eval: error: k-NN with k = 99")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["linear", "{run}", "--train", "{beton}"], "--val is missing"),
        (["knn", "/nowhere", "--train", "{beton}"], "/nowhere: there is no such file"),
        (["knn", "{run}", "--train", "/nowhere"], "/nowhere does not exist"),
        (["knn", "{run}", "--train", "{beton}", "--image-size", "33"], "--image-size 33 is no multiple"),
        (["knn", "{run}", "--train", "{beton}", "--heads", "2"], "--heads 2: the settings of"),
        (["knn", "timm:vit", "--train", "{beton}", "--network", "random"], "and timm:vit is one network"),
        (["finetune", "{run}", "--train", "{beton}", "--preset", "none"], "there is no such preset"),
        (["lowshot", "{run}", "--train", "{tree}", "--shares", "2"], "shares of the labels"),
        (["lowshot", "{run}", "--train", "{tree}", "--c", "1", "0"], "--c 0.0 must be above 0"),
        (["linear", "{run}", "--train", "{tree}", "--method", "logistic", "--c", "0"], "--c 0.0 must be above 0"),
        (["knn", "{run}", "--train", "{tree}", "--temperature", "-1"], "a temperature above 0, not -1.0"),
        (["knn", "{run}", "--train", "{tree}", "--out", "{beton}/a/b"], "train.beton/a/b cannot be written"),
        (["knn", "{run}", "--train", "{beton}", "--val", "{tree}/val", "--engine", "native"], "native"),
        (["finetune", "{run}", "--train", "{beton}", "--val", "{tree}/val", "--engine", "native",
          "--preset", "small", "--batch-size", "8", "--out", "{out}/c"], "native"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    data: Path, words: list[str], sentence: str, monkeypatch, capsys, tmp_path: Path
):  # fmt: skip
    """Before anything is computed, and nothing is left."""

    def computed(*_: object, **how: object) -> None:
        raise AssertionError("an image was looked at")

    monkeypatch.setattr(protocols, "extract", computed)
    monkeypatch.setattr(finetune, "train_epoch", computed)
    places = {"run": data / "run", "beton": data / "train.beton", "tree": data / "tree", "out": tmp_path}
    assert call(monkeypatch, *(word.format(**places) for word in words)) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_classes_are_matched_by_name(tmp_path: Path):
    for split, names in (("train", "abc"), ("val", "cb")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            made_image(ord(name), 40, 40).save(tmp_path / split / name / "0.png")
    train, val = open_labelled(tmp_path, None)
    assert val is not None
    assert train.names == val.names == ["a", "b", "c"]
    assert val.labels.tolist() == [1, 2]
    (tmp_path / "val" / "d").mkdir()
    made_image(0, 40, 40).save(tmp_path / "val" / "d" / "0.png")
    with pytest.raises(UserError, match=r"its class 'd' is none of the 3 classes"):
        open_labelled(tmp_path, None)
    flat = tmp_path / "flat"
    flat.mkdir()
    made_image(0, 40, 40).save(flat / "0.png")
    with pytest.raises(UserError, match="without a label"):
        open_labelled(flat, None)


@pytest.mark.parametrize("other", ["val2017", "holdout", "Validation"])
def test_a_validation_split_by_another_name(tmp_path: Path, other: str):
    for folder in ("train/a", f"{other}/a", "test/a", "@eaDir"):
        (tmp_path / folder).mkdir(parents=True)
        made_image(3, 40, 40).save(tmp_path / folder / f"{folder.split('/')[0]}.png")
    train, val = open_labelled(tmp_path, None)
    assert val is not None
    assert isinstance(train.samples, ImageFolder)
    assert isinstance(val.samples, ImageFolder)
    assert [Path(train.samples.name(0)).stem, Path(val.samples.name(0)).stem] == ["train", other]
    assert len(train.labels) == len(val.labels) == 1
    # both are taken, and no flag of this command would choose another
    assert not any("not taken" in note for samples in (train.samples, val.samples) for note in samples.notes)


def test_scores_are_scikit_learns(tmp_path: Path):
    generator = np.random.default_rng(0)
    labels, logits = generator.integers(7, size=200), generator.normal(size=(200, 7)).round(1)
    logits[np.arange(200), labels] += 0.7
    logits = logits.round(1)
    scores = Scores(torch.from_numpy(labels), rank(torch.from_numpy(logits)))
    predicted = scores.ranked[:, 0].numpy()
    np.testing.assert_array_equal(predicted, logits.argmax(axis=1))
    untied = logits - 1e-6 * np.arange(7)
    assert scores.top5 == pytest.approx(100 * top_k_accuracy_score(labels, untied, k=5))
    np.testing.assert_array_equal(scores.confusion(7).numpy(), confusion_matrix(labels, predicted))
    names = [f"a${number}_" for number in range(7)]  # no formula, whatever is in it
    files = ResultFiles(tmp_path / "new", "odd")
    write_scores(files, scores, names, {"more": 1})
    assert json.loads(files.figures.read_text())["more"] == 1
    assert sorted(file.name for file in files.folder.iterdir()) == ["odd-classes.csv", "odd-confusion.png", "odd.json"]


@pytest.mark.slow
def test_the_files_of_many_classes_are_made_without_their_pairs(tmp_path: Path, monkeypatch):
    """ImageNet-21k has 21,841 classes, whose pairs are 477 million."""
    generator = np.random.default_rng(1)
    whole = Scores.confusion
    asked: list[int] = []
    monkeypatch.setattr(Scores, "confusion", lambda scores, classes: asked.append(classes) or whole(scores, classes))
    for count in (6, 21841):
        labels = torch.from_numpy(generator.integers(count, size=300))
        ranked = torch.from_numpy(generator.integers(-1, count, size=(300, 5)))
        ranked[:, 0] = torch.where(torch.rand(300) < 0.3, labels, ranked[:, 0].clamp(min=0))
        scores = Scores(labels, ranked)
        write_scores(ResultFiles(tmp_path, f"of{count}"), scores, [f"c{number}" for number in range(count)], {})
        rows = list(csv.DictReader((tmp_path / f"of{count}-classes.csv").read_text().splitlines()))
        assert len(rows) == count
        assert sum(int(row["predicted"]) for row in rows) == 300
        for number in labels.unique().tolist()[:20]:
            own = labels == number
            part, row = Scores(labels[own], ranked[own]), rows[number]
            assert (row["top1"], row["top5"]) == (f"{part.top1:.2f}", f"{part.top5:.2f}")
            wrong = part.ranked[:, 0][part.ranked[:, 0] != number]
            most = f"c{torch.bincount(wrong).argmax()}" if len(wrong) else ""
            assert row["most_taken_for"] == most
            predicted = (ranked[:, 0] == number).sum().item()
            right = int((part.ranked[:, 0] == number).sum())
            assert row["precision"] == (f"{100 * right / predicted:.2f}" if predicted else "")
        with Image.open(tmp_path / f"of{count}-confusion.png") as picture:
            assert picture.size[0] > 500
    assert max(asked) <= 1000


def labelled_beton(path: Path, labels: list[int], names: list[str] | None = None) -> Path:
    """A .beton, without names of classes as FFCV writes them too."""
    with path.open("wb") as file:
        pages = PageWriter(file, len(labels), 2 << 20)
        for number, label in enumerate(labels):
            content = io.BytesIO()
            made_image(number, 40, 40).save(content, "JPEG")
            pages.add(0, 40, 40, label, content.getvalue())
        pages.finish(names)
    return path


def test_names_of_classes_are_printable(tmp_path: Path):
    train = labelled_beton(tmp_path / "train.beton", [0, 1], ["\x1b[31mred", "blue"])
    train_set, val_set = open_labelled(train, labelled_beton(tmp_path / "val.beton", [0]))
    assert val_set is not None
    assert train_set.names == val_set.names == ["\\x1b[31mred", "blue"]
    assert val_set.labels.tolist() == [0]


@pytest.mark.slow
def test_numbers_of_classes_of_any_size(data: Path, tmp_path: Path, monkeypatch, capsys):
    train = labelled_beton(tmp_path / "train.beton", [0, 10**9] * 12)
    val = labelled_beton(tmp_path / "val.beton", [10**9, 10**9, 0])
    train_set, val_set = open_labelled(train, val)
    assert val_set is not None
    assert train_set.names == ["0", "1000000000"]
    assert val_set.labels.tolist() == [1, 1, 0]
    for words in (["knn"], ["linear", "--epochs", 2]):
        assert call(monkeypatch, *words, data / "run", "--train", train, "--val", val, "--out", tmp_path / "o") == 0
    odd = labelled_beton(tmp_path / "odd.beton", [5])
    assert call(monkeypatch, "knn", data / "run", "--train", train, "--val", odd, "--out", tmp_path / "o") == 2
    assert "its class '5' is none of the 2 classes" in capsys.readouterr().err


def test_classes_with_and_without_names_are_matched_by_their_numbers(data: Path, tmp_path: Path):
    train, val = open_labelled(data / "train.beton", labelled_beton(tmp_path / "val.beton", [2, 0]))
    assert val is not None
    assert train.names == val.names == ["class_0", "class_1", "class_2"]
    assert val.labels.tolist() == [2, 0]


@pytest.mark.slow
def test_few_images_have_fewer_neighbours_and_other_words(data: Path, tmp_path: Path, monkeypatch, capsys):
    few = labelled_beton(tmp_path / "few.beton", [0, 1] * 8)
    words = ["--train", few, "--out", tmp_path / "o"]
    assert call(monkeypatch, "knn", data / "run", "--pool", "class", *words) == 0
    assert "15 images vote, so k is 10" in "".join(capsys.readouterr())
    assert [row["k"] for row in json.loads((tmp_path / "o" / "knn-student.json").read_text())["table"]] == [10]
    monkeypatch.setattr(protocols, "extract", lambda *_, **__: pytest.fail("features were computed first"))
    assert call(monkeypatch, "knn", data / "run", "--k", 16, *words) == 2
    assert "needs k between 1 and the 15 training rows" in capsys.readouterr().err
    assert call(monkeypatch, "finetune", data / "run", *words, "--val", few) == 2
    assert "16 images, less than one batch of 1024: choose a smaller --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["timm", "huggingface", "plain"])
def test_an_exported_folder_is_the_network_that_was_exported(data: Path, tmp_path: Path, form):
    export_encoder(data / "run", tmp_path / "exported", format=form)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = []
    for weights in (data / "run", tmp_path / "exported"):
        backbone = find_backbone(str(weights))
        with torch.no_grad():
            found.append(features(backbone.build().eval(), backbone.normalised(images))[0])
    assert torch.allclose(found[0], found[1], atol=1e-5)
    encoder, config = load_encoder(data / "run")
    fresh = make_encoder(config)
    start_encoder(fresh, tmp_path / "exported")
    assert all(torch.equal(t, encoder.state_dict()[name]) for name, t in fresh.state_dict().items())


def test_what_one_process_computes_is_refused_on_several(data: Path, tmp_path: Path, monkeypatch, capsys):
    two = Ranks(0, 2, 2, torch.device("cpu"), None)
    monkeypatch.setattr(protocols, "join_ranks", lambda device: contextlib.nullcontext(two))
    assert call(monkeypatch, "knn", data / "run", "--train", data / "train.beton", "--out", tmp_path / "knn") == 2
    assert "fastpmae-eval knn is computed by one process: start it without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "knn").exists()
