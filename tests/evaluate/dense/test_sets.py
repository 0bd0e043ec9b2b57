"""Images with masks in the layouts that people have them in, each written here and read again; and what goes wrong."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastpmae import UserError
from fastpmae.evaluate.dense import sets
from fastpmae.evaluate.dense.box_sets import open_detection
from fastpmae.evaluate.dense.classes import CITYSCAPES, VOC
from fastpmae.evaluate.dense.labelled import IGNORE, Segmentation
from fastpmae.evaluate.dense.masks import turned
from fastpmae.evaluate.dense.sets import open_segmentation
from fastpmae_loaders.sources import reading
from tests.made import made_image

WIDTH, HEIGHT = 40, 30


def ids(seed: int, values: list[int]) -> np.ndarray:
    """A mask of blocks, in which each value occurs."""
    rng = np.random.default_rng(seed)
    coarse = rng.permutation(np.resize(values, 30)).reshape(5, 6)
    return np.asarray(Image.fromarray(coarse.astype(np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST))


def write(path: Path, image: Image.Image | np.ndarray, **settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **settings)
    return path


def write_pairs(
    root: Path, values: list[int], count: int = 2, masks: str = "masks", of: str = "{:02d}"
) -> list[np.ndarray]:
    """images/ and masks/ under a folder; the masks."""
    made = [ids(seed, values) for seed in range(count)]
    for number, mask in enumerate(made):
        write(root / "images" / f"{of.format(number)}.jpg", made_image(number, WIDTH, HEIGHT))
        write(root / masks / f"{of.format(number)}.png", mask)
    return made


def masks_of(opened: Segmentation) -> list[np.ndarray]:
    return [entry.read()[1] for entry in opened.entries]


def classes_file(root: Path, said: object) -> Path:
    path = root / "classes.json"
    path.write_text(json.dumps(said))
    return path


@pytest.mark.parametrize("masks", ["masks", "annotations", "labels"])
@pytest.mark.parametrize("layout", ["split/images", "images/split", "flat"])
def test_folders_of_images_and_masks(tmp_path: Path, masks: str, layout: str):
    if layout == "split/images":
        made = {split: write_pairs(tmp_path / split, [0, 2, 7], masks=masks) for split in ("train", "val", "test")}
    elif layout == "images/split":
        made = {}
        for split in ("training", "validation"):
            made[split] = write_pairs(tmp_path / "x" / split, [0, 2, 7], masks=masks)
            for part in ("images", masks):
                (tmp_path / part).mkdir(exist_ok=True)
                (tmp_path / "x" / split / part).rename(tmp_path / part / split)
    else:
        made = {"all": write_pairs(tmp_path, [0, 2, 7], masks=masks)}
    train, val = open_segmentation(tmp_path)
    assert train.names == ("0", "2", "7")
    wanted = list(made.values())
    for opened, expected in zip([train, val], wanted, strict=False):
        assert opened is not None
        for found, mask in zip(masks_of(opened), expected, strict=True):
            assert found.dtype == np.int16
            assert (np.array([0, 2, 7])[found] == mask).all()
    assert (val is None) == (layout == "flat")
    image, _ = train.entries[0].read()
    assert image.shape == (HEIGHT, WIDTH, 3)


def test_a_second_folder_is_tested_on(tmp_path: Path):
    write_pairs(tmp_path / "a", [0, 1], count=3)
    write_pairs(tmp_path / "b" / "val", [0, 1, 3], count=1)
    train, val = open_segmentation(tmp_path / "a", tmp_path / "b")
    assert val is not None
    assert (len(train), len(val)) == (3, 1)
    assert train.names == val.names == ("0", "1", "3")
    assert train.describe()["fingerprint"] != val.describe()["fingerprint"]


def test_masks_may_end_otherwise_than_their_images(tmp_path: Path):
    write_pairs(tmp_path, [0, 1])
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_L.png"))
    train, _ = open_segmentation(tmp_path)
    assert len(train) == 2
    assert not train.notes


@pytest.mark.parametrize("lonely", ["aa", "zz", "0"])
def test_an_end_is_that_of_most_masks(tmp_path: Path, lonely: str):
    """An image without a mask is left out as among masks of the images' own names, wherever it stands."""
    write_pairs(tmp_path, [0, 1], count=3)
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_L.png"))
    write(tmp_path / "images" / f"{lonely}.jpg", made_image(5, WIDTH, HEIGHT))
    train, _ = open_segmentation(tmp_path)
    assert [Path(entry.name).stem for entry in train.entries] == ["00", "01", "02"]
    assert "1 files without a mask are left out" in train.notes[0]
    assert f"{lonely}.jpg" in train.notes[0]
    # of half of the images it may be chance
    for name in ("b", "c"):
        write(tmp_path / "images" / f"{name}.jpg", made_image(5, WIDTH, HEIGHT))
    with pytest.raises(UserError, match="holds no mask of the name of an image"):
        open_segmentation(tmp_path)


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_of_an_image_the_header_alone_is_read_when_a_set_is_opened(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    write_pairs(tmp_path, [0, 1])
    if kind == "boxes":
        for path in (tmp_path / "masks").iterdir():
            path.with_suffix(".txt").write_text("0 0.5 0.5 0.5 0.5")
        (tmp_path / "masks").rename(tmp_path / "labels")
    for path in (tmp_path / "images").iterdir():  # what follows a JPEG's end is passed over
        path.write_bytes(path.read_bytes() + bytes(1 << 20))
    read: list[int] = []

    class Counting(io.FileIO):
        def readinto(self, buffer: Any, /) -> int | None:
            read.append(count := super().readinto(buffer) or 0)
            return count

    monkeypatch.setattr(reading.os, "fdopen", lambda number, _: io.BufferedReader(Counting(number)))
    used: list[int] = []
    monkeypatch.setattr(sets, "loader_threads", lambda asked: used.append(asked) or 1)
    if kind == "masks":
        opened, _ = open_segmentation(tmp_path, threads=3)
    else:
        opened, _ = open_detection(tmp_path, threads=3)
    assert len(opened) == 2
    assert used == [3]
    assert 0 < sum(read) < 1 << 19


def test_images_without_a_mask_are_said(tmp_path: Path):
    write_pairs(tmp_path, [0, 1])
    write(tmp_path / "images" / "zz.jpg", made_image(5, WIDTH, HEIGHT))
    train, _ = open_segmentation(tmp_path)
    assert len(train) == 2
    assert "1 files without a mask are left out" in train.notes[0]


def test_ade20k_counts_from_one(tmp_path: Path):
    made = {}
    for split, name in (("training", "ADE_train_{:08d}"), ("validation", "ADE_val_{:08d}")):
        made[split] = write_pairs(tmp_path / "x", [0, 1, 3, 150], masks="annotations", of=name)
        for part in ("images", "annotations"):
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / "x" / part).rename(tmp_path / part / split)
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.15\t11664\t1172\t1\twall\n3\t0.1\t1\t1\t1\tsky, blue\n"
    )
    train, val = open_segmentation(tmp_path)
    assert val is not None
    assert len(train.names) == 150
    assert train.names[:3] == ("wall", "2", "sky")
    for found, mask in zip(masks_of(train), made["training"], strict=True):
        assert (found == np.where(mask == 0, IGNORE, mask.astype(int) - 1)).all()


def test_cityscapes_has_19_classes(tmp_path: Path):
    for split in ("train", "val", "test"):
        mask = ids(3, [0, 3, 7, 11, 33, 29])
        stem = f"{split}_city/city_000001_000019"
        write(tmp_path / "leftImg8bit" / split / f"{stem}_leftImg8bit.png", made_image(1, WIDTH, HEIGHT))
        write(tmp_path / "gtFine" / split / f"{stem}_gtFine_labelIds.png", mask)
        write(tmp_path / "gtFine" / split / f"{stem}_gtFine_color.png", made_image(2, WIDTH, HEIGHT))
    train, val = open_segmentation(tmp_path)
    assert val is not None
    assert len(train.names) == 19
    found = masks_of(train)[0]
    order = list(CITYSCAPES)
    assert (found == np.vectorize(lambda number: order.index(number) if number in order else IGNORE)(mask)).all()
    assert train.names[found[mask == 11][0]] == "building"
    assert "/val/" in val.entries[0].name


def palette_image(mask: np.ndarray) -> Image.Image:
    image = Image.frombytes("P", mask.shape[::-1], mask.tobytes())
    image.putpalette([number * 37 % 256 for number in range(768)])
    return image


def test_voc_masks_are_places_in_a_palette(tmp_path: Path):
    mask = ids(0, [0, 5, 20, 255])
    for name in ("a", "b", "c"):
        write(tmp_path / "JPEGImages" / f"{name}.jpg", made_image(1, WIDTH, HEIGHT))
    for name in ("a", "b"):
        write(tmp_path / "SegmentationClass" / f"{name}.png", palette_image(mask))
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, names in {"train": "a\n", "val": "b\n", "trainval": "a\nb\n"}.items():
        (lists / f"{split}.txt").write_text(names)
    # what convert("L") makes of such a file is not what it holds
    assert (np.asarray(palette_image(mask).convert("L")) != mask).any()
    train, val = open_segmentation(tmp_path)
    assert val is not None
    assert train.names == VOC
    assert [Path(entry.name).stem for entry in (*train.entries, *val.entries)] == ["a", "b"]
    assert (masks_of(train)[0] == np.where(mask == 255, IGNORE, mask.astype(int))).all()
    (lists / "val.txt").write_text("c\n")
    with pytest.raises(UserError, match=r"val\.txt names c, whose image or mask is not there"):
        open_segmentation(tmp_path)


def test_masks_in_colours_need_a_table(tmp_path: Path):
    mask = ids(0, [0, 1, 2])
    colours = np.array([[128, 64, 128], [70, 70, 70], [0, 0, 0]], np.uint8)
    write(tmp_path / "images" / "a.png", made_image(0, WIDTH, HEIGHT))
    write(tmp_path / "masks" / "a.png", colours[mask])
    with pytest.raises(UserError, match=r"a\.png holds colours \(RGB\): name the class of each with --classes FILE"):
        open_segmentation(tmp_path)
    said = classes_file(tmp_path, {"#804080": "road", "70 70 70": "house", "0,0,0": None})
    train, _ = open_segmentation(tmp_path, classes=said)
    assert train.names == ("road", "house")
    assert (masks_of(train)[0] == np.array([0, 1, IGNORE])[mask]).all()
    # a palette's colours are looked up where the table names colours
    coloured = Image.frombytes("P", mask.shape[::-1], mask.tobytes())
    coloured.putpalette(colours.tobytes())
    write(tmp_path / "masks" / "a.png", coloured)
    train, _ = open_segmentation(tmp_path, classes=said)
    assert (masks_of(train)[0] == np.array([0, 1, IGNORE])[mask]).all()
    said = classes_file(tmp_path, {"#804080": "road", "#464646": "house"})
    with pytest.raises(UserError, match=r"a\.png holds the colour #000000, which is none of the 2 classes"):
        open_segmentation(tmp_path, classes=said)


def test_cvats_export_of_voc_is_in_colours(tmp_path: Path):
    mask = ids(0, [0, 1])
    colours = np.array([[0, 0, 0], [250, 50, 83]], np.uint8)
    write(tmp_path / "JPEGImages" / "a.jpg", made_image(0, WIDTH, HEIGHT))
    write(tmp_path / "SegmentationClass" / "a.png", colours[mask])
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\ncell:250,50,83::\n")
    train, _ = open_segmentation(tmp_path)
    assert train.names == ("background", "cell")
    assert (masks_of(train)[0] == mask).all()


def test_classes_are_named_merged_and_ignored(tmp_path: Path):
    (mask, *_) = write_pairs(tmp_path, [0, 1, 2, 9])
    said = classes_file(tmp_path, {"0": "sky", "2": "ground", "1": "sky", "9": None})
    train, _ = open_segmentation(tmp_path, classes=said)
    assert train.names == ("sky", "ground")
    assert (masks_of(train)[0] == np.choose(np.searchsorted([0, 1, 2, 9], mask), [0, 0, 1, IGNORE])).all()
    said = classes_file(tmp_path, {"0": "sky", "1": "ground"})
    with pytest.raises(UserError, match=r"00\.png holds 2, which is none of the 2 classes: --classes FILE says"):
        open_segmentation(tmp_path, classes=said)
    train, _ = open_segmentation(tmp_path, classes=said, ignore=(2, 9))
    assert (masks_of(train)[0][mask >= 2] == IGNORE).all()
    train, _ = open_segmentation(tmp_path, classes=classes_file(tmp_path, [*"abc", *"defghij"]))
    assert train.names[9] == "j"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ('{"0": "a", "0": "b"}', "names '0' twice"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("{}", "must hold an object"),
        ('{"0": 3}', "must hold an object"),
        ('{"0": null}', "names no class"),
        ('{"sky": "a"}', "'sky' is no number of a mask"),
        ('{"#000000": "a", "1": "b"}', "'1' is no colour of a mask"),
        ('{"#000000": "a", "0 0 0": "b"}', "'0 0 0' stands there twice"),
        ('{"-1": "a"}', "'-1' is no number of a mask"),
    ],
)
def test_a_file_of_classes_that_says_nothing_is_refused(tmp_path: Path, said: str, words: str):
    write_pairs(tmp_path, [0, 1])
    (tmp_path / "c.json").write_text(said)
    with pytest.raises(UserError, match=words):
        open_segmentation(tmp_path, classes=tmp_path / "c.json")


def test_255_is_void_unless_it_may_be_a_class(tmp_path: Path):
    (mask, *_) = write_pairs(tmp_path / "a", [0, 1, 255])
    train, _ = open_segmentation(tmp_path / "a")
    assert train.names == ("0", "1")
    assert (masks_of(train)[0][mask == 255] == IGNORE).all()
    assert "255 in the masks is taken for void" in train.notes[0]
    write_pairs(tmp_path / "b", [0, 255])
    with pytest.raises(UserError, match="hold no numbers but 0 and 255: say what 255 is"):
        open_segmentation(tmp_path / "b")


def test_a_mask_in_a_lossy_file_is_refused(tmp_path: Path):
    write_pairs(tmp_path, [0, 1])
    mask = ids(0, [0, 1])
    (tmp_path / "masks" / "00.png").unlink()
    write(tmp_path / "masks" / "00.jpg", mask)
    with pytest.raises(UserError, match=r"00\.jpg is JPEG, which changes numbers as it is stored"):
        open_segmentation(tmp_path)
    # nor is one that is called otherwise
    (tmp_path / "masks" / "00.jpg").rename(tmp_path / "masks" / "00.png")
    with pytest.raises(UserError, match=r"00\.png is JPEG"):
        open_segmentation(tmp_path)


@pytest.mark.parametrize("kind", ["1", "L", "I;16"])
def test_a_mask_may_have_any_number_of_bits(tmp_path: Path, kind: str):
    mask = ids(0, [0, 1])
    write(tmp_path / "images" / "a.png", made_image(0, WIDTH, HEIGHT))
    stored = (
        Image.fromarray(mask.astype(np.uint16) * 300) if kind == "I;16" else Image.fromarray(mask * 255).convert(kind)
    )
    write(tmp_path / "masks" / "a.png", stored)
    said = {"1": {"0": "a", "1": "b"}, "L": {"0": "a", "255": "b"}, "I;16": {"0": "a", "300": "b"}}[kind]
    train, _ = open_segmentation(tmp_path, classes=classes_file(tmp_path, said))
    assert (masks_of(train)[0] == mask).all()


def test_two_sizes_are_refused_when_a_set_is_opened(tmp_path: Path):
    write_pairs(tmp_path, [0, 1])
    write(tmp_path / "masks" / "01.png", ids(0, [0, 1])[:-1])
    with pytest.raises(UserError, match=r"masks/01\.png is 40x29 pixels and its image 40x30"):
        open_segmentation(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_turns_what_is_stored(orientation: int):
    rows = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = Image.fromarray(rows)
    image.getexif()[0x0112] = orientation
    kept = io.BytesIO()
    image.save(kept, "PNG", exif=image.getexif())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(kept)))
    assert (turned(rows, orientation) == expected).all()


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
@pytest.mark.parametrize("drawn", ["as stored", "upright", "with its own"])
def test_exif_turns_the_image_and_its_mask(tmp_path: Path, orientation: int, drawn: str):
    if drawn == "upright" and orientation < 5:
        pytest.skip("nothing but its size tells that a mask is upright already")
    upright = np.zeros((HEIGHT, WIDTH), np.uint8)
    upright[:10, :5] = 1
    back = {2: 2, 3: 3, 6: 8, 8: 6}[orientation]
    stored = np.ascontiguousarray(turned(upright, back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "images" / "a.jpg", np.repeat(stored[:, :, None] * 255, 3, axis=2), exif=exif, quality=95)
    if drawn == "upright":
        write(tmp_path / "masks" / "a.png", upright)
    elif drawn == "as stored":
        write(tmp_path / "masks" / "a.png", stored)
    else:
        write(tmp_path / "masks" / "a.png", stored, exif=exif)
    train, _ = open_segmentation(tmp_path)
    image, mask = train.entries[0].read()
    assert (mask == upright).all()
    assert (np.abs(image[:, :, 0].astype(int) - 255 * upright.astype(int)) > 60).mean() < 0.02


def test_parquet_files_of_images_and_masks(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow", reason="parquet files are read by pyarrow")
    from pyarrow import parquet

    def encoded(image: Image.Image, kind: str) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind)
        return buffer.getvalue()

    made = [ids(seed, [0, 4, 255]) for seed in range(5)]
    for split, part in (("train", made[:3]), ("validation", made[3:])):
        columns = {
            "image": [{"bytes": encoded(made_image(0, WIDTH, HEIGHT), "JPEG"), "path": None} for _ in part],
            "label": [{"bytes": encoded(Image.fromarray(mask), "PNG"), "path": None} for mask in part],
        }
        (tmp_path / "data").mkdir(exist_ok=True)
        parquet.write_table(
            arrow.table(columns), tmp_path / "data" / f"{split}-00000-of-00001.parquet", row_group_size=2
        )
    train, val = open_segmentation(tmp_path)
    assert val is not None
    assert train.names == ("0", "4")
    for found, mask in zip(masks_of(train) + masks_of(val), made, strict=True):
        assert (found == np.array([0, 1, IGNORE])[np.searchsorted([0, 4, 255], mask)]).all()
    parquet.write_table(arrow.table({"image": [b"x"], "words": ["y"]}), tmp_path / "data" / "train-1.parquet")
    with pytest.raises(UserError, match="needs a column of images called image and one of masks"):
        open_segmentation(tmp_path)


def test_what_is_no_such_folder_is_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        open_segmentation(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no images with masks: images/ beside masks/"):
        open_segmentation(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_segmentation(tmp_path)
    write_pairs(tmp_path, [0, 1])
    (tmp_path / "images" / "00.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    with pytest.raises(UserError, match=r"00\.jpg does not decode|00\.jpg not an image|00\.jpg"):
        open_segmentation(tmp_path)


def test_a_mask_that_lies_on_its_side_is_refused_when_a_set_is_opened(tmp_path: Path):
    """One that is as its image lies in the file is turned with it; of an upright image there is no such excuse."""
    (mask,) = write_pairs(tmp_path, [0, 1], count=1)
    write(tmp_path / "masks" / "00.png", mask.T.copy())
    with pytest.raises(UserError, match=r"00\.png is 30x40 pixels and its image 40x30"):
        open_segmentation(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "images" / "00.jpg", made_image(0, HEIGHT, WIDTH), exif=exif)
    for stored in (mask, np.rot90(mask)):  # drawn on the upright image, and on the pixels of the file
        write(tmp_path / "masks" / "00.png", stored)
        train, _ = open_segmentation(tmp_path)
        assert (masks_of(train)[0] == mask).all()


def test_splits_of_one_meaning_belong_together(tmp_path: Path):
    for split in ("train", "val"):
        write_pairs(tmp_path / "x" / split, [0, 1])
        for part in ("images", "masks"):
            (tmp_path / part).mkdir(exist_ok=True)
            other = "validation" if (part, split) == ("masks", "val") else split
            (tmp_path / "x" / split / part).rename(tmp_path / part / other)
    write(tmp_path / "images" / "test" / "00.jpg", made_image(0, WIDTH, HEIGHT))
    train, val = open_segmentation(tmp_path)
    assert val is not None
    assert (len(train), len(val)) == (2, 2)
    assert any("test has no masks: it is left out" in note for note in train.notes)


def test_names_with_spaces_in_lists(tmp_path: Path):
    for name in ("my image", "b"):
        write(tmp_path / "JPEGImages" / f"{name}.jpg", made_image(0, WIDTH, HEIGHT))
        write(tmp_path / "SegmentationClass" / f"{name}.png", ids(0, [0, 1]))
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("my image\nb\n")
    (lists / "._train.txt").write_bytes(b"\0\5\x16\7")  # as macOS leaves them beside files on other disks
    train, _ = open_segmentation(tmp_path)
    assert [Path(entry.name).stem for entry in train.entries] == ["my image", "b"]


@pytest.mark.parametrize("number", [-1, 2**24, 10**20])
def test_what_no_mask_holds_is_not_ignored(tmp_path: Path, number: int):
    write_pairs(tmp_path, [0, 1])
    with pytest.raises(UserError, match=f"--ignore {number}: a number of a mask is between 0 and 16777215"):
        open_segmentation(tmp_path, ignore=(number,))


def test_masks_in_which_nothing_counts_are_refused(tmp_path: Path):
    write_pairs(tmp_path / "train", [0, 1, 255])
    write_pairs(tmp_path / "val", [255])
    with pytest.raises(UserError, match="its 2 masks hold nothing but what is ignored"):
        open_segmentation(tmp_path / "train", tmp_path / "val")


def test_void_of_16_bits(tmp_path: Path):
    for number, mask in enumerate(write_pairs(tmp_path, [0, 1, 2])):
        wide = np.where(mask == 2, 65535, mask.astype(np.uint16)).astype(np.uint16)
        write(tmp_path / "masks" / f"{number:02d}.png", wide)
    train, _ = open_segmentation(tmp_path)
    assert train.names == ("0", "1")
    assert "65535 in the masks is taken for void; --classes FILE says otherwise" in train.notes
    for number, mask in enumerate(write_pairs(tmp_path, [0, 1])):
        write(tmp_path / "masks" / f"{number:02d}.png", mask.astype(np.uint16) * 65535)
    with pytest.raises(UserError, match="hold no numbers but 0 and 65535: say what 65535 is"):
        open_segmentation(tmp_path)
