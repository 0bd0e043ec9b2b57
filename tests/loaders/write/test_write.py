"""fastpmae-write as a user meets it: files that stock FFCV reads, whole or not at all, and exit statuses."""

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastpmae import UserError, write_beton
from fastpmae_loaders.sources.beton import COEFFICIENTS, JPG, Beton
from fastpmae_loaders.sources.jpeg import turbo_available
from fastpmae_loaders.write import cli
from fastpmae_loaders.write.check import check_beton
from fastpmae_loaders.write.sources import SourceSettings
from fastpmae_loaders.write.write import BadImages
from tests.engines import needs_ffcv
from tests.made import REPOSITORY, SHARED_DATA, made_image, write_tree

PATHS = [str(REPOSITORY / folder) for folder in ("", "kernels", "loaders")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "COLUMNS": "100"}


def command(*arguments: object, **options) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "fastpmae_loaders.write.cli", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, **options)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """12 JPEGs in 3 classes, with a PNG, a gray JPEG and a text among them."""
    folder = write_tree(tmp_path / "tree", 12)
    made_image(50, 64, 48).convert("RGBA").save(folder / "class_0" / "z.png")
    made_image(51, 64, 48).convert("L").save(folder / "class_2" / "gray.jpg")
    (folder / "class_1" / "notes.txt").write_text("hello")
    return folder


def pngs(folder: Path, count: int, side: int = 700) -> Path:
    """Many names for one image that takes a while to convert."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    noise.save(folder / "0000.png", compress_level=1)
    for number in range(1, count):
        (folder / f"{number:04d}.png").hardlink_to(folder / "0000.png")
    return folder


def test_a_tree_becomes_a_file(tree: Path, tmp_path: Path) -> None:
    written = write_beton(tree, tmp_path / "out.beton", workers=2)
    assert (written.samples, written.kept, written.converted, written.passed_over) == (14, 12, 2, 1)
    beton = Beton(tmp_path / "out.beton")
    assert written.file_size == (tmp_path / "out.beton").stat().st_size
    assert beton.class_names == ["class_0", "class_1", "class_2"]
    files = [path for path in sorted(tree.rglob("*")) if path.suffix in (".jpg", ".png")]
    assert beton.label.tolist() == [int(path.parent.name[-1]) for path in files]
    for index, path in enumerate(files):
        if path.name not in ("z.png", "gray.jpg"):
            assert beton.payload(index).tobytes() == path.read_bytes()
        expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert np.abs(beton.decode(index) - expected).mean() < 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.beton", "tree"]


@pytest.mark.slow
@needs_ffcv
def test_stock_ffcv_reads_it(tmp_path: Path) -> None:
    pixels = {}
    for number in range(10):
        image = made_image(number, 900, 800)  # raw 2.2 MB: larger than a page, which has to grow
        path = tmp_path / "tree" / f"class_{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        pixels[path] = np.asarray(image)
    expected = np.stack([pixels[path] for path in sorted(pixels)]).astype(int)
    reader = [sys.executable, "-m", "tests.programs.stock_reader"]
    for mode, cache in (("jpg", "map"), ("proportion", "pages")):
        out = tmp_path / f"{mode}.beton"
        write_beton(tmp_path / "tree", out, mode=mode, page_size=1 << 21, workers=1)
        assert Beton(out).page_size == (1 << 21 if mode == "jpg" else 1 << 22)
        reader += [str(out), str(tmp_path / f"{mode}.npz"), cache]
    subprocess.run(reader, check=True, env=ENVIRONMENT, timeout=250)
    for mode in ("jpg", "proportion"):
        read = np.load(tmp_path / f"{mode}.npz")
        assert read["labels"].tolist() == sorted(number % 3 for number in range(10))
        errors = np.abs(read["images"] - expected).mean(axis=(1, 2, 3))
        assert (errors < 2).all()
        assert np.array_equal(errors == 0, Beton(tmp_path / f"{mode}.beton").mode == 1)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"mode": "proportion", "max_size": 70, "limit": 13}])
def test_the_same_bytes_whatever_the_workers(tree: Path, tmp_path: Path, settings: dict) -> None:
    (tree / "class_1" / "bad.jpg").write_bytes(b"\xff\xd8 not a picture")
    contents = []
    for workers in (1, 2, 3):
        out = tmp_path / f"{workers}.beton"
        write_beton(tree, out, workers=workers, skip_bad=True, **settings)
        contents.append((out.read_bytes(), (tmp_path / f"{workers}.beton.bad.txt").read_text()))
    assert contents[0] == contents[1] == contents[2]
    assert len(set(Beton(tmp_path / "1.beton").mode.tolist())) == (2 if settings else 1)


def test_coefficients_show_what_the_jpegs_show(tree: Path, tmp_path: Path) -> None:
    """Also of what is encoded here; what has no code, a progressive JPEG, stays one."""
    made_image(77, 60, 50).save(tree / "class_0" / "progressive.jpg", progressive=True)
    made_image(78, 60, 50).save(tree / "class_0" / "png.png")
    write_beton(tree, tmp_path / "jpg.beton", workers=1)
    write_beton(tree, tmp_path / "coded.beton", workers=2, mode="coefficients")
    jpegs, coded = Beton(tmp_path / "jpg.beton"), Beton(tmp_path / "coded.beton")
    assert sorted(set(coded.mode.tolist())) == [JPG, COEFFICIENTS]
    assert (coded.mode == JPG).sum() == 1
    for index in range(len(jpegs)):
        assert np.array_equal(jpegs.decode(index), coded.decode(index))
    checked = check_beton(tmp_path / "coded.beton")
    assert not checked.bad
    assert f"{len(coded) - 1} coefficients" in checked.describe()


def test_limit_is_spread_over_the_source(tree: Path, tmp_path: Path) -> None:
    assert write_beton(tree, tmp_path / "out.beton", limit=3, workers=1).samples == 3
    assert Beton(tmp_path / "out.beton").label.tolist() == [0, 1, 2]
    assert write_beton(tree, tmp_path / "out.beton", limit=999, force=True, workers=1).samples == 14


@pytest.mark.slow
def test_a_page_grows_for_a_large_image(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    sizes = [(300, 200), (1800, 1500), (50, 40), (700, 700), (1000, 900), (60, 60)]
    for number, size in enumerate(sizes):
        made_image(number, *size).save(tmp_path / "tree" / f"{number}.png")
    write_beton(tmp_path / "tree", tmp_path / "out.beton", mode="raw", page_size=1 << 21, workers=1)
    beton = Beton(tmp_path / "out.beton")  # which refuses samples that cross a page
    assert beton.page_size == 1 << 23
    for number, size in enumerate(sizes):
        assert np.array_equal(beton.decode(number), np.asarray(made_image(number, *size)))


@pytest.mark.slow
def test_shards_and_tables(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet  # noqa: F401 - loads the submodule

    pictures = [io.BytesIO() for _ in range(9)]
    for number, buffer in enumerate(pictures):
        made_image(number, 50, 40).save(buffer, "JPEG")
    with tarfile.open(tmp_path / "set.tar", "w") as shard:
        for number, buffer in enumerate(pictures):
            for name, content in ((f"{number}.jpg", buffer.getvalue()), (f"{number}.cls", b"%d" % (number % 4))):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list("abcd")}}
    rows = pa.table({
        "image": [{"bytes": buffer.getvalue(), "path": None} for buffer in pictures],
        "label": [number % 4 for number in range(9)],
    }).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})  # fmt: skip
    (tmp_path / "hf").mkdir()
    pa.parquet.write_table(rows, tmp_path / "hf" / "train-0.parquet", row_group_size=4)
    for source, names in ((tmp_path / "set.tar", None), (tmp_path / "hf", list("abcd"))):
        out = tmp_path / f"{source.stem}.beton"
        write_beton(source, out, workers=2)
        beton = Beton(out)
        assert beton.class_names == names
        assert beton.label.tolist() == [number % 4 for number in range(9)]
        assert all(beton.payload(i).tobytes() == buffer.getvalue() for i, buffer in enumerate(pictures))


@pytest.mark.slow
def test_bad_images_stop_or_are_left_out(tree: Path, tmp_path: Path) -> None:
    (tree / "class_0" / "cut.jpg").write_bytes((tree / "class_0" / "0000.jpg").read_bytes()[:400])
    (tree / "class_2" / "empty.png").touch()
    (tree / "class_2" / "gone.png").symlink_to("nowhere")
    out = tmp_path / "out.beton"
    with pytest.raises(BadImages, match="3 of 17 images cannot be stored") as caught:
        write_beton(tree, out, workers=2)
    reasons = {Path(name).name: reason for name, reason in caught.value.bad}
    assert set(reasons) == {"cut.jpg", "empty.png", "gone.png"}
    assert reasons["empty.png"] == "the file is empty"
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]

    written = write_beton(tree, out, workers=2, skip_bad=True)
    assert written.samples == 14
    assert len(Beton(out)) == 14
    listed = (tmp_path / "out.beton.bad.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [name for name, _ in written.bad]
    for name in ("class_0/cut.jpg", "class_2/empty.png", "class_2/gone.png"):
        (tree / name).unlink()
    write_beton(tree, out, workers=1, force=True)
    assert not (tmp_path / "out.beton.bad.txt").exists()


def test_nothing_is_written_when_all_are_bad(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "1.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match=r"none of 1 images can be stored \(the first: .*1\.jpg: not an image"):
        write_beton(tmp_path / "tree", tmp_path / "out.beton", skip_bad=True, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_outputs_that_are_refused(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.beton"
    out.write_text("precious")
    for where, options, says in [
        (out, {}, "exists already; --force"), (tmp_path, {}, "is a folder"), (tmp_path / "no/a.beton", {}, "make it"),
        (tmp_path / "b", {"workers": 0}, "--workers"), (tmp_path / "b", {"limit": 0}, "--limit"),
        (tmp_path / "b", {"page_size": 3 << 20}, "--page-size"), (tmp_path / "b", {"quality": 200}, "--quality"),
        (tmp_path / ("b" * 300), {}, "so long a name"), (tmp_path / ("b" * 250), {}, "would have too long a name"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=says):
            write_beton(tree, where, **options)
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.beton", "tree"]


def test_the_list_of_bad_images_replaces_a_link_and_no_file_behind_it(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "o.beton.bad.txt").symlink_to("precious")
    next(tree.glob("*/*.jpg")).write_bytes(b"no")
    write_beton(tree, tmp_path / "o.beton", skip_bad=True, force=True, workers=1)
    assert (tmp_path / "precious").read_text() == "precious"
    listed = tmp_path / "o.beton.bad.txt"
    assert not listed.is_symlink()
    assert len(listed.read_text().splitlines()) == 1


def test_a_list_of_bad_images_that_could_not_be_written_is_told_before_any_work(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "o.beton.bad.txt").mkdir()
    with pytest.raises(UserError, match=r"o\.beton\.bad\.txt is a folder, where bad images would be listed"):
        write_beton(tree, tmp_path / "o.beton", force=True, workers=1)
    with tarfile.open(tmp_path / "a.tar.bad.txt", "w") as shard:
        shard.add(next(tree.glob("*/*.jpg")), "0.jpg")
    before = (tmp_path / "a.tar.bad.txt").read_bytes()
    with pytest.raises(UserError, match=r"a\.tar\.bad\.txt is the source itself"):
        write_beton(
            tmp_path / "a.tar.bad.txt", tmp_path / "a.tar", listing=SourceSettings("tar"), force=True, workers=1
        )
    assert (tmp_path / "a.tar.bad.txt").read_bytes() == before


@pytest.mark.slow
def test_one_is_counted_as_one(tree: Path, tmp_path: Path) -> None:
    assert len([path for path in tree.rglob("*") if path.suffix == ".txt"]) == 1
    next(tree.glob("*/*.jpg")).write_bytes(b"no")
    printed = command(tree, tmp_path / "o.beton", "--skip-bad", "--workers", 1).stdout
    assert "  1 other file was passed over\n" in printed
    assert "  1 bad image was left out, listed in" in printed


def test_a_full_disk_leaves_nothing_behind(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpmae_loaders.write.pages import PageWriter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PageWriter, "finish", full)
    with pytest.raises(UserError, match="No space left"):
        write_beton(tree, tmp_path / "out.beton", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def picture_of(path: Path) -> np.ndarray | None:
    """Pillow's upright RGB picture with transparency on white, or None where Pillow finds no sound picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(path.read_bytes()))
            image.load()
            image = ImageOps.exif_transpose(image)
        except Exception:
            return None
        if image.mode.startswith("I;16"):
            values = np.asarray(image).astype(float) / 257
            clear = np.asarray(image) == image.info.get("transparency", -1)
            return np.repeat(np.where(clear, 255, values)[..., None], 3, axis=2)
        rgba = np.asarray(image.convert("RGBA")).astype(float)
        if image.mode == "CMYK":
            rgba = np.dstack([np.asarray(image.convert("RGB")).astype(float), np.full(image.size[::-1], 255)])
        share = rgba[..., 3:] / 255
        return rgba[..., :3] * share + 255 * (1 - share)


@pytest.fixture(scope="module")
def odd_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (SHARED_DATA / "odd_images.tar").exists():
        pytest.skip("the shared real images are not here")
    folder = tmp_path_factory.mktemp("odd")
    with tarfile.open(SHARED_DATA / "odd_images.tar") as shard:
        shard.extractall(folder, filter="data")
    return folder / "odd_images"


@pytest.mark.slow
def test_every_odd_image_is_accounted_for(odd_images: Path, tmp_path: Path) -> None:
    files = sorted(path for path in odd_images.iterdir())
    written = write_beton(odd_images, tmp_path / "odd.beton", workers=2, skip_bad=True)
    assert written.kept + written.converted + len(written.bad) + written.passed_over == len(files)
    assert written.kept > 20
    bad = {Path(name).name for name, _ in written.bad}
    beton = Beton(tmp_path / "odd.beton")
    stored = [path for path in files if path.name not in bad and path.suffix]
    assert len(stored) == len(beton) == written.samples
    assert {path.name for path in files if path.suffix and picture_of(path) is None} == bad
    for index, path in enumerate(stored):
        expected, pixels = picture_of(path), beton.decode(index)
        assert expected is not None
        assert pixels.shape == expected.shape, path.name
        difference = np.abs(pixels - expected)
        # JPEG blurs the edges of drawn text a little; the worst is a noise of 4 x 4 pixels
        assert difference.mean() < (4 if path.name == "tiny.png" else 3), path.name
        assert np.percentile(difference, 98) < 25, path.name
    assert not check_beton(tmp_path / "odd.beton", workers=2).bad

    raw = write_beton(odd_images, tmp_path / "raw.beton", workers=2, skip_bad=True, mode="raw")
    assert raw.bad == written.bad
    beton = Beton(tmp_path / "raw.beton")
    for index, path in enumerate(stored):
        assert np.abs(beton.decode(index) - picture_of(path)).max() <= 1, path.name


@pytest.mark.slow
def test_the_real_sample_keeps_its_bytes(tmp_path: Path) -> None:
    if not (SHARED_DATA / "imagenet_sample_400.tar").exists():
        pytest.skip("the shared real images are not here")
    with tarfile.open(SHARED_DATA / "imagenet_sample_400.tar") as shard:
        shard.extractall(tmp_path, filter="data")
    written = write_beton(tmp_path / "imagenet_sample", tmp_path / "out.beton", workers=2)
    assert written.samples == 400
    assert written.kept > 380
    beton = Beton(tmp_path / "out.beton")
    assert beton.label.tolist() == list(range(400))
    assert beton.class_names == sorted(path.name for path in (tmp_path / "imagenet_sample" / "train").iterdir())


@pytest.mark.slow
def test_exit_statuses(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the process itself where work is done, and of what it calls where none is."""
    out = tmp_path / "out.beton"
    done = command(tree, out, "--workers", 1)
    assert (done.returncode, "14 images" in done.stdout, "3 classes: class_0" in done.stdout) == (0, True, True)
    again = command(tree, out)
    assert again.returncode == 2
    assert again.stderr == f"fastpmae-write: error: {out} exists already; --force replaces it\n"
    checked = command("--check", out, "--workers", 1)
    assert (checked.returncode, "every image decodes" in checked.stdout) == (0, True)
    for words, says in [
        ((tmp_path / "missing", tmp_path / "b.beton"), "does not exist"),
        (("--check", tmp_path / "missing"), "does not exist"),
        (("--check", tree / "class_1" / "notes.txt"), "truncated or not a .beton file"),
        ((tree, tmp_path / "b.beton", "--max-size", 0), "--max-size"),
        ((tree, tmp_path / "b.beton", "--workers", -1), "--workers"),
        ((tree,), "SRC and OUT.beton are needed"),
        ((tree, out, "--check", out), "nothing else"),
        ((tree, tmp_path / "b.beton", "--mode", "png"), "invalid choice"),
    ]:
        monkeypatch.setattr(sys, "argv", ["fastpmae-write", *map(str, words)])
        try:
            status = cli.main()
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr().err
        assert (status, says in said) == (2, True), said
        assert "Traceback" not in said
    assert command("--help").returncode == 0
    (tree / "class_0" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused = command(tree, tmp_path / "b.beton", "--workers", 1)
    assert refused.returncode == 2
    assert re.search(r"bad: .*bad\.png: ", refused.stderr)
    assert "1 of 15 images cannot be stored, so nothing was written" in refused.stderr
    assert not (tmp_path / "b.beton").exists()
    assert command(tree, tmp_path / "b.beton", "--workers", 1, "--skip-bad").returncode == 0
    assert len((tmp_path / "b.beton.bad.txt").read_text().splitlines()) == 1


@pytest.mark.slow
def test_check_names_bad_samples(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.beton"
    write_beton(tree, out, workers=1)
    beton = Beton(out)
    content = bytearray(out.read_bytes())
    middle = int(beton.pointer[5]) + int(beton.size[5]) * 2 // 3
    content[middle : middle + 60] = bytes(range(60))  # damage in the image data
    struct.pack_into("<HH", content, 24 + 2 * 1041 + 24 * 7 + 1, 999, 999)  # the metadata's size of sample 7
    (tmp_path / "hurt.beton").write_bytes(content)
    result = command("--check", tmp_path / "hurt.beton", "--workers", 2)
    assert result.returncode == 2
    assert re.search(r"bad: sample 7: the JPEG is \d+x\d+ pixels, its metadata say 999x999", result.stderr)
    assert "of 14 samples are bad" in result.stderr
    assert "bad: sample 5: the JPEG is damaged: its codes make no sense, or end too soon" in result.stderr
    (tmp_path / "cut.beton").write_bytes(content[: len(content) // 2])
    cut = command("--check", tmp_path / "cut.beton")
    assert (cut.returncode, "truncated" in cut.stderr) == (2, True)


@pytest.mark.slow
def test_check_survives_hundreds_of_damaged_payloads(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "tree", 300, classes=1)
    out = tmp_path / "out.beton"
    write_beton(folder, out, workers=2)
    beton = Beton(out)
    content = bytearray(out.read_bytes())
    rng = np.random.default_rng(0)
    for index in range(0, 300, 2):
        start, size = int(beton.pointer[index]), int(beton.size[index])
        for _ in range(rng.integers(1, 6)):
            place = start + int(rng.integers(size - 8) if rng.random() < 0.5 else rng.integers(min(size, 700)))
            content[place : place + 4] = rng.bytes(4)
    (tmp_path / "hurt.beton").write_bytes(content)
    checked = check_beton(tmp_path / "hurt.beton", workers=2)
    bad = {index for index, _ in checked.bad}
    assert all(index % 2 == 0 for index in bad)
    hurt = Beton(tmp_path / "hurt.beton")
    for index in set(range(300)) - bad:
        image = Image.open(io.BytesIO(hurt.payload(index).tobytes()))
        image.load()
        assert image.size == (hurt.width[index], hurt.height[index])
    assert len(bad) > (100 if turbo_available() else 75)


def hurt_tables(out: Path, path: Path, rng: np.random.Generator) -> None:
    content = bytearray(out.read_bytes())
    (table,) = struct.unpack_from("<Q", content, 16)
    place = int(rng.choice([rng.integers(2500), rng.integers(table, len(content))]))
    content[place : place + 8] = rng.bytes(len(content[place : place + 8]))
    path.write_bytes(content if rng.random() < 0.8 else content[: int(rng.integers(len(content)))])


@pytest.mark.slow
def test_check_of_hostile_tables(tree: Path, tmp_path: Path) -> None:
    """Dozens, since each check starts a process; `python -m tests.loaders.hostile` checks thousands in one."""
    write_beton(tree, tmp_path / "out.beton", workers=1)
    rng = np.random.default_rng(0)
    for number in range(30):
        path = tmp_path / f"hurt{number}.beton"
        hurt_tables(tmp_path / "out.beton", path, rng)
        try:
            checked = check_beton(path, workers=1)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017 - it may raise or not
        else:
            assert checked.samples <= 14


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    found = [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children_of(child)]


def in_the_midst(source: Path, out: Path, *options: str) -> tuple[subprocess.Popen, list[int]]:
    """A real process that has begun to write, and its worker processes."""
    words = [sys.executable, "-m", "fastpmae_loaders.write.cli", str(source), str(out), "--workers", "2", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        parts = list(out.parent.glob(f".partial-*/{out.name}"))
        if parts and parts[0].stat().st_size > 3_000_000:
            return process, children_of(process.pid)
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"it never began to write: {process.communicate()}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, number: int, status: int) -> None:
    source = pngs(tmp_path / "many", 600)
    (tmp_path / "out").mkdir()
    process, children = in_the_midst(source, tmp_path / "out" / "f.beton")
    assert len(children) == 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert list((tmp_path / "out").iterdir()) == []
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    source = pngs(tmp_path / "many", 60)
    write_beton(source, tmp_path / "quiet.beton", workers=1)
    process, children = in_the_midst(source, tmp_path / "f.beton")
    for child in children:
        os.kill(child, signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "a worker process was replaced" in errors
    assert (tmp_path / "f.beton").read_bytes() == (tmp_path / "quiet.beton").read_bytes()
    assert "60 images" in output


@pytest.mark.slow
def test_a_decoder_that_takes_too_long_is_a_bad_image(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "tree", 4, classes=1)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (6000, 6000, 3), dtype=np.uint8)).save(
        folder / "class_0" / "0002b.png", compress_level=0
    )
    written = write_beton(folder, tmp_path / "out.beton", workers=1, timeout=0.5, skip_bad=True)
    assert [(Path(name).name, reason) for name, reason in written.bad] == [
        ("0002b.png", "it took more than 0.5 seconds")
    ]
    assert written.samples == 4


@pytest.mark.slow
def test_decompression_bombs(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    head = struct.pack(">IIBBBBB", 50000, 50000, 1, 0, 0, 0, 0)
    lines = zlib.compress(bytes(50000 * 6251))
    body = b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in ((b"IHDR", head), (b"IDAT", lines), (b"IEND", b""))
    )
    (tmp_path / "tree" / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(BadImages) as caught:
        write_beton(tmp_path / "tree", tmp_path / "out.beton", workers=1)
    assert "decompression bomb" in caught.value.bad[0][1]


@pytest.mark.slow
def test_a_large_picture_that_is_allowed_and_scaled(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    Image.new("L", (70000, 30), 77).save(tmp_path / "tree" / "long.png")
    with pytest.raises(BadImages) as caught:
        write_beton(tmp_path / "tree", tmp_path / "out.beton", workers=1)
    assert "--max-size" in caught.value.bad[0][1]
    write_beton(tmp_path / "tree", tmp_path / "out.beton", workers=1, max_size=7000)
    beton = Beton(tmp_path / "out.beton")
    assert (beton.width[0], beton.height[0]) == (7000, 3)
    assert np.abs(beton.decode(0).astype(int) - 77).max() <= 2


@pytest.mark.slow
def test_gray_of_12_bits_in_files_of_16(tmp_path: Path) -> None:
    """Nearly black, which is said, with the flag that helps; with it, as bright as it is."""
    folder = tmp_path / "gray"
    folder.mkdir()
    for number in range(2):
        ramp = np.linspace(0, 4095, 64 * 48).round().reshape(48, 64).astype(np.uint16)
        Image.fromarray(ramp).save(folder / f"{number}.png")
    made_image(0, 60, 40).save(folder / "colours.png")
    for options, count, brightest in (((), 1, 16), (("--white", "4095"), 0, 255)):
        done = command(folder, tmp_path / "out.beton", "--mode", "raw", "--workers", "1", "--force", *options)
        assert done.returncode == 0
        assert done.stderr.count("2 images of 16-bit gray are nearly black") == count, done.stderr
        assert done.stderr.count("with --white 4095") == count
        assert Beton(tmp_path / "out.beton").decode(0).max() == brightest


@pytest.mark.slow
def test_names_with_odd_bytes(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"tree\xff") / os.fsdecode(b"cl\xe9\n")
    write_tree(folder, 2, classes=1)
    (folder / os.fsdecode(b"b\xfe.jpg")).write_bytes(b"no")
    result = command(tmp_path / os.fsdecode(b"tree\xff"), tmp_path / os.fsdecode(b"o\xff.beton"), "--workers", 1)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    result = command(
        tmp_path / os.fsdecode(b"tree\xff"), tmp_path / os.fsdecode(b"o\xff.beton"), "--workers", 1, "--skip-bad"
    )
    assert result.returncode == 0, result.stderr
    assert len(Beton(tmp_path / os.fsdecode(b"o\xff.beton"))) == 2
    assert command("--check", tmp_path / os.fsdecode(b"o\xff.beton"), "--workers", 1).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"\x1b]0;owned\x07\x1b[31mred.jpg"])
def test_a_shard_that_ends_within_a_name_of_odd_bytes(tmp_path: Path, name: bytes) -> None:
    """--skip-bad still writes the file and the list, and no escape sequence reaches the terminal."""
    buffer = io.BytesIO()
    made_image(3, 64, 64).save(buffer, "JPEG")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as shard:
        for member in (b"a.jpg", b"b.jpg", name):
            entry = tarfile.TarInfo(os.fsdecode(member))
            entry.size = len(buffer.getvalue())
            shard.addfile(entry, io.BytesIO(buffer.getvalue()))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.rindex(b"\xff\xd9") - 300])
    done = command(tmp_path / "a.tar", tmp_path / "o.beton", "--workers", 1, "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert "truncated within " in done.stderr
    assert all(line.isprintable() for line in (done.stdout + done.stderr).splitlines())
    assert len(Beton(tmp_path / "o.beton")) == 2
    assert all(part.isprintable() for part in (tmp_path / "o.beton.bad.txt").read_text().strip().split("\t"))


def test_a_source_can_be_told(tree: Path, tmp_path: Path) -> None:
    shutil.copy(tree / "class_0" / "0000.jpg", tree / "loose.jpg")
    with pytest.raises(UserError, match="--flat"):
        write_beton(tree, tmp_path / "out.beton", workers=1)
    written = write_beton(tree, tmp_path / "out.beton", workers=1, listing=SourceSettings(flat=True))
    assert (written.samples, written.class_names) == (15, None)


def test_the_writer_starts_without_torch() -> None:
    words = [sys.executable, "-m", "tests.programs.loaded", "fastpmae_loaders.write.cli"]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=100, check=True)
    assert {"torch", "numba", "ffcv", "cv2"} & set(json.loads(done.stdout)) == set()
