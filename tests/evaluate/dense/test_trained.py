"""What a dense training left, loaded and asked: it predicts what its own test did; strangers' files are refused."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models.detection.roi_heads import paste_masks_in_image

from fastpmae import UserError, export_encoder, load_detector, load_segmenter
from fastpmae.distributed.ranks import Ranks
from fastpmae.evaluate import protocols
from fastpmae.evaluate.dense.labelled import Detection
from fastpmae.evaluate.dense.overlap import MaskScores, confusion_of
from fastpmae.evaluate.dense.training import Setting
from fastpmae.pictures.report import write_report
from fastpmae.pictures.view import draw_run
from fastpmae.run.init_weights import header_of
from tests.evaluate.dense.made import detection, scene, segmentation, start
from tests.evaluate.dense.small import DETECT, SEGMENT
from tests.evaluate.dense.test_rcnn import detector as small_detector

pytest.importorskip("segmentation_models_pytorch", reason="pip install 'fastpmae[dense]'")
pytest.importorskip("faster_coco_eval", reason="pip install 'fastpmae[dense]'")

from fastpmae.evaluate.dense import detect, trained
from fastpmae.evaluate.dense.average_precision import BoxScores, Found, average_precision, run_lengths
from fastpmae.evaluate.dense.rcnn import Detector
from fastpmae.evaluate.dense.segment import train_segmenter
from fastpmae.evaluate.dense.trained import TrainedDetector

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 1, CPU, None)
TESTED = segmentation(3, first=20)
OBJECTS = detection(3, first=20, outlines=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MaskScores]:
    """The folder of a segmentation, and its own test's scores. The images are larger than a window."""
    folder = tmp_path_factory.mktemp("segment")
    config = dataclasses.replace(SEGMENT, iterations=6, eval_every=0)
    setting = Setting(folder / "out", CPU, workers=1)
    return folder / "out", train_segmenter(segmentation(), TESTED, start(folder), config, setting, ALONE)[0]


@pytest.fixture(scope="module")
def detected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Found]]:
    """The folder of a detection with masks, and what its own test found in each image."""
    folder = tmp_path_factory.mktemp("detect")
    config = dataclasses.replace(DETECT, epochs=10.0, eval_every=0, score_threshold=0.01)
    setting = Setting(folder / "out", CPU, workers=1)
    tested: list[list[Found]] = []

    def recorded(images: Detection, found: Sequence[Found]) -> BoxScores:
        tested.append(list(found))
        return average_precision(images, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detect, "average_precision", recorded)
        detect.train_detector(detection(outlines=True), OBJECTS, start(folder), config, setting, ALONE)
    return folder / "out", tested[-1]


def check_masks(path: Path, scores: MaskScores) -> None:
    """What is loaded from a path predicts what the training's own test did, pixel by pixel as counted there."""
    segmenter, total = load_segmenter(path, "cpu"), torch.zeros(3, 3, dtype=torch.int64)
    assert segmenter.names == TESTED.names
    for entry in TESTED.entries:
        pixels, mask = entry.read()
        predicted = segmenter(pixels)
        assert (predicted.dtype, predicted.shape) == (np.int16, mask.shape)
        total += confusion_of(torch.from_numpy(mask), torch.from_numpy(predicted), 3)
    assert torch.equal(total, scores.confusion)


def check_boxes(path: Path, tested: list[Found]) -> None:
    """The same of a detector, box by box: of one that has learnt so little all figures are 0, whatever it finds."""
    detector = load_detector(path, "cpu")
    assert detector.names == OBJECTS.names
    found = [detector(entry.read()) for entry in OBJECTS.entries]
    assert sum(len(each.labels) for each in found) > 0
    for ours, theirs in zip(found, tested, strict=True):
        assert np.array_equal(ours.boxes, theirs.boxes)
        assert (ours.labels, ours.scores, ours.masks) == (theirs.labels, theirs.scores, theirs.masks)
    outlines = found[0].outlines()
    assert outlines is not None
    assert outlines.shape == (len(found[0].labels), 40, 56)


def test_a_segmenter_predicts_what_its_own_test_did(segmented: tuple[Path, MaskScores], tmp_path: Path):
    folder, scores = segmented
    check_masks(folder, scores)
    check_masks(folder / "segmenter.safetensors", scores)
    export_encoder(folder, tmp_path / "whole", format="plain")
    export_encoder(folder, tmp_path / "one.safetensors", format="plain")
    for path in (tmp_path / "whole", tmp_path / "one.safetensors"):
        check_masks(path, scores)
    # an export of an export is the same
    export_encoder(tmp_path / "whole", tmp_path / "again.safetensors", format="plain")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_a_detector_finds_what_its_own_test_did(detected: tuple[Path, list[Found]], tmp_path: Path):
    folder, tested = detected
    check_boxes(folder, tested)
    export_encoder(folder, tmp_path / "whole", format="plain")
    check_boxes(tmp_path / "whole", tested)
    said = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (said["task"], said["classes"], said["masks"]) == ("detect", ["red", "blue"], True)
    assert said["detect"]["score_threshold"] == 0.01
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "detector = load_detector('whole')" in card
    assert "pipeline_tag: object-detection" in card
    with pytest.raises(UserError, match="holds a detector: load_detector loads it"):
        load_segmenter(folder)
    with pytest.raises(UserError, match="--image-size 64: a detector is exported as it was trained"):
        export_encoder(folder, tmp_path / "larger", format="plain", image_size=64)


def test_with_relative_positions_too(tmp_path: Path):
    config = dataclasses.replace(SEGMENT, iterations=3, eval_every=0, relative_positions=True)
    setting = Setting(tmp_path / "out", CPU, workers=1)
    scores, _ = train_segmenter(segmentation(), TESTED, start(tmp_path), config, setting, ALONE)
    check_masks(tmp_path / "out", scores)
    export_encoder(tmp_path / "out", tmp_path / "whole", format="plain")
    check_masks(tmp_path / "whole", scores)
    for format in ("timm", "huggingface"):
        with pytest.raises(UserError, match="relative positions, which a plain ViT lacks; --format plain writes"):
            export_encoder(tmp_path / "out", tmp_path / "encoder", format=format)
    assert not (tmp_path / "encoder").exists()


def test_its_encoder_is_exported_for_timm_and_transformers(segmented: tuple[Path, MaskScores], tmp_path: Path):
    folder, _ = segmented
    kept = load_file(folder / "segmenter.safetensors")
    export_encoder(folder, tmp_path / "timm")
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[f"backbone.vit.{name}"]), name
    card = (tmp_path / "timm" / "README.md").read_text()
    assert "the encoder of the segmenter" in card
    assert "`fastpmae-eval segment` with these settings" in card
    export_encoder(folder, tmp_path / "hf", format="huggingface")
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (said["architectures"], said["image_size"], said["hidden_size"]) == (["ViTModel"], 32, 16)
    with pytest.raises(UserError, match=r"--network random: .* holds one network of a dense task"):
        export_encoder(folder, tmp_path / "x", "random")


def test_an_image_comes_as_file_array_or_picture(segmented: tuple[Path, MaskScores], tmp_path: Path):
    segmenter = load_segmenter(segmented[0], "cpu")
    pixels = scene(30)[0]
    expected = segmenter(pixels)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (segmenter(tmp_path / "a.png") == expected).all()
    assert (segmenter(str(tmp_path / "a.png")) == expected).all()
    assert (segmenter(Image.fromarray(pixels)) == expected).all()
    # stored on its side
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "turned.png", exif=exif)
    assert (segmenter(tmp_path / "turned.png") == expected).all()
    for odd in (pixels[:, :, 0], pixels.astype(float), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(UserError, match=r"an image is uint8 \[height, width, 3\]"):
            segmenter(odd)
    (tmp_path / "b.png").write_text("no image")
    for name in ("b.png", "c.png"):
        with pytest.raises(UserError, match=rf"{name} cannot be read"):
            segmenter(tmp_path / name)


def changed(
    folder: Path, to: Path, drop: str = "", tensors: dict[str, torch.Tensor] | None = None, **header: Any
) -> Path:
    """The file of a segmentation with another header or other tensors."""
    said = header_of(folder / "segmenter.safetensors")
    said |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in header.items()}
    kept = load_file(folder / "segmenter.safetensors") | (tensors or {})
    save_file({name: tensor for name, tensor in kept.items() if name != drop}, to, said)
    return to


def test_a_strangers_file_is_refused(segmented: tuple[Path, MaskScores], tmp_path: Path):
    folder, _ = segmented
    header = header_of(folder / "segmenter.safetensors")
    timm_said, config = json.loads(header["timm"]), json.loads(header["segment"])
    evil = {"model_name": "vit_tiny_patch16_224'); evil(('"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"timm": timm_said | evil}, "timm has no model"),
        ({"timm": timm_said | {"model_name": "resnet50"}}, "timm makes no resnet50|resnet50 is no plain ViT"),
        ({"timm": timm_said | {"depth": 10**9}}, "it has 4 blocks, and its header says 1000000000"),
        ({"timm": timm_said | {"img_size": 3200}}, "it gives two sizes of images"),
        ({"timm": {}}, "its header does not say what its ViT is"),
        ({"segment": config | {"channels": 10**15}}, "its settings make no network|is float32"),
        ({"segment": config | {"channels": 64}}, "decoder"),
        ({"segment": config | {"stride": 1e-9}}, "--stride 1e-09 must be"),
        ({"segment": config | {"crop_size": "x"}}, "crop_size is 'x'"),
        ({"segment": "[" * 10_000}, ""),
        ({"classes": ["ground", "red"]}, r"classify.1.weight is float32 \[3, 8, 1, 1\]"),
        ({"classes": ["ground", "red", 3]}, "classes is"),
        ({"mean": [0, 0, None]}, "mean or std is"),
        ({"std": [1, 1, 0]}, "std is not above 0"),
        ({"image_size": 10**9}, "image_size is 1000000000"),
        ({"drop": "classify.1.bias"}, "it lacks classify.1.bias"),
        ({"tensors": {"more": torch.zeros(2)}}, "it has no place for more"),
        ({"tensors": {"classify.1.bias": torch.tensor([0, torch.nan, 0])}}, "'classify.1.bias' holds numbers that are"),
        ({"tensors": {"classify.1.bias": torch.zeros(3, dtype=torch.float16)}}, "classify.1.bias is float16"),
    ]
    for number, (change, said) in enumerate(cases):
        path = changed(folder, tmp_path / f"{number}.safetensors", **change)
        with pytest.raises(UserError, match=rf"(?s){number}.safetensors is no segmenter of fastpmae-eval.*({said})"):
            load_segmenter(path)
    (tmp_path / "a.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{       ")
    for path in (tmp_path / "a.safetensors", tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="name the folder that `fastpmae-eval segment` or `detect` left"):
            load_segmenter(path)


def predict(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["fastpmae-eval", "predict", *map(str, words), "--device", "cpu"])
    return protocols.main()


def test_one_command_for_images_of_ones_own(
    segmented: tuple[Path, MaskScores], detected: tuple[Path, list[Found]], tmp_path: Path, monkeypatch, capsys
):
    for name, number in (("a.png", 30), ("day/b.jpg", 31), ("day/notes.txt", None)):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        if number is None:
            (tmp_path / "images" / name).write_text("no image")
        else:
            Image.fromarray(scene(number)[0]).save(tmp_path / "images" / name)
    out = tmp_path / "out"
    assert predict(monkeypatch, segmented[0], tmp_path / "images", "--out", out) == 0
    names = {str(path.relative_to(out)) for path in out.rglob("*.*")}
    ends = {"a-overlay.png", "a-labels.png", "day/b-overlay.png", "day/b-labels.png"}
    assert names == {*ends, "classes.json"}
    assert json.loads((out / "classes.json").read_text()) == {"0": "ground", "1": "red", "2": "blue"}
    expected = load_segmenter(segmented[0], "cpu")(tmp_path / "images" / "a.png")
    with Image.open(out / "a-labels.png") as labels:
        assert (np.asarray(labels) == expected).all()
    before = (out / "a-labels.png").read_bytes()
    capsys.readouterr()
    assert predict(monkeypatch, segmented[0], tmp_path / "images", "--out", out) == 2
    assert "a-overlay.png exists already; --force replaces it" in capsys.readouterr().err
    assert predict(monkeypatch, segmented[0], tmp_path / "images", "--out", out, "--force") == 0
    assert (out / "a-labels.png").read_bytes() == before

    boxes = tmp_path / "boxes"
    assert predict(monkeypatch, detected[0], tmp_path / "images" / "a.png", "--out", boxes) == 0
    said = json.loads((boxes / "a-objects.json").read_text())
    found = load_detector(detected[0], "cpu")(tmp_path / "images" / "a.png")
    assert (said["width"], said["height"], len(said["objects"])) == (56, 40, len(found.labels))
    scores = [each["score"] for each in said["objects"]]
    assert scores == sorted(scores, reverse=True)
    for each in said["objects"]:
        assert each["name"] == ("red", "blue")[each["label"] - 1]
        assert 0 <= each["box"][0] <= each["box"][2] <= 56
        assert each["segmentation"]["size"] == [40, 56]
    assert (boxes / "a-overlay.png").read_bytes().startswith(b"\x89PNG")

    # one bad image of a folder does not end the others
    (tmp_path / "images" / "day" / "bad.png").write_bytes(b"no image")
    (tmp_path / "images" / "._a.png").write_bytes(b"hidden")
    capsys.readouterr()
    assert predict(monkeypatch, detected[0], tmp_path / "images", "--out", tmp_path / "some") == 0
    said = capsys.readouterr()
    assert "bad.png" in said.out + said.err
    assert "of 2 images into" in said.out
    assert len(list((tmp_path / "some").rglob("*-objects.json"))) == 2

    Image.fromarray(scene(32)[0]).save(tmp_path / "images" / "a.jpg")
    for words, sentence in (
        ([segmented[0]], "name images, or folders of them"),
        ([segmented[0], tmp_path / "images" / "day" / "bad.png"], "bad.png"),
        ([segmented[0], tmp_path / "images"], "would have results of one name"),
        ([segmented[0], tmp_path / "nowhere"], "nowhere does not exist"),
        ([tmp_path / "images", tmp_path / "images"], "is no segmenter and no detector"),
    ):
        assert predict(monkeypatch, *words, "--out", tmp_path / "other") == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


def test_it_is_no_pretraining_run(segmented: tuple[Path, MaskScores], tmp_path: Path):
    sentence = "is what fastpmae-eval segment left, and no pretraining run: its figures and pictures lie in its folder"
    (tmp_path / "images").mkdir()
    Image.fromarray(scene(0)[0]).save(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match=sentence):
        write_report(segmented[0], tmp_path / "report.html")
    with pytest.raises(UserError, match=sentence):
        draw_run(segmented[0], tmp_path / "images", tmp_path / "view.png")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@torch.no_grad()
def test_masks_are_pasted_one_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As planes of the whole image in fp32 a hundred of them would take 5 GB at 12 megapixels."""
    torch.manual_seed(0)
    masks, boxes = torch.rand(5, 1, 28, 28), torch.tensor([[4.0 * n, 3.0 * n, 30.0 + n, 20.0 + n] for n in range(5)])
    answer = {"boxes": boxes, "labels": torch.ones(5, dtype=torch.int64), "scores": torch.rand(5), "masks": masks}
    whole = paste_masks_in_image(masks, boxes * 2, (80, 112))[:, 0] > 0.5
    pasted: list[int] = []

    def counted(some: torch.Tensor, *where: Any) -> torch.Tensor:
        pasted.append(len(some))
        return paste_masks_in_image(some, *where)

    monkeypatch.setattr(trained, "paste_masks_in_image", counted)

    monkeypatch.setattr(Detector, "forward", lambda *_: [answer])
    detector = TrainedDetector(small_detector(), start(tmp_path), DETECT, CPU, ("red",))
    found = detector.found(torch.zeros(3, 40, 56, dtype=torch.uint8), 80, 112)
    assert pasted == [1] * 5
    assert found.masks == run_lengths(whole)


@pytest.mark.parametrize("out", ["images/out", "images", "."])
def test_results_are_no_images(
    out: str, segmented: tuple[Path, MaskScores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Wherever they lie, and in the folder of other images' results too."""
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        Image.fromarray(scene(number)[0]).save(tmp_path / "images" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    assert predict(monkeypatch, segmented[0], "images", "--out", out) == 0
    made = sorted(tmp_path.rglob("*"))
    assert len(list(tmp_path.rglob("*-labels.png"))) == 2
    assert predict(monkeypatch, segmented[0], "images", "--out", out, "--force") == 0
    assert sorted(tmp_path.rglob("*")) == made
    # other images: classes.json says the same already
    Image.fromarray(scene(3)[0]).save(tmp_path / "3.png")
    assert predict(monkeypatch, segmented[0], "3.png", "--out", out) == 0
    (classes,) = tmp_path.rglob("classes.json")
    classes.write_text('{"0": "mine"}')
    Image.fromarray(scene(4)[0]).save(tmp_path / "4.png")
    assert predict(monkeypatch, segmented[0], "4.png", "--out", out) == 2
    assert classes.read_text() == '{"0": "mine"}'
