"""Folders and tar shards against fastpmae-write on the same source, and hostile ones of both kinds."""

import io
import os
import struct
import tarfile
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastpmae import write_beton
from fastpmae_loaders import Beton, PairedViews, PlainViews, UserError, ViewSettings
from fastpmae_loaders.engines.torch_engine import decode
from fastpmae_loaders.folders import EncodedImages, ImageFolder, TarShards, open_samples
from fastpmae_loaders.write.images import ImageSettings, store
from fastpmae_loaders.write.sources import SourceSettings, find_images, read_item
from tests.engines import FFCV
from tests.loaders.files import open_files
from tests.made import SHARED_DATA, made_image, write_tree


def encoded(seed: int = 0, form: str = "JPEG", size: tuple[int, int] = (40, 30), **options) -> bytes:
    buffer = io.BytesIO()
    made_image(seed, *size).save(buffer, form, **options)
    return buffer.getvalue()


def tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def turned(orientation: int, form: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(orientation, form, exif=exif.tobytes())


def pixels(samples: EncodedImages, index: int) -> np.ndarray | None:
    """What the torch engine makes of a sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decode(samples, index)


def assert_as_written(samples: EncodedImages, source: Path, **listing) -> None:
    """Samples that decode are what fastpmae-write would store as raw pixels: order, labels, class names, pixels."""
    found = find_images(source, SourceSettings(**listing))
    assert samples.class_names == found.class_names
    assert samples.passed_over == found.passed_over
    assert samples.notes == found.notes
    bad = {name for name, _ in samples.left_out}
    index = 0
    for item in found.items:
        try:
            stored = store(read_item(item), ImageSettings(mode="raw"))
        except UserError:
            stored = None
        if item.name in bad:
            assert stored is None, item.name
            continue
        ours = pixels(samples, index)
        assert samples.name(index) == item.name
        assert samples.label[index] == item.label
        assert (ours is None) == (stored is None), item.name
        if ours is not None and stored is not None:
            assert (stored.height, stored.width) == ours.shape[:2] == (samples.height[index], samples.width[index])
            assert stored.data == ours.tobytes(), item.name
        index += 1
    assert index == len(samples)


def test_classes_as_the_writer_has_them(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "tree", 12)
    tree(folder, {"class_0/z.png": encoded(1, "PNG"), "class_10/a.webp": encoded(2, "WEBP"), "class_1/x.txt": b"hi"})
    samples = open_samples(folder)
    assert isinstance(samples, ImageFolder)
    assert samples.class_names == ["class_0", "class_1", "class_10", "class_2"]
    assert samples.mode.tolist() == [0, 0, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0, 0]
    assert samples.nbytes == sum(path.stat().st_size for path in folder.rglob("*.*") if path.suffix != ".txt")
    assert_as_written(samples, folder)
    write_beton(folder, tmp_path / "out.beton", mode="raw", workers=1)
    beton = Beton(tmp_path / "out.beton")
    assert (beton.label.tolist(), beton.class_names) == (samples.label.tolist(), samples.class_names)
    for index in range(14):
        ours = pixels(samples, index)
        assert ours is not None
        assert np.array_equal(ours, beton.decode(index))


def test_flat_split_and_single(tmp_path: Path) -> None:
    flat = tree(tmp_path / "flat", {f"{i}.jpg": encoded(i) for i in (10, 2, 1)})
    samples = open_samples(flat)
    assert isinstance(samples, ImageFolder)
    assert samples.label.tolist() == [-1] * 3
    assert samples.class_names is None
    assert [Path(samples.name(i)).name for i in range(3)] == ["1.jpg", "10.jpg", "2.jpg"]
    assert_as_written(samples, flat)
    assert len(ImageFolder(flat / "2.jpg")) == 1
    names = ("train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/c/4.jpg")
    splits = tree(tmp_path / "splits", {name: encoded(i) for i, name in enumerate(names)})
    for split in (None, "val", "all"):
        samples = open_samples(splits, split)
        assert isinstance(samples, ImageFolder)
        assert_as_written(samples, splits, split=split)
    assert np.asarray(open_samples(splits, "all").label).tolist() == [0, 1, 0, 2]
    with pytest.raises(UserError, match="no split 'test'"):
        open_samples(splits, "test")


def test_split_and_flat_count_for_each_of_several_and_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    names = ("train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg")
    folders = [tree(tmp_path / name, {name: encoded(i) for i, name in enumerate(names)}) for name in ("one", "two")]
    for paths, count in ((folders[:1], 1), (folders, 2)):
        assert len(open_samples(paths, "val")) == count
        every = open_samples(paths, flat=True)
        assert np.asarray(every.label[np.arange(3 * count)]).tolist() == [-1] * 3 * count
    with pytest.raises(UserError, match=r"flat takes every image, and split 'val' would take some"):
        open_samples(folders[0], "val", flat=True)
    assert len(open_samples(folders[0], "all", flat=True)) == 3
    write_beton(folders[0], tmp_path / "one.beton", mode="raw", workers=1)
    shard = tmp_path / "shards" / "0.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        tar.add(folders[0] / names[0], "0.jpg")
    whole = [tmp_path / "one.beton", Beton(tmp_path / "one.beton"), shard, "s3://bucket/set"]
    for split, flat, said in (("val", False, "split='val'"), (None, True, "flat=True")):
        for source in [*whole, [folders[1], tmp_path / "one.beton"]]:
            with pytest.raises(UserError, match=f"has nothing that {said} chooses from: leave it out"):
                open_samples(source, split, flat)
    with pytest.raises(UserError, match="has nothing that flat=True chooses from"):
        open_samples(shard.parent, flat=True)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_sizes_are_those_of_the_upright_image(tmp_path: Path, form: str) -> None:
    folder = tree(tmp_path / form, {f"{i}.{form.lower()}": turned(i, form) for i in range(1, 9)})
    samples = ImageFolder(folder)
    assert samples.width.tolist() == [40] * 4 + [30] * 4
    assert samples.height.tolist() == [30] * 4 + [40] * 4
    # what lies upright and is a JPEG may be decoded by anybody; the rest is for Pillow
    assert samples.mode.tolist() == ([0] if form == "JPEG" else [2]) + [2] * 7
    assert_as_written(samples, folder)


def test_a_png_that_is_turned_at_its_end(tmp_path: Path) -> None:
    """EXIF may stand behind the pixels: only there does this one say that it lies on its side."""
    plain, exif = encoded(1, "PNG"), Image.Exif()
    exif[0x0112] = 6
    chunk = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk)) + b"eXIf" + chunk + struct.pack(">I", zlib.crc32(b"eXIf" + chunk))
    samples = ImageFolder(tree(tmp_path / "set", {"a.png": plain[:-12] + chunk + plain[-12:]}))
    assert (int(samples.width[0]), int(samples.height[0])) == (30, 40)
    assert_as_written(samples, tmp_path / "set")


def test_colours_and_depths(tmp_path: Path) -> None:
    picture = made_image(3, 40, 30)
    files = {"plain.jpg": encoded(3), "progressive.jpg": encoded(3, progressive=True)}
    for name, image, form in [
        ("gray.jpg", picture.convert("L"), "JPEG"), ("cmyk.jpg", picture.convert("CMYK"), "JPEG"),
        ("alpha.png", picture.convert("RGBA"), "PNG"), ("palette.gif", picture.quantize(9), "GIF"),
        ("deep.png", Image.fromarray(np.asarray(picture.convert("L")).astype("<u2") * 257), "PNG"),
        ("deep.tif", Image.fromarray(np.asarray(picture.convert("L")).astype("<i4") * 257), "TIFF"),
        ("one.png", picture.convert("1"), "PNG"), ("a.bmp", picture, "BMP"), ("a.ppm", picture, "PPM"),
    ]:  # fmt: skip
        buffer = io.BytesIO()
        image.save(buffer, form)
        files[name] = buffer.getvalue()
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", keep_rgb=True)
    files["rgb.jpg"] = buffer.getvalue()
    folder = tree(tmp_path / "set", files)
    samples = ImageFolder(folder)
    plain = {Path(samples.name(i)).name for i in range(len(samples)) if samples.mode[i] == 0}
    assert plain == {"plain.jpg", "progressive.jpg", "gray.jpg"}
    assert_as_written(samples, folder)


def test_shards_as_the_writer_has_them(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in range(3):
                for name, content in (("jpg", encoded(number)), ("cls", str(shard * number).encode()), ("txt", b"x")):
                    entry = tarfile.TarInfo(f"{shard}{number}.{name}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    samples = open_samples(tmp_path)
    assert isinstance(samples, TarShards)
    assert samples.label.tolist() == [0, 0, 0, 0, 1, 2]
    assert samples.page_of.tolist() == [0, 0, 0, 1, 1, 1]
    assert samples.payload(4).tobytes() == encoded(1)
    assert_as_written(samples, tmp_path)
    assert len(open_samples(tmp_path / "1.tar")) == 3
    assert TarShards([tmp_path / "1.tar", tmp_path / "0.tar"]).label.tolist() == [0, 1, 2, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["odd_images", "camvid_240x180", "bccd"])
def test_real_files_as_the_writer_has_them(tmp_path: Path, name: str) -> None:
    """486 of Pillow's hard cases, and ordinary data sets, out of a shard and out of a folder."""
    shard = SHARED_DATA / f"{name}.tar"
    if not shard.exists():
        pytest.skip(f"{shard} is not here")
    samples = TarShards(shard)
    if name == "odd_images":
        assert_as_written(samples, shard)
    with tarfile.open(shard) as archive:
        archive.extractall(tmp_path / "files", filter="data")
    folder = ImageFolder(tmp_path / "files", flat=True)
    listed = [Path(item.path) for item in find_images(tmp_path / "files", SourceSettings(flat=True)).items]
    left_out = {name for name, _ in folder.left_out}
    assert [folder.name(i) for i in range(len(folder))] == [str(path) for path in listed if str(path) not in left_out]
    if name == "odd_images":
        assert_as_written(folder, tmp_path / "files", flat=True)


def test_what_open_samples_tells_apart(tmp_path: Path) -> None:
    write_beton(write_tree(tmp_path / "tree", 4), tmp_path / "a.beton")
    assert isinstance(open_samples(tmp_path / "a.beton"), Beton)
    (tmp_path / "empty").mkdir()
    tree(tmp_path / "both", {"a.jpg": encoded(), "b.tar": bytes(1024)})
    tree(tmp_path / "bare", {"b.tar": bytes(1024)})
    for path, says in [
        ("missing", "does not exist"), ("empty", "no images"), ("both", "ImageFolder"), ("bare", "no images"),
        ("a\0b", "does not exist"), ("tree/class_0/none", "does not exist"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=says) as caught:
            open_samples(f"{tmp_path}/{path}")
        assert "\n" not in str(caught.value)
    for paths in ([], [tmp_path / "missing.tar"]):
        with pytest.raises(UserError):
            TarShards(paths)
    (tmp_path / "text.beton").write_text("hello")
    with pytest.raises(UserError, match=r"header|beton"):
        open_samples(tmp_path / "text.beton")


def test_what_is_no_image_is_left_out_with_its_reason(tmp_path: Path) -> None:
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb += struct.pack(">I", zlib.crc32(bomb[12:])) + encoded(0, "PNG")[33:]
    wide = bytearray(encoded())
    at = wide.index(b"\xff\xc0")
    struct.pack_into(">HH", wide, at + 5, 65_535, 65_535)
    files = {
        "good.jpg": encoded(), "empty.jpg": b"", "text.jpg": b"hello", "head.jpg": encoded()[:200], "bomb.png": bomb,
        "wide.jpg": bytes(wide), "cut.png": encoded(0, "PNG")[:20], "two.jpg": b"\xff\xd8\xff", "note.md": b"x",
        os.fsdecode(b"caf\xe9\n\x1b[31m.jpg"): encoded(2),
    }  # fmt: skip
    folder = tree(tmp_path / "set", files)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "link.jpg").symlink_to("good.jpg")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    with (folder / "huge.png").open("wb") as file:
        file.truncate(1 << 41)
    samples = ImageFolder(folder)
    reasons = {Path(name).name: reason for name, reason in samples.left_out}
    assert set(reasons) == {
        "empty.jpg", "text.jpg", "head.jpg", "bomb.png", "wide.jpg", "cut.png", "two.jpg", "loop.jpg", "endless.jpg",
        "pipe.jpg", "huge.png",
    }  # fmt: skip
    assert "bytes, more than" in reasons["huge.png"]
    assert "65535x65535" in reasons["wide.jpg"]
    assert all(reason and "\n" not in reason for reason in reasons.values())
    assert [samples.name(i).isprintable() for i in range(3)] == [True] * 3
    assert samples.passed_over == 1
    assert "11 left out" in repr(samples)
    with pytest.raises(UserError, match=r"none of 2 images can be read \(the first: .*text.jpg"):
        ImageFolder(tree(tmp_path / "no", {"text.jpg": b"hello", "z.png": b"hello"}))


def test_files_that_change_afterwards(tmp_path: Path) -> None:
    folder = tree(tmp_path / "set", {f"{i}.jpg": encoded(i) for i in range(4)})
    samples = ImageFolder(folder)
    (folder / "0.jpg").unlink()
    (folder / "1.jpg").write_bytes(encoded(1)[:100])
    (folder / "2.jpg").write_bytes(encoded(2, size=(400, 300)))
    for index, says in ((0, "No such file"), (1, "shorter")):
        with pytest.raises(UserError, match=says):
            samples.payload(index)
    assert pixels(samples, 2) is None
    assert pixels(samples, 3) is not None


def header(name: bytes, size: bytes, kind: bytes = b"0", extended: bytes = b"") -> bytes:
    block = bytearray(512)
    block[:100], block[124:136], block[156:157] = name.ljust(100, b"\0"), size.ljust(12, b"\0"), kind
    block[257:263] = b"ustar\0"
    block[482:483] = extended or b"\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


GOOD = header(b"good.jpg", b"%o" % len(encoded())) + padded(encoded())
HOSTILE = {
    "negative": header(b"a.jpg", b"\xff" * 12) + bytes(512),
    "enormous": header(b"a.jpg", b"\x80" + b"\xff" * 11) + bytes(512),
    "beyond": header(b"a.jpg", b"77777777777") + bytes(512),
    "letters": header(b"a.jpg", b"12zz") + bytes(512),
    "long name": header(b"././@LongLink", b"77777777777", b"L") + bytes(512),
    "pax of a terabyte": header(b"x", b"20000000000000", b"x"),
    "pax of nonsense": header(b"x", b"1000", b"x") + b"9 path=a.jpg\n".ljust(512, b"x"),
    "pax with a negative size": header(b"x", b"15", b"x") + padded(b"13 size=-512\n") + GOOD,
    "pax with a size of words": header(b"x", b"15", b"x") + padded(b"13 size=many\n") + GOOD,
    "pax with a long size": header(b"x", b"200", b"x") + padded(b"99 size=" + b"9" * 90 + b"\n") + GOOD,
    "endless sparse map": header(b"s.jpg", b"0", b"S", b"\1") + b"\1" * 512 * 3,
    "checksum": bytes(148) + b"xxxxxxxx" + bytes(356),
    "half a header": header(b"a.jpg", b"0")[:300],
    "one byte": b"\0",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(20)
def test_hostile_archives_cost_only_what_follows(tmp_path: Path, name: str) -> None:
    (tmp_path / "hostile.tar").write_bytes(GOOD + HOSTILE[name])
    samples = TarShards(tmp_path / "hostile.tar")
    assert [samples.payload(i).tobytes() for i in range(len(samples))] == [encoded()]
    ((_, reason),) = samples.left_out
    assert "damaged" in reason or "truncated" in reason
    (tmp_path / "hostile.tar").write_bytes(HOSTILE[name])
    with pytest.raises(UserError, match="none of 1 images"):
        TarShards(tmp_path / "hostile.tar")


def test_members_that_are_no_files(tmp_path: Path) -> None:
    """Links, sparse files, devices, folders; their sizes are not followed."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for kind, name in ((b"1", "hard.jpg"), (b"2", "soft.jpg"), (b"3", "device.jpg"), (b"6", "pipe.jpg"),
                           (b"5", "folder.jpg")):  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        sparse, odd = {"GNU.sparse.major": "1"}, os.fsdecode(b"\xff\n.jpg")
        names = [("s.jpg", sparse), ("x" * 300 + "é.jpg", {}), (odd, {}), ("t.jpg", {"path": "u.jpg"})]
        for place, (name, headers) in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.pax_headers, entry.size = headers, len(encoded(place))
            archive.addfile(entry, io.BytesIO(encoded(place)))
    content = (tmp_path / "a.tar").read_bytes()
    # links with a size of their own, as some archivers write it: there is no content behind them
    (tmp_path / "a.tar").write_bytes(header(b"link.jpg", b"1000", b"1") + content)
    samples = TarShards(tmp_path / "a.tar")
    assert samples.left_out == []
    assert [samples.payload(i).tobytes() for i in range(3)] == [encoded(i) for i in (1, 2, 3)]
    assert len(samples) == 3
    assert "x" * 300 + "é.jpg" in samples.name(0)
    assert all(samples.name(i).isprintable() for i in range(3))
    assert samples.passed_over == 6


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_are_read_as_tarfile_reads_them(tmp_path: Path, form: int) -> None:
    rng = np.random.default_rng(form)
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
        for number in range(40):
            depth = int(rng.integers(0, 4 if form != tarfile.USTAR_FORMAT else 3))
            name = "/".join(["folder" * int(rng.integers(1, 12)) for _ in range(depth)] + [f"{number}.jpg"])
            entry = tarfile.TarInfo(name)
            entry.mtime = 1e9 + float(rng.random()) if form == tarfile.PAX_FORMAT else 0
            content = encoded(number % 5)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    samples = TarShards(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = archive.getmembers()
        assert len(samples) == len(members) == 40
        for index, member in enumerate(members):
            assert samples.name(index).endswith(f"({member.name})")
            content = archive.extractfile(member)
            assert content is not None
            assert samples.payload(index).tobytes() == content.read()


@pytest.mark.slow
def test_mutated_archives_never_crash(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(6):
            for suffix, content in (("jpg", encoded(number)), ("json", b'{"label": 3}')):
                entry = tarfile.TarInfo(f"{'long' * 40}/{number}é.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    whole = (tmp_path / "a.tar").read_bytes()
    rng = np.random.default_rng(0)
    heads = [place for place in range(0, len(whole), 512) if whole[place + 257 : place + 262] == b"ustar"]
    opened = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 5)):
            head = heads[rng.integers(len(heads))]
            place = head + int(
                rng.choice([int(rng.integers(512)), int(rng.integers(124, 136)), 156, int(rng.integers(512, 700))])
            )
            data[place] = rng.integers(256)
            if rng.random() < 0.8:  # a fitting checksum, so that the lie is believed
                data[head + 148 : head + 156] = b" " * 8
                data[head + 148 : head + 156] = b"%06o\0 " % sum(data[head : head + 512])
        (tmp_path / "b.tar").write_bytes(data[: rng.integers(600, len(data))] if rng.random() < 0.2 else data)
        try:
            samples = TarShards(tmp_path / "b.tar")
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
            continue
        opened += 1
        for index in range(len(samples)):
            pixels(samples, index)
    assert opened > 150


def test_payloads_from_several_threads(tmp_path: Path) -> None:
    folder = tree(tmp_path / "set", {f"{i:03d}.jpg": encoded(i) for i in range(60)})
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder, "set")
    expected = [encoded(i) for i in range(60)]
    for samples in (ImageFolder(folder), TarShards(tmp_path / "a.tar")):
        before = open_files(tmp_path)
        wrong: list[int] = []

        def read(samples: EncodedImages = samples, wrong: list[int] = wrong) -> None:
            order = sorted(range(60), key=lambda i: samples.name(i))
            wrong += [i for i in range(60) if samples.payload(order[i]).tobytes() != expected[i]]

        threads = [threading.Thread(target=read) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert open_files(tmp_path) == before


@pytest.mark.slow
def test_a_folder_trains_as_its_beton_does(tmp_path: Path) -> None:
    """The same bits, since the same bytes are decoded; the order and the labels are the same too."""
    folder = write_tree(tmp_path / "tree", 12)
    tree(
        folder, {"class_0/z.png": encoded(1, "PNG"), "class_1/side.jpg": turned(6), "class_2/a.gif": encoded(2, "GIF")}
    )
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.add(path, path.relative_to(folder))
    samples = ImageFolder(folder)
    # plain JPEGs keep their bytes in one file, all else becomes pixels in the other
    write_beton(folder, tmp_path / "jpeg.beton", workers=1)
    write_beton(folder, tmp_path / "raw.beton", mode="raw", workers=1)
    view = ViewSettings(image_size=32, patch_size=8)
    options = {"batch_size": 15, "engine": "torch", "settings": view, "seed": 4}
    batches = []
    for source in (tmp_path / "jpeg.beton", tmp_path / "raw.beton", folder, tmp_path / "all.tar"):
        with PairedViews(source, **options) as views:
            batches.append(next(iter(views)))
            assert views.failed == []
    jpegs, raw, ours, tar = batches
    kept = torch.from_numpy(samples.mode[ours.index.numpy()] == 0)
    assert 0 < int(kept.sum()) < 15
    for batch in batches:
        assert torch.equal(batch.index, ours.index)
        assert torch.equal(batch.boxes, ours.boxes)
        assert torch.equal(batch.visible, ours.visible)
    for number in range(2):
        assert torch.equal(ours.views[number][kept], jpegs.views[number][kept])
        assert torch.equal(ours.views[number], raw.views[number])
        assert torch.equal(ours.views[number], tar.views[number])
    assert torch.equal(ours.label, raw.label)
    with (
        PlainViews(folder, 15, 32, engine="torch") as a,
        PlainViews(tmp_path / "raw.beton", 15, 32, engine="torch") as b,
    ):
        assert torch.equal(next(iter(a))[0], next(iter(b))[0])


def test_files_that_go_while_training(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "tree", 12)
    view = ViewSettings(image_size=32, patch_size=8)
    with PairedViews(folder, 6, engine="torch", settings=view, shuffle=False, bad_fraction=1.0) as views:
        (folder / "class_0" / "0003.jpg").unlink()
        indices = torch.cat([batch.index for batch in views])
        assert views.failed == [1]
        assert indices.tolist() == [0, 2, *range(2, 12)]


@pytest.mark.parametrize("engine", ["native", FFCV])
def test_some_engines_read_no_folder(tmp_path: Path, engine: str) -> None:
    folder = write_tree(tmp_path / "tree", 4)
    for path in (folder, ImageFolder(folder)):
        with pytest.raises(UserError, match=r"reads \.beton files alone; write one with fastpmae-write") as caught:
            PairedViews(path, 2, engine)
        assert "engine='torch'" in str(caught.value)
