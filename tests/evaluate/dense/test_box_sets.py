"""Images with boxes as Pascal VOC, COCO and YOLO have them, each written here and read again; and what goes wrong."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastpmae import UserError
from fastpmae.evaluate.dense.box_sets import open_detection
from fastpmae.evaluate.dense.boxes import turned_boxes
from fastpmae.evaluate.dense.labelled import Detection
from fastpmae.evaluate.dense.masks import turned
from fastpmae.evaluate.dense.outlines import coco_outline, outline_of, unpacked
from tests.made import made_image

WIDTH, HEIGHT = 60, 40
BOXES: list[tuple[str, tuple[int, int, int, int]]] = [("cell", (4, 6, 20, 30)), ("plate", (30, 0, 60, 10))]
"""In pixels as they are here: left, top, right, bottom."""


def write_image(path: Path, orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    made_image(0, WIDTH, HEIGHT).save(path, exif=exif)
    return path


def write_voc(root: Path, name: str, boxes: Sequence[tuple[str, tuple[float, ...]]], more: str = "") -> None:
    """An image and its XML; the boxes are written as VOC counts them, from 1 and with their last pixel."""
    write_image(root / "JPEGImages" / f"{name}.jpg")
    said = "".join(
        f"<object><name>{label}</name>{more}<bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax>"
        f"<ymax>{bottom}</ymax></bndbox></object>"
        for label, (left, top, right, bottom) in boxes
    )
    sides = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    path = root / "Annotations" / f"{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation>{sides}{said}</annotation>")


def coco(boxes: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    images = [{"id": 7, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}]
    return {
        "images": images,
        "categories": [{"id": 5, "name": "plate"}, {"id": 2, "name": "cell"}],
        "annotations": [{"id": n, "image_id": 7} | box for n, box in enumerate(boxes)],
    } | more


def write_coco(root: Path, said: dict[str, Any], split: str = "train") -> Path:
    write_image(root / split / "a.jpg")
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said))
    return path


def boxes_of(opened: Detection, place: int = 0) -> list[tuple[str, tuple[float, ...]]]:
    found = opened.entries[place].objects
    return [
        (opened.names[label - 1], tuple(box))
        for label, box in zip(found.labels.tolist(), found.boxes.tolist(), strict=True)
    ]


def test_voc_counts_pixels_from_one(tmp_path: Path):
    for name in "abc":
        write_voc(tmp_path, name, BOXES if name != "b" else [])
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for split, names in {"train": "a\nb\n", "val": "c\n", "trainval": "a\nb\nc\n", "cell_train": "a 1\nb -1\n"}.items():
        (lists / f"{split}.txt").write_text(names)
    train, val = open_detection(tmp_path)
    assert val is not None
    assert (len(train), len(val)) == (2, 1)
    assert train.names == ("cell", "plate")
    assert boxes_of(train) == BOXES
    assert "1 of 2 images have no box" in " ".join(train.notes)
    assert train.entries[1].objects.boxes.shape == (0, 4)
    assert train.entries[0].read().shape == (HEIGHT, WIDTH, 3)
    both, none = open_detection(lists / "trainval.txt", lists / "val.txt")
    assert none is not None
    assert (len(both), len(none)) == (3, 1)


def test_difficult_objects_are_crowds(tmp_path: Path):
    write_voc(tmp_path, "a", BOXES[:1], "<difficult>1</difficult>")
    write_voc(tmp_path, "b", BOXES)
    train, _ = open_detection(tmp_path)
    assert train.entries[0].objects.crowd.tolist() == [True]
    assert train.entries[1].objects.crowd.tolist() == [False, False]
    assert "1 boxes are crowds or difficult" in " ".join(train.notes)


def test_boxes_that_would_end_a_training_are_left_out_and_counted(tmp_path: Path):
    write_voc(
        tmp_path,
        "a",
        [*BOXES, ("cell", (9, 9, 9, 20)), ("cell", (70, 5, 90, 20)), ("cell", (float("nan"), 1, 9, 9))],
    )
    train, _ = open_detection(tmp_path)
    assert boxes_of(train) == BOXES
    assert train.notes == (
        "warning: 1 boxes of zero size are left out",
        "warning: 1 boxes outside their image are left out",
        "warning: 1 boxes whose numbers are not finite are left out",
    )


def test_boxes_are_cut_at_the_edge(tmp_path: Path):
    write_voc(tmp_path, "a", [("cell", (-5, -5, 10, 10)), ("cell", (50, 30, 99, 99))])
    train, _ = open_detection(tmp_path)
    assert boxes_of(train) == [("cell", (0, 0, 10, 10)), ("cell", (50, 30, 60, 40))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation><object><name>a</name></object></annotation>", "an object in it has no bndbox"),
        ("<annotation><object>", "is no XML of Pascal VOC"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><annotation/>', "it declares entities"),
        ("<annotation><object><bndbox><xmin>x</xmin></bndbox></object></annotation>", "is no XML of Pascal VOC"),
        ("<annotation><size><width>3</width><height>4</height></size></annotation>", "its label file says 3x4"),
    ],
)
def test_an_xml_file_that_is_none_is_refused(tmp_path: Path, text: str, words: str):
    write_voc(tmp_path, "a", BOXES)
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(UserError, match=words):
        open_detection(tmp_path)


def test_an_unknown_class_is_refused_when_a_set_is_opened(tmp_path: Path):
    for name, boxes in (("a", BOXES), ("b", [("dog", (1, 1, 9, 9))])):
        write_voc(tmp_path / name, name, boxes)
    with pytest.raises(UserError, match=r"b\.jpg has an object 'dog', which is none of the 2 classes"):
        open_detection(tmp_path / "a", tmp_path / "b")


def test_classes_are_merged_and_ignored_by_their_names(tmp_path: Path):
    write_voc(tmp_path, "a", [*BOXES, ("dust", (0, 0, 5, 5)), ("Cell", (1, 1, 8, 8))])
    said = tmp_path / "classes.json"
    said.write_text('{"plate": "plate", "cell": "cell", "Cell": "cell", "dust": null}')
    train, _ = open_detection(tmp_path, classes=said)
    assert train.names == ("plate", "cell")
    assert boxes_of(train) == [*BOXES, ("cell", (1, 1, 8, 8))]


def test_coco(tmp_path: Path):
    boxes = [
        {"category_id": 2, "bbox": [4, 6, 16, 24], "area": 123.5, "iscrowd": 0},
        {"category_id": 5, "bbox": [30, 0, 30, 10], "iscrowd": 1},
    ]
    write_coco(tmp_path, coco(boxes))
    write_coco(tmp_path, coco(boxes[:1]), "val")
    train, val = open_detection(tmp_path)
    assert val is not None
    # by their numbers, not as they stand
    assert train.names == ("cell", "plate")
    assert boxes_of(train) == BOXES
    assert train.entries[0].objects.labels.tolist() == [1, 2]
    assert train.entries[0].objects.crowd.tolist() == [False, True]
    assert train.entries[0].objects.area.tolist() == [123.5, 300]
    assert len(val.entries[0].objects) == 1
    assert not train.has_outlines
    with pytest.raises(UserError, match=r"--masks on: of the 2 boxes of .* 2 have no mask"):
        open_detection(tmp_path, masks="on")


def test_roboflow_puts_cocos_file_beside_the_images(tmp_path: Path):
    for split in ("train", "valid"):
        write_image(tmp_path / split / "a.jpg")
        said = coco([{"category_id": 2, "bbox": [4, 6, 16, 24]}])
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(said))
    train, val = open_detection(tmp_path)
    assert val is not None
    assert (len(train), len(val)) == (1, 1)


def test_polygons_and_both_kinds_of_runs_give_masks(tmp_path: Path):
    pytest.importorskip("faster_coco_eval", reason="polygons are drawn by faster-coco-eval")
    from faster_coco_eval.core import mask

    drawn = np.zeros((HEIGHT, WIDTH), bool)
    drawn[6:30, 4:20] = True
    packed = mask.encode(np.asfortranarray(drawn.astype(np.uint8)))
    text = packed["counts"].decode()
    runs = [int(run) for run in np.diff(np.flatnonzero(np.diff(np.r_[2, drawn.T.ravel(), 2])))]
    segmentations = [
        [[4, 6, 20, 6, 20, 30, 4, 30]],
        {"size": [HEIGHT, WIDTH], "counts": runs},
        {"size": [HEIGHT, WIDTH], "counts": text},
    ]
    boxes = [{"category_id": 2, "bbox": [4, 6, 16, 24], "segmentation": each} for each in segmentations]
    write_coco(tmp_path, coco(boxes))
    train, _ = open_detection(tmp_path)
    assert train.has_outlines
    read = train.entries[0].objects.outlines
    assert read is not None
    for found in read():
        assert (found == drawn).all()
    assert unpacked(text) == runs
    without, _ = open_detection(tmp_path, masks="off")
    assert without.entries[0].objects.outlines is None


def test_packed_runs_are_those_of_coco():
    mask = pytest.importorskip("faster_coco_eval.core.mask", reason="the reference for packed runs")
    rng = np.random.default_rng(0)
    for _ in range(20):
        drawn = rng.random((17, 23)) < rng.random()
        packed = mask.encode(np.asfortranarray(drawn.astype(np.uint8)))["counts"].decode()
        outline = coco_outline({"size": [17, 23], "counts": packed})
        assert outline is not None
        assert (outline_of(outline, 17, 23) == drawn).all()


@pytest.mark.parametrize(
    "said",
    [
        {"size": [2, 2], "counts": [1, 2]},
        {"size": [2, 2], "counts": [5, -1]},
        {"size": [2, 2], "counts": "a"},
        {"size": [2, 2], "counts": "\x00"},
        {"size": [2, 2], "counts": "o" * 40},
        {"size": [2], "counts": [4]},
        {"size": [2, 2.5], "counts": [5]},
        {"size": [2, 2], "counts": 4},
        [[1, 2, 3]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [[1, 2, 3, 4, 5, 1e30]],
        ["abcdef"],
    ],
)
def test_a_segmentation_that_is_none_is_refused(said: Any):
    with pytest.raises(UserError, match=r"^has "):
        coco_outline(said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"annotations": [{"id": 3, "image_id": 9, "category_id": 2, "bbox": [1, 1, 2, 2]}]}, r"annotation 0 \(id 3\)"),
        ({"annotations": [{"id": 3, "image_id": 7, "category_id": 4, "bbox": [1, 1, 2, 2]}]}, "is of the category 4"),
        ({"annotations": [{"id": 3, "image_id": 7, "category_id": 2, "bbox": [1, 1, 2]}]}, r"annotation 0 \(id 3\)"),
        ({"annotations": [7]}, r"annotation 0"),
        ({"categories": []}, "lists no categories"),
        ({"categories": [{"id": 2, "name": "a"}, {"id": 2, "name": "b"}]}, "gives two categories one id"),
        ({"images": [{"id": 7, "file_name": "../../etc/passwd"}], "annotations": []}, "is in none of"),
        ({"images": 3}, "is no JSON of COCO"),
    ],
)
def test_a_json_file_that_is_none_is_refused(tmp_path: Path, change: dict[str, Any], words: str):
    path = write_coco(tmp_path, coco([{"category_id": 2, "bbox": [4, 6, 16, 24]}], **change))
    with pytest.raises(UserError, match=words):
        open_detection(path)


def write_yolo(root: Path, lines: str, split: str = "train") -> None:
    write_image(root / split / "images" / "a.jpg")
    path = root / split / "labels" / "a.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines)
    (root / "data.yaml").write_text("train: ../train/images\nval: val/images\nnames: [cell, plate]\n")


def test_yolo(tmp_path: Path):
    lines = ""
    for number, (_, (left, top, right, bottom)) in enumerate(BOXES):
        shares = (
            (left + right) / 2 / WIDTH,
            (top + bottom) / 2 / HEIGHT,
            (right - left) / WIDTH,
            (bottom - top) / HEIGHT,
        )
        lines += f"{number} {' '.join(map(repr, shares))}\n"
    write_yolo(tmp_path, lines)
    write_yolo(tmp_path, "1 .5 .5 .5 .5\n", "val")
    write_image(tmp_path / "val" / "images" / "b.jpg")
    train, val = open_detection(tmp_path)
    assert val is not None
    assert train.names == ("cell", "plate")
    (first, second) = boxes_of(train)
    assert (first[0], second[0]) == ("cell", "plate")
    assert np.allclose([first[1], second[1]], [box for _, box in BOXES], atol=1e-4)
    # without a text file an image is one without boxes
    assert [len(entry.objects) for entry in val.entries] == [1, 0]


def test_yolos_polygons_give_boxes_and_masks(tmp_path: Path):
    pytest.importorskip("faster_coco_eval", reason="polygons are drawn by faster-coco-eval")
    for split in ("train", "val"):
        write_yolo(tmp_path, "0 0.1 0.25 0.5 0.25 0.5 0.75 0.1 0.75\n", split)
    train, _ = open_detection(tmp_path)
    assert np.allclose(boxes_of(train)[0][1], (6, 10, 30, 30), atol=1e-4)
    read = train.entries[0].objects.outlines
    assert read is not None
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[10:30, 6:30] = True
    assert (read()[0] == expected).all()


@pytest.mark.parametrize(
    "layout", ["{part}/{split}/{name}", "{split}/{part}/{name}", "{part}/{split}_{name}", "{split}_{name}"]
)
@pytest.mark.parametrize("named", ["", "classes.txt", "labels/classes.txt"])
def test_yolo_without_a_yaml_file(tmp_path: Path, layout: str, named: str):
    """Text files in labels/ or beside their images; the classes by number, or as a list names them."""
    for split, lines in (("train", "2 .5 .5 .2 .5\n0 .25 .5 .5 .5\n"), ("val", "1 .5 .5 .2 .5\n")):
        write_image(tmp_path / layout.format(part="images", split=split, name="a.jpg"))
        label = tmp_path / layout.format(part="labels", split=split, name="a.txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(lines)
    if named:
        (tmp_path / named).parent.mkdir(exist_ok=True)
        (tmp_path / named).write_text("cell\nplate \nrod\n\n")
    train, val = open_detection(tmp_path)
    names = ("cell", "plate", "rod") if named else ("0", "1", "2")
    assert train.names == names
    assert [name for name, _ in boxes_of(train)][:2] == [names[2], names[0]]
    assert np.allclose(boxes_of(train)[0][1], (24, 10, 36, 30), atol=1e-4)
    assert (val is None) == (not layout.startswith(("{part}/{split}/", "{split}/")))
    assert len(train) == (2 if val is None else 1)
    assert any("called by their numbers" in note for note in train.notes) == (not named)


def test_what_is_wrong_in_a_folder_of_yolos_without_a_yaml_file(tmp_path: Path):
    write_image(tmp_path / "images" / "a.jpg")
    with pytest.raises(UserError, match="holds no images with boxes"):
        open_detection(tmp_path)
    label = tmp_path / "labels" / "a.txt"
    label.parent.mkdir()
    label.write_text("1000000 .5 .5 .1 .1\n")
    with pytest.raises(UserError, match=r"a\.txt, line 1: class 1000000 of 10000 from 0 on"):
        open_detection(tmp_path)
    label.write_text("1 .5 .5 .1 .1\n")
    (tmp_path / "classes.txt").write_text("cell\n")
    with pytest.raises(UserError, match=r"a\.txt, line 1: class 1 of 1 from 0 on"):
        open_detection(tmp_path)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("2 .5 .5 .1 .1\n", r"a\.txt, line 1: class 2 of 2 from 0 on"),
        ("0 .5 .5 .1 .1\n-1 .5 .5 .1 .1\n", r"a\.txt, line 2: class -1 of 2"),
        ("0 .5 .5 .1\n", "line 1: it is no class with a box or a polygon"),
        ("0.5 .5 .5 .1 .1\n", "line 1: it is no class with a box or a polygon"),
        ("nan .5 .5 .1 .1\n", "line 1: it is no class with a box or a polygon"),
        ("cell .5 .5 .1 .1\n", "line 1: it is no class with a box or a polygon"),
    ],
)
def test_a_line_that_is_no_box_is_refused(tmp_path: Path, lines: str, words: str):
    write_yolo(tmp_path, lines)
    with pytest.raises(UserError, match=words):
        open_detection(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("names: 3\ntrain: train/images\n", "`names` must list"),
        ("- a\n", "must hold names"),
        ("{", "is no YAML"),
        ("names: [a, b]\ntrain: /etc\n", "its folder /etc is not in"),
        ("names: [a, b]\n", "names no folder of images"),
        ("!!python/object/apply:os.system ['true']\n", "is no YAML"),
    ],
)
def test_a_yaml_file_that_is_none_is_refused(tmp_path: Path, text: str, words: str):
    write_yolo(tmp_path, "0 .5 .5 .1 .1\n")
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        open_detection(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_turns_boxes_as_it_turns_pixels(orientation: int):
    drawn = np.zeros((HEIGHT, WIDTH), bool)
    drawn[6:30, 4:20] = True
    found = turned_boxes(np.array([[4.0, 6.0, 20.0, 30.0]]), orientation, HEIGHT, WIDTH)[0]
    rows, columns = np.nonzero(turned(drawn, orientation))
    assert found.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("said", ["as stored", "upright", "not at all"])
def test_exif_turns_boxes_with_their_image(tmp_path: Path, said: str):
    size = {"as stored": (WIDTH, HEIGHT), "upright": (HEIGHT, WIDTH), "not at all": (0, 0)}[said]
    image = {"id": 7, "file_name": "a.jpg", "width": size[0], "height": size[1]}
    box = {"category_id": 2, "bbox": [4, 6, 16, 24], "segmentation": [[4, 6, 20, 6, 20, 30, 4, 30]]}
    write_coco(tmp_path, coco([box], images=[image]))
    write_image(tmp_path / "train" / "a.jpg", orientation=6)
    train, _ = open_detection(tmp_path, masks="off")
    entry = train.entries[0]
    assert (entry.height, entry.width) == (WIDTH, HEIGHT) == entry.read().shape[:2]
    # a quarter to the right: what was at the left is at the top
    assert boxes_of(train) == [("cell", (4, 6, 20, 30) if said == "upright" else (10, 4, 34, 20))]


def test_what_holds_no_boxes_is_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        open_detection(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no images with boxes: JPEGImages/ beside"):
        open_detection(tmp_path)
    write_voc(tmp_path, "a", [])
    with pytest.raises(UserError, match=r"none of its 1 images has a box to train on"):
        open_detection(tmp_path)


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
@pytest.mark.parametrize("said", [None, 5, {"a": 1}, "x"])
def test_parts_of_a_coco_file_that_are_no_lists(tmp_path: Path, part: str, said: object):
    write_coco(tmp_path, coco([{"category_id": 5, "bbox": [1, 1, 9, 9]}]) | {part: said})
    with pytest.raises(UserError, match=r"train\.json is no JSON of COCO: .* must be lists"):
        open_detection(tmp_path)


def test_a_category_without_a_name(tmp_path: Path):
    write_coco(tmp_path, coco([]) | {"categories": [{"id": 1, "name": None}]})
    with pytest.raises(UserError, match="a category has no name"):
        open_detection(tmp_path)


def test_one_object_without_a_mask_is_spoken_of(tmp_path: Path):
    whole = {"category_id": 5, "bbox": [1, 1, 9, 9], "segmentation": [[1, 1, 10, 1, 10, 10]]}
    write_coco(tmp_path, coco([whole, whole | {"segmentation": []}]))
    train, _ = open_detection(tmp_path)
    assert not train.has_outlines
    assert "warning: 1 of 2 boxes have no mask: boxes alone are learnt" in train.notes
    assert not any("no mask" in note for note in open_detection(tmp_path, masks="off")[0].notes)


def test_label_files_in_capitals_and_hidden_ones(tmp_path: Path):
    """Also what macOS and notebooks leave beside a user's files, and the mark that Windows begins a text with."""
    write_yolo(tmp_path / "yolo", "\ufeff0 .5 .5 .5 .5\n")
    (tmp_path / "yolo/train/labels/a.txt").rename(tmp_path / "yolo/train/labels/a.TXT")
    write_yolo(tmp_path / "yolo", "0 .5 .5 .5 .5\n", "val")
    write_voc(tmp_path / "voc", "a", BOXES)
    (tmp_path / "voc/Annotations/a.xml").rename(tmp_path / "voc/Annotations/a.XML")
    write_image(tmp_path / "voc/JPEGImages/b.jpg")
    for folder in ("yolo/train/images", "voc/JPEGImages"):
        (tmp_path / folder / "._a.jpg").write_bytes(b"\0\5\x16\7")
        write_image(tmp_path / folder / ".ipynb_checkpoints" / "a.jpg")
    (tmp_path / "voc/Annotations/._a.xml").write_bytes(b"\0\5\x16\7")
    yolo, voc = (open_detection(tmp_path / name)[0] for name in ("yolo", "voc"))
    assert [len(entry.objects) for entry in yolo.entries] == [1]
    assert boxes_of(voc) == BOXES
    assert any("1 images without an XML file are left out" in note and "b.jpg" in note for note in voc.notes)


def test_names_with_spaces_in_a_list(tmp_path: Path):
    write_voc(tmp_path, "my image", BOXES)
    path = tmp_path / "ImageSets" / "Main" / "train.txt"
    path.parent.mkdir(parents=True)
    path.write_text("my image\n")
    assert len(open_detection(tmp_path)[0]) == 1


def test_an_empty_line_between_classes(tmp_path: Path):
    write_image(tmp_path / "images" / "a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("1 .5 .5 .5 .5\n")
    (tmp_path / "classes.txt").write_text("x\n\nz\n")
    with pytest.raises(UserError, match=r"classes\.txt, line 2: it is empty"):
        open_detection(tmp_path)


@pytest.mark.parametrize("more", ["", "<difficult>1</difficult>"])
def test_sets_in_which_nothing_counts(tmp_path: Path, more: str):
    write_voc(tmp_path / "whole", "a", BOXES)
    write_voc(tmp_path / "empty", "a", BOXES if more else [], more)
    with pytest.raises(UserError, match=r"none of its 1 images has a box to test on; [12] "):
        open_detection(tmp_path / "whole", tmp_path / "empty")
    with pytest.raises(UserError, match=r"none of its 1 images has a box to train on; [12] "):
        open_detection(tmp_path / "empty")


def test_boxes_in_pixels_where_shares_belong(tmp_path: Path):
    write_yolo(tmp_path, "0 .5 .5 .5 .5\n", "val")
    write_yolo(tmp_path, "0 30 20 10 10\n")
    with pytest.raises(UserError, match="has a box to train on; 1 boxes outside their image are left out"):
        open_detection(tmp_path)


def test_a_list_of_the_names_in_the_files(tmp_path: Path):
    write_voc(tmp_path, "a", BOXES)
    (tmp_path / "classes.json").write_text('["plate", "cell"]')
    train, _ = open_detection(tmp_path, classes=tmp_path / "classes.json")
    assert train.names == ("plate", "cell")
    assert boxes_of(train) == BOXES
