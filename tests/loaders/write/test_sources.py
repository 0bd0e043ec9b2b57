"""How a source is understood: classes, splits, shards, tables, and everything that is no image."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.write.cli import read_command
from fastpmae_loaders.write.sources import Listing, SourceSettings, find_images, read_item
from tests.made import made_image


def picture(seed: int = 0, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    made_image(seed, 40, 30).save(buffer, form)
    return buffer.getvalue()


def tree(folder: Path, *names: str, content: bytes | None = None) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture() if content is None else content)
    return folder


def listed(source: Listing, folder: Path) -> list[tuple[str, int]]:
    return [(str(Path(item.path).relative_to(folder)), item.label) for item in source.items]


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    tree(tmp_path, "zebra/1.jpg", "zebra/sub/0.PNG", "ant/b.jpg", "ant/a.JPEG", "Bee/x.webp")
    source = find_images(tmp_path)
    assert source.class_names == ["Bee", "ant", "zebra"]  # as torchvision's ImageFolder sorts them
    assert listed(source, tmp_path) == [
        ("Bee/x.webp", 0), ("ant/a.JPEG", 1), ("ant/b.jpg", 1), ("zebra/1.jpg", 2), ("zebra/sub/0.PNG", 2),
    ]  # fmt: skip


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = find_images(tree(tmp_path, "2.jpg", "10.jpg"))
    assert listed(source, tmp_path) == [("10.jpg", -1), ("2.jpg", -1)]
    assert source.class_names is None
    assert "no labels" in source.notes[0]


def test_one_file(tmp_path: Path) -> None:
    source = find_images(tree(tmp_path, "2.jpg") / "2.jpg")
    assert [Path(item.path) for item in source.items] == [tmp_path / "2.jpg"]


def test_split_folders(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/c/4.jpg")
    source = find_images(tmp_path)
    assert listed(source, tmp_path) == [("train/a/1.jpg", 0), ("train/b/2.jpg", 1)]
    assert "train" in source.notes[0]
    assert "val (2 files)" in source.notes[0]
    assert listed(find_images(tmp_path, SourceSettings(split="val")), tmp_path)[1] == ("val/c/4.jpg", 1)
    everything = find_images(tmp_path, SourceSettings(split="all"))
    assert everything.class_names == ["a", "b", "c"]
    assert [label for _, label in listed(everything, tmp_path)] == [0, 1, 0, 2]
    with pytest.raises(UserError, match="no split 'test': it has train, val"):
        find_images(tmp_path, SourceSettings(split="test"))


def test_a_single_split_within_a_folder(tmp_path: Path) -> None:
    tree(tmp_path, "LICENSE", "images/README", content=b"text")
    source = find_images(tree(tmp_path, "images/train/a/1.jpg", "images/train/b/2.jpg"))
    assert source.class_names == ["a", "b"]
    assert source.passed_over == 2


@pytest.mark.parametrize(
    "other", ["holdout", "val2017", "evaluation", "hold-out", "test_images", "Valid_64x64", "old_val"]
)
def test_splits_by_other_names(tmp_path: Path, other: str) -> None:
    tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", f"{other}/a/3.jpg", f"{other}/b/4.jpg")
    source = find_images(tmp_path)
    assert listed(source, tmp_path) == [("train/a/1.jpg", 0), ("train/b/2.jpg", 1)]
    assert f"not taken: {other.lower()} (2 files)" in source.notes[0]
    assert len(find_images(tmp_path, SourceSettings(split=other)).items) == 2
    assert len(find_images(tmp_path, SourceSettings(split="all")).items) == 4
    as_classes = find_images(tmp_path, SourceSettings(split="none"))
    assert as_classes.class_names is not None
    assert set(as_classes.class_names) == {"train", other}


def test_numbered_splits(tmp_path: Path) -> None:
    tree(tmp_path, "train2017/1.jpg", "val2017/2.jpg")
    source = find_images(tmp_path)
    assert listed(source, tmp_path) == [("train2017/1.jpg", -1)]
    assert listed(find_images(tmp_path, SourceSettings(split="val")), tmp_path) == [("val2017/2.jpg", -1)]


@pytest.mark.parametrize("beside", ["docs/preview.jpg", "docs/deep/preview.jpg", "preview.jpg"])
def test_a_picture_beside_splits_makes_no_classes_of_them(tmp_path: Path, beside: str) -> None:
    tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", beside)
    source = find_images(tmp_path)
    assert source.class_names == ["a", "b"]
    assert listed(source, tmp_path) == [("train/a/1.jpg", 0), ("train/b/2.jpg", 1)]
    notes = " ".join(source.notes)
    assert "not taken: val (1 files)" in notes
    assert ("docs (1 files)" if "docs" in beside else "1 images beside") in notes
    assert len(find_images(tmp_path, SourceSettings(split="all")).items) == 3


def test_splits_in_one_folder_of_several_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, "set/train/a/1.jpg", "set/val/a/2.jpg", "docs/preview.jpg")
    with pytest.raises(UserError, match=rf"splits train, val in set and images elsewhere: name {tmp_path}/set"):
        find_images(tmp_path)
    assert len(find_images(tmp_path, SourceSettings(split="all")).items) == 3


def test_splits_within_classes(tmp_path: Path) -> None:
    tree(tmp_path, "bolt/train/1.jpg", "bolt/test/2.jpg", "nut/train/good/3.jpg", "nut/test/bad/4.jpg")
    source = find_images(tmp_path)
    assert listed(source, tmp_path) == [("bolt/train/1.jpg", 0), ("nut/train/good/3.jpg", 1)]
    assert "not taken: test (2 files)" in source.notes[0]
    assert len(find_images(tmp_path, SourceSettings(split="test")).items) == 2


def test_a_folder_that_may_be_a_split_or_a_class(tmp_path: Path) -> None:
    vehicles = tree(tmp_path / "vehicles", "bus/1.jpg", "train/2.jpg", "truck/3.jpg")
    source = find_images(vehicles)
    assert source.class_names == ["bus", "train", "truck"]
    assert "folder train is taken for a class" in " ".join(source.notes)
    assert listed(find_images(vehicles, SourceSettings(split="train")), vehicles) == [("train/2.jpg", -1)]
    assert find_images(vehicles, SourceSettings(split="none")).notes == []
    for name in ("train_station", "test_tube", "latest", "bullet_train", "invalid", "contest"):
        assert find_images(tree(tmp_path / name, f"{name}/1.jpg", "b/2.jpg")).notes == []
    doubtful = tree(tmp_path / "doubtful", "train/a/1.jpg", "extra/2.jpg")
    with pytest.raises(UserError, match="folder train beside extra: is it a split or a class"):
        find_images(doubtful)
    assert find_images(doubtful, SourceSettings(split="train")).class_names == ["a"]
    assert find_images(doubtful, SourceSettings(split="none")).class_names == ["extra", "train"]


def test_folders_of_programs_are_no_classes(tmp_path: Path) -> None:
    tree(
        tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", ".ipynb_checkpoints/1-checkpoint.jpg",
        "train/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "train/b/.thumbnails/2.jpg", "train/a/Thumbnails/1.jpg",
        ".cache/set.tar", ".git/config",
    )  # fmt: skip
    source = find_images(tmp_path)
    assert listed(source, tmp_path) == [("train/a/1.jpg", 0), ("train/b/2.jpg", 1)]
    assert source.class_names == ["a", "b"]
    note = " ".join(source.notes)
    for told in (".cache (1)", ".ipynb_checkpoints (1)", ".thumbnails (1)", "@eaDir (1)", "Thumbnails (1)"):
        assert told in note
    assert ".git" not in note
    with pytest.raises(UserError, match=r"no images .*@eaDir \(1\)"):
        find_images(tree(tmp_path / "only", "@eaDir/1.jpg"))
    assert len(find_images(tmp_path / ".ipynb_checkpoints").items) == 1


def test_two_links_to_one_folder(tmp_path: Path) -> None:
    tree(tmp_path, "pool/x/1.jpg", "pool/y/2.jpg")
    (tmp_path / "set").mkdir()
    for name, target in (("first", "x"), ("second", "x"), ("third", "y")):
        (tmp_path / "set" / name).symlink_to(tmp_path / "pool" / target)
    source = find_images(tmp_path / "set")
    assert source.class_names == ["first", "second", "third"]
    assert [item.label for item in source.items] == [0, 1, 2]
    assert source.notes == ["first and second are one folder by two names: its images are there under each."]


def test_splits_without_train_must_be_chosen(tmp_path: Path) -> None:
    tree(tmp_path, "val/a/1.jpg", "test/a/1.jpg")
    with pytest.raises(UserError, match="--split"):
        find_images(tmp_path)


def test_flat_splits(tmp_path: Path) -> None:
    source = find_images(tree(tmp_path, "train/1.jpg", "test/2.jpg"))
    assert listed(source, tmp_path) == [("train/1.jpg", -1)]
    assert source.class_names is None


def test_loose_images_beside_classes(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.jpg", "b/1.jpg", "loose.jpg")
    with pytest.raises(UserError, match="--flat"):
        find_images(tmp_path)
    assert len(find_images(tmp_path, SourceSettings(flat=True)).items) == 3


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    tree(tmp_path, "a.jpg", "without_suffix", "odd.weird")
    tree(tmp_path, "README", "notes.txt", ".DS_Store", "._a.jpg", "data.bin", content=b"\0\1\2\3hello")
    source = find_images(tmp_path)
    assert [name for name, _ in listed(source, tmp_path)] == ["a.jpg", "odd.weird", "without_suffix"]
    assert source.passed_over == 5


def test_nothing_to_list(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    tree(tmp_path, "packed/set.tar.gz", content=b"hello")
    tree(tmp_path, "text/readme.txt", content=b"hello")
    for name, says in [("missing", "does not exist"), ("empty", "no images"), ("text", r"no images \(1 other"),
                       ("text/readme.txt", "no images"), ("packed", "unpack"), ("a\0b", "does not exist")]:  # fmt: skip
        with pytest.raises(UserError, match=says):
            find_images(f"{tmp_path}/{name}")


def test_links(tmp_path: Path) -> None:
    tree(tmp_path, "set/a/1.jpg", "set/b/2.jpg", "elsewhere/3.jpg")
    (tmp_path / "set/a/up").symlink_to("..")
    (tmp_path / "set/b/self").symlink_to(".")
    (tmp_path / "set/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/a/broken.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "set/a/circle.jpg").symlink_to("circle.jpg")
    (tmp_path / "set/a/alias.jpg").symlink_to("1.jpg")
    os.mkfifo(tmp_path / "set/a/pipe.jpg")
    source = find_images(tmp_path / "set")
    good = [(Path(item.path).name, item.label) for item in source.items if item.kind == "file"]
    assert good == [("1.jpg", 0), ("alias.jpg", 0), ("2.jpg", 1), ("3.jpg", 2)]
    bad = {Path(item.path).name: item.where[0] for item in source.items if item.kind == "bad"}
    assert bad == {
        "broken.jpg": "a link to nothing", "circle.jpg": "a link to nothing", "pipe.jpg": "not a regular file",
    }  # fmt: skip


def test_links_that_fan_out_end(tmp_path: Path) -> None:
    for name in "abcdefgh":
        tree(tmp_path, f"{name}/1.jpg")
    for name in "abcdefgh":
        for other in "abcdefgh":
            (tmp_path / name / f"to_{other}").symlink_to(f"../{other}")
    assert 8 <= len(find_images(tmp_path).items) <= 200


def test_names_with_odd_bytes(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 \xff")
    tree(folder, os.fsdecode(b"a\nb\x1b[31m\xfe.jpg"))
    source = find_images(tmp_path)
    assert read_item(source.items[0]) == picture()
    assert source.items[0].name.isprintable()
    assert source.class_names is not None
    assert source.class_names == [printable(folder.name)]
    source.class_names[0].encode()


def shard(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as file:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def test_shards_with_numbers(tmp_path: Path) -> None:
    one = [("./a/001.jpg", picture(1)), ("./a/001.cls", b"7\n"), ("./a/001.json", b'{"label": 3}')]
    two = [("002.cls", b"2"), ("002.seg.png", picture(9, "PNG")), ("003.PNG", picture(3, "PNG")),
           ("003.json", b'{"cls": 5}'), ("004.jpg", picture(4)), ("004.txt", b"words"), ("__meta__", b"x")]  # fmt: skip
    shard(tmp_path / "set-000.tar", one)
    shard(tmp_path / "set-001.tar", two, format=tarfile.PAX_FORMAT)
    source = find_images(tmp_path)
    assert [(Path(item.path).name, item.where[2], item.label) for item in source.items] == [
        ("set-000.tar", "./a/001.jpg", 7), ("set-001.tar", "002.seg.png", 2), ("set-001.tar", "003.PNG", 5),
        ("set-001.tar", "004.jpg", -1),
    ]  # fmt: skip
    assert source.class_names is None
    assert "1 images have no label" in " ".join(source.notes)
    assert source.passed_over == 2
    assert read_item(source.items[0]) == picture(1)
    assert read_item(source.items[2]) == picture(3, "PNG")
    assert len(find_images(tmp_path / "set-000.tar").items) == 1


@pytest.mark.parametrize(
    "pattern", ["photos/2023.05.{:02d} cat.{}", "vid_0.5fps.frame{:03d}.{}", "__{}.1.{}", "x.{}.{}"]
)
def test_shards_of_names_with_dots_lose_nothing(tmp_path: Path, pattern: str) -> None:
    """Their labels are in files of the same whole name."""
    members = []
    for i in range(12):
        members += [(pattern.format(i, "jpg"), picture(i)), (pattern.format(i, "cls"), b"%d" % (i % 5))]
    source = find_images(shard(tmp_path / "a.tar", members))
    assert [read_item(item) for item in source.items] == [picture(i) for i in range(12)]
    assert [item.label for item in source.items] == [i % 5 for i in range(12)]
    assert source.passed_over == 0
    if not pattern.startswith("__"):
        note = next(note for note in source.notes if "12 images share" in note)
        assert pattern.format(0, "jpg") in note
        assert pattern.format(1, "jpg") in note


def test_a_beton_is_written_already(tmp_path: Path) -> None:
    (tmp_path / "a.beton").write_bytes(b"\2\0")
    with pytest.raises(UserError, match=r"a\.beton is a \.beton file already: train on it as it is, look into it with"):
        find_images(tmp_path / "a.beton")


def test_long_names_in_shards_are_cut_where_they_are_told(tmp_path: Path) -> None:
    """A header may give a name of a megabyte, and a label as long a word."""
    long = "x" * 100_000
    members = [
        (f"{long}.jpg", picture(1)), (f"{long}.{long}.png", picture(2, "PNG")), (f"{long}.cls", long.encode()),
        (f"{long}.tar", b"inner"), (f".{long}/thumb.jpg", picture(3)),
    ]  # fmt: skip
    source = find_images(shard(tmp_path / "a.tar", members))
    assert len(source.items) == 2
    notes = " ".join(source.notes)
    for part in ("2 images share", "1 archives within", "Passed over: files in folders that are hidden"):
        assert part in notes
    assert len(notes) < 2000
    assert max(len(item.name) for item in source.items) < 1000 + len(f"{tmp_path}/a.tar ()") + 1
    with pytest.raises(UserError) as refused:
        find_images(tmp_path / "a.tar", SourceSettings(image_column=long + "y"))
    assert len(str(refused.value)) < 1000
    cut = shard(tmp_path / "cut.tar", [("a.jpg", picture(1)), (f"{long}.jpg", picture(2))])
    os.truncate(cut, cut.stat().st_size // 1024 * 1024 - 10240)
    for item in find_images(cut).items:
        assert len(item.name) + len(str(item.where[0])) < 1500
    only = shard(tmp_path / "tars.tar", [(f"{long}.tar", b"inner")])
    with pytest.raises(UserError, match="holds no images but 1 archives") as refused:
        find_images(only)
    assert len(str(refused.value)) < 1000


def test_samples_of_several_images(tmp_path: Path) -> None:
    """As WebDataset's rule has it: one sample, a field for each image, and one label for all."""
    members = []
    for i in range(3):
        members += [(f"{i}.jpg", picture(i)), (f"{i}.cls", b"%d" % i), (f"{i}.seg.png", picture(9, "PNG"))]
    path = shard(tmp_path / "a.tar", members)
    source = find_images(path)
    assert [item.label for item in source.items] == [0, 0, 1, 1, 2, 2]
    (note,) = source.notes
    assert "6 images share" in note
    assert "0.jpg and 0.seg.png" in note
    assert "--image-column jpg" in note
    for field, form in (("jpg", "JPEG"), ("SEG.png", "PNG")):
        source = find_images(path, SourceSettings(image_column=field))
        assert [read_item(item) for item in source.items] == [
            picture(9 if form == "PNG" else i, form) for i in range(3)
        ]
        assert [item.label for item in source.items] == [0, 1, 2]
        assert source.passed_over == 3
    with pytest.raises(UserError, match=r"field 'gif'; there are jpg, seg\.png"):
        find_images(path, SourceSettings(image_column="gif"))


def test_labels_apart_from_their_images_are_counted(tmp_path: Path) -> None:
    members = [(f"{i}.cls", b"1") for i in range(4)] + [(f"{i}.jpg", picture(i)) for i in range(4)]
    source = find_images(shard(tmp_path / "a.tar", members))
    assert [item.label for item in source.items] == [-1] * 4
    assert "4 labels (.cls or .json) lie apart from their images" in " ".join(source.notes)
    assert source.passed_over == 4


def test_a_tar_of_tars(tmp_path: Path) -> None:
    """As ImageNet comes."""
    inner = shard(tmp_path / "inner", [("1.jpg", picture())]).read_bytes()
    outer = shard(tmp_path / "outer.tar", [("n01440764.tar", inner), ("n01443537.tar", inner)])
    with pytest.raises(UserError, match=r"no images but 2 archives, such as n01440764\.tar: unpack it, and each"):
        find_images(outer)
    both = find_images(shard(tmp_path / "both.tar", [("a.tar", inner), ("1.jpg", picture())]))
    assert len(both.items) == 1
    assert "1 archives within the shards" in " ".join(both.notes)


def test_folders_of_programs_in_shards(tmp_path: Path) -> None:
    names = ("./a/1.jpg", "./a/@eaDir/1.jpg/THUMB.jpg", "./__MACOSX/a/._1.jpg", ".hidden/2.jpg")
    source = find_images(shard(tmp_path / "a.tar", [(name, picture()) for name in names]))
    assert [item.where[2] for item in source.items] == ["./a/1.jpg"]
    assert ".hidden (1), @eaDir (1), __MACOSX (1)" in " ".join(source.notes)


def test_shards_with_words_and_without_labels(tmp_path: Path) -> None:
    members = [(f"{i}.jpg", picture(i)) for i in range(4)]
    source = find_images(shard(tmp_path / "plain.tar", members))
    assert [item.label for item in source.items] == [-1] * 4
    assert source.class_names is None
    words = [(f"{i}.cls", word) for i, word in enumerate((b"dog", b"cat", b"dog", b"ant"))]
    both = [member for pair in zip(members, words, strict=True) for member in pair]
    source = find_images(shard(tmp_path / "words.tar", both))
    assert source.class_names == ["ant", "cat", "dog"]
    assert [item.label for item in source.items] == [2, 1, 2, 0]


def test_shards_of_splits(tmp_path: Path) -> None:
    for name in ("set-train-00.tar", "set-train-01.tar", "set-validation-00.tar"):
        shard(tmp_path / name, [(f"{name}1.jpg", picture())])
    source = find_images(tmp_path)
    assert [Path(item.path).name for item in source.items] == ["set-train-00.tar", "set-train-01.tar"]
    assert "validation" in source.notes[0]
    assert len(find_images(tmp_path, SourceSettings(split="all")).items) == 3


@pytest.mark.parametrize(
    "names", ["train000 val000", "train2017-0 val2017-0", "x-train x-holdout", "train-1 evaluation-1"]
)
def test_shards_of_splits_by_other_names(tmp_path: Path, names: str) -> None:
    """Also below a folder whose own name is a split's."""
    train, other = names.split()
    for name in (train, other):
        shard(tmp_path / f"test_project/{name}.tar", [(f"{name}1.jpg", picture())])
    source = find_images(tmp_path)
    assert [Path(item.path).stem for item in source.items] == [train]
    assert "not taken" in source.notes[0]
    shard(tmp_path / "test_project/more.tar", [("1.jpg", picture())])
    assert "1 files of no split" in find_images(tmp_path).notes[0]
    (tmp_path / f"test_project/{other}.tar").unlink()
    source = find_images(tmp_path)
    assert len(source.items) == 2
    assert "Taking every file" in source.notes[0]


def test_damaged_shards_are_bad_items(tmp_path: Path) -> None:
    members = [(f"{i}.jpg", picture(i)) for i in range(6)]
    whole = shard(tmp_path / "1_whole.tar", members).read_bytes()
    (tmp_path / "2_cut.tar").write_bytes(whole[: len(whole) // 2])
    offset = find_images(tmp_path / "1_whole.tar").items[3].where[0] - 512
    (tmp_path / "3_hit.tar").write_bytes(whole[:offset] + b"\xff" * 512 + whole[offset + 512 :])
    (tmp_path / "4_text.tar").write_bytes(b"hello, this is no tar file" * 100)
    (tmp_path / "5_empty.tar").write_bytes(b"")
    source = find_images(tmp_path)
    bad = {Path(item.path).name: item.where[0] for item in source.items if item.kind == "bad"}
    assert set(bad) == {"2_cut.tar", "3_hit.tar", "4_text.tar", "5_empty.tar"}
    assert f"damaged at byte {offset}" in bad["3_hit.tar"]
    for item in source.items:
        if item.kind == "tar":
            assert read_item(item).startswith(b"\xff\xd8")


def test_images_and_shards_together_must_be_told_apart(tmp_path: Path) -> None:
    tree(tmp_path, "logo.png")
    shard(tmp_path / "a.tar", [("1.jpg", picture())])
    with pytest.raises(UserError, match="--source"):
        find_images(tmp_path)
    assert [item.kind for item in find_images(tmp_path, SourceSettings(kind="tar")).items] == ["tar"]
    assert [item.kind for item in find_images(tmp_path, SourceSettings(kind="folder")).items] == ["file"]


FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"},
}


def table(labels: list, column: str = "image", *, struct: bool = True, features: dict | None = None):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet  # noqa: F401 - loads the submodule

    images = [picture(i) for i in range(len(labels))]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = pa.array([{"bytes": x, "path": f"{i}.jpg"} for i, x in enumerate(images)], kind) if struct else images
    result = pa.table({"extra": list(range(len(labels))), column: values, "label": labels})
    if features:
        result = result.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return pa, result


@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
def test_hugging_face_data_sets(tmp_path: Path, form: str) -> None:
    labels = [2, 0, 1, -1, 2, 2, 0]
    pa, rows = table(labels, features=FEATURES)
    (tmp_path / "data").mkdir()
    suffix = "parquet" if form == "parquet" else "arrow"
    for split in ("train", "test"):
        path = tmp_path / f"data/{split}-00000-of-00001.{suffix}"
        if form == "parquet":
            pa.parquet.write_table(rows, path, row_group_size=3)
        else:
            opener = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
            with opener(str(path), rows.schema) as writer:
                writer.write_table(rows, max_chunksize=3)
    tree(tmp_path, "README.md", "dataset_info.json", content=b"{}")
    source = find_images(tmp_path)
    assert source.class_names == ["ant", "bee", "cat"]
    assert [item.label for item in source.items] == labels
    assert [read_item(item) for item in source.items] == [picture(i) for i in range(7)]
    assert source.items[4].name.endswith(f"train-00000-of-00001.{suffix} (row 4)")
    assert "test" in source.notes[0]


@pytest.mark.parametrize("state", [True, False])
def test_what_hugging_faces_library_keeps_beside_a_data_set_is_no_part_of_it(tmp_path: Path, state: bool) -> None:
    pa, rows = table([2, 0, 1], features=FEATURES)
    own = "cache-of-mine.arrow" if state else "data-00000-of-00001.arrow"
    for name in (own, "cache-1c80317fa3b1799d.arrow", "cache-1c80317fa3b1799e.arrow"):
        with pa.ipc.new_stream(str(tmp_path / name), rows.schema) as writer:
            writer.write_table(rows)
    if state:
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": own}]}))
    source = find_images(tmp_path)
    assert [Path(item.path).name for item in source.items] == [own] * 3
    assert source.passed_over == 2 + state
    assert "2 arrow files are passed over" in source.notes[0]
    # one that is named is meant
    assert len(find_images(tmp_path / "cache-1c80317fa3b1799d.arrow").items) == 3


def test_settings_of_another_kind_of_source_are_refused(tmp_path: Path) -> None:
    tree(tmp_path / "folder", "a/1.jpg", "b/2.jpg")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        tar.add(tmp_path / "folder" / "a" / "1.jpg", "1.jpg")
    for name, settings, said in (
        ("folder", SourceSettings(label_column="x"), "--label-column is for a Hugging Face data set"),
        ("folder", SourceSettings(image_column="x"), "--image-column is for tar shards or a Hugging Face data set"),
        ("shards", SourceSettings(label_column="x"), "--label-column is for a Hugging Face data set"),
        ("shards", SourceSettings(flat=True), "--flat is for a folder of images, and the source is tar shards"),
    ):
        with pytest.raises(UserError, match=said):
            find_images(tmp_path / name, settings)
    with pytest.raises(UserError, match="a source's kind is 'foo'; expected folder, tar or hf"):
        SourceSettings(kind="foo")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *(
            (["--check", "F.beton", *more], "--check decodes every image as it is stored")
            for more in (["--limit", "9"], ["--split", "val"], ["--max-size", "99"], ["--skip-bad"], ["--force"],
                         ["--mode", "raw"], ["--page-size", "4194304"])
        ),
        (["a", "b.beton", "--proportion", "0.3"], "--proportion is of --mode proportion, and the mode is jpg"),
        (["a", "b.beton", "--mode", "raw", "--seed", "7"], "--seed is of --mode proportion, and the mode is raw"),
        (["a", "b.beton", "--mode", "raw", "--quality", "50"], "--quality is of JPEGs, and --mode raw stores none"),
    ],
)  # fmt: skip
def test_flags_that_would_do_nothing_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_command(words)


def test_flags_that_do_something_are_taken() -> None:
    read_command(["--check", "F.beton", "--workers", "2", "--timeout", "9"])
    read_command(["a", "b.beton", "--mode", "proportion", "--proportion", "0.3", "--seed", "7", "--quality", "80"])


@pytest.mark.slow
def test_parquet_of_other_shapes(tmp_path: Path) -> None:
    pa, rows = table(["dog", "cat", "dog"], "jpg", struct=False)
    pa.parquet.write_table(rows, tmp_path / "a.parquet")
    source = find_images(tmp_path / "a.parquet")
    assert source.class_names == ["cat", "dog"]
    assert [item.label for item in source.items] == [1, 0, 1]
    assert read_item(source.items[2]) == picture(2)
    settings = SourceSettings(label_column="extra")
    assert [item.label for item in find_images(tmp_path / "a.parquet", settings).items] == [0, 1, 2]
    with pytest.raises(UserError, match="no column 'nothing'"):
        find_images(tmp_path, SourceSettings(image_column="nothing"))
    pa.parquet.write_table(rows.select(["extra", "label"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column of images"):
        find_images(tmp_path)


@pytest.mark.slow
def test_rows_without_an_image_and_damaged_tables(tmp_path: Path) -> None:
    pa, rows = table([0, 1], features=FEATURES)
    kind = rows.schema.field("image").type
    empty = pa.table({"image": pa.array([None, {"bytes": None, "path": None}], kind), "label": [0, 1]})
    pa.parquet.write_table(empty, tmp_path / "a.parquet")
    for item in find_images(tmp_path).items:
        with pytest.raises(UserError, match="no image"):
            read_item(item)
    pa.parquet.write_table(rows, tmp_path / "b.parquet")
    content = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really PAR1")
    source = find_images(tmp_path)
    assert [item.kind for item in source.items] == ["parquet", "parquet", "bad", "bad"]
    assert source.class_names == ["ant", "bee", "cat"]


def test_labels_beyond_the_schema_drop_its_names(tmp_path: Path) -> None:
    pa, rows = table([0, 5], features=FEATURES)
    pa.parquet.write_table(rows, tmp_path / "a.parquet")
    source = find_images(tmp_path)
    assert source.class_names is None
    assert [item.label for item in source.items] == [0, 5]


def test_without_pyarrow_a_sentence_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"fastpmae\[hf\]"):
        find_images(tmp_path)
