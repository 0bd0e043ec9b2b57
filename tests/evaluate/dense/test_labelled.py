"""Sets of images with dense labels, whatever files they came in."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpmae.evaluate.dense.box_sets import open_detection
from fastpmae.evaluate.dense.labelled import IGNORE, Boxed, Detection, Masked, Objects, Segmentation, same_images
from fastpmae.evaluate.dense.sets import open_segmentation
from tests.evaluate.dense.made import scene


def masked(name: str, digest: str = "") -> Masked:
    return Masked(name, lambda: (np.zeros((2, 3, 3), np.uint8), np.full((2, 3), IGNORE, np.int16)), digest)


def boxed(name: str, *boxes: tuple[float, float, float, float]) -> Boxed:
    count = len(boxes)
    found = Objects(
        np.array(boxes, np.float32).reshape(-1, 4), np.ones(count, np.int64), np.zeros(count, bool), np.ones(count)
    )
    return Boxed(name, 8, 9, found, lambda: np.zeros((8, 9, 3), np.uint8))


def test_a_segmentation_set_is_told_by_its_masks_and_not_by_its_place():
    one = Segmentation(Path("a"), ("sky", "road"), (masked("1.png", "x"),)).describe()
    same = Segmentation(Path("b"), ("sky", "road"), (masked("1.png", "x"),)).describe()
    others = [
        Segmentation(Path("a"), ("sky", "tree"), (masked("1.png", "x"),)).describe(),
        Segmentation(Path("a"), ("sky", "road"), (masked("1.png", "y"),)).describe(),
        Segmentation(Path("a"), ("sky", "road"), (masked("1.png", "x"), masked("2.png", "x"))).describe(),
    ]
    assert one["fingerprint"] == same["fingerprint"]
    assert len({one["fingerprint"], *(other["fingerprint"] for other in others)}) == 4
    assert (one["images"], others[2]["images"]) == (1, 2)


def test_a_detection_set_is_told_by_its_boxes():
    one = Detection(Path("a"), ("cell",), (boxed("1.png", (0, 0, 4, 4)), boxed("2.png"))).describe()
    same = Detection(Path("b"), ("cell",), (boxed("1.png", (0, 0, 4, 4)), boxed("2.png"))).describe()
    other = Detection(Path("a"), ("cell",), (boxed("1.png", (0, 0, 4, 5)), boxed("2.png"))).describe()
    assert one["fingerprint"] == same["fingerprint"] != other["fingerprint"]
    assert (one["images"], one["boxes"]) == (2, 1)


@pytest.mark.parametrize("layout", ["masks", "coco", "voc", "yolo", "parquet"])
def test_a_set_is_the_same_however_its_folder_is_called(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A training is resumed where its images were moved, or are named from another folder."""
    found, folder = [], tmp_path / "set"
    folder.mkdir()
    pixels, mask, _ = scene(1)
    for number in (1, 2):
        place = folder / ("JPEGImages" if layout == "voc" else "images") / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(place)
    named = Path("set")
    match layout:
        case "masks":
            (folder / "masks").mkdir()
            for number in (1, 2):
                Image.fromarray(mask.clip(0).astype(np.uint8)).save(folder / "masks" / f"{number}.png")
        case "parquet":
            parquet = pytest.importorskip("pyarrow.parquet")
            table = pytest.importorskip("pyarrow").table
            files = [io.BytesIO(), io.BytesIO()]
            for file, array in zip(files, (pixels, mask.clip(0).astype(np.uint8)), strict=True):
                Image.fromarray(array).save(file, "PNG")
            columns = {name: [file.getvalue()] * 2 for name, file in zip(("image", "mask"), files, strict=True)}
            parquet.write_table(table(columns), folder / "train-0.parquet")
        case "coco":
            images = [{"id": number, "file_name": f"{number}.png"} for number in (1, 2)]
            box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 12]}
            (folder / "annotations").mkdir()
            named /= "annotations/instances.json"
            said = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "cell"}]}
            (tmp_path / named).write_text(json.dumps(said))
        case "voc":
            (folder / "Annotations").mkdir()
            box = "<xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax>"
            thing = f"<object><name>cell</name><bndbox>{box}</bndbox></object>"
            for number in (1, 2):
                (folder / "Annotations" / f"{number}.xml").write_text(f"<annotation>{thing}</annotation>")
            (folder / "ImageSets/Main").mkdir(parents=True)
            named /= "ImageSets/Main/train.txt"
            (tmp_path / named).write_text("1\n2\n")
        case "yolo":
            (folder / "labels").mkdir()
            (folder / "labels/1.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    for where, path in ((tmp_path, named), (tmp_path, tmp_path / named), (folder, Path("..") / named)):
        monkeypatch.chdir(where)
        opened = open_segmentation(path) if layout in ("masks", "parquet") else open_detection(path)
        found.append(opened[0].describe())
    folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    moved = Path("moved", *named.parts[1:])
    opened = open_segmentation(moved) if layout in ("masks", "parquet") else open_detection(moved)
    found.append(opened[0].describe())
    assert len({each["fingerprint"] for each in found}) == 1
    assert found[0]["images"] == 2
    # the images are told apart by their folders and names all the same
    assert same_images(found[0], found[-1])
    if layout == "masks":
        (tmp_path / "moved/images/2.png").rename(tmp_path / "moved/images/3.png")
        (tmp_path / "moved/masks/2.png").rename(tmp_path / "moved/masks/3.png")
        assert not same_images(open_segmentation(moved)[0].describe(), found[0])


def test_what_an_earlier_version_called_a_set_is_still_its_name():
    """Its digest, of 16 digits: of the classes, a gap, and the files' names as they were given with their contents."""
    words = [b"sky", b"road", b"", b"a/images/1.pngx", b"a/images/2.pngy"]
    digest = hashlib.sha256(b"".join(word + b"\0" for word in words)).hexdigest()[:16]
    now = Segmentation(Path("a"), ("sky", "road"), (masked("a/images/1.png", "x"), masked("a/images/2.png", "y")))
    assert now.describe()["fingerprint"] != digest
    assert same_images({"fingerprint": digest}, now.describe())
