"""The reader against a writer of its own, and against files that somebody damaged on purpose."""

import io
import json
import struct
import tarfile
import time
import warnings
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpmae_loaders.errors import BetonError
from fastpmae_loaders.sources.beton import Beton, jpeg_size
from fastpmae_loaders.sources.jpeg import jpeg_header, turbo_decode
from tests.engines import needs_ffcv
from tests.loaders.files import write_beton
from tests.made import SHARED_DATA, made_image

PAGE = 1 << 14
DESCRIPTORS = 24 + 2 * 1041
EXTREMES = (0, 1, 2**16 - 1, 2**31, 2**32 - 1, 2**48, 2**63 - 1, 2**63, 2**64 - 25, 2**64 - 1)


def jpeg(image: Image.Image, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **settings)
    return buffer.getvalue()


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [made_image(seed, 40 + 3 * seed, 30 + 5 * seed) for seed in range(8)]


@pytest.fixture
def mixed(pictures: list[Image.Image], tmp_path: Path) -> Path:
    """Five JPEGs, three raw images, over several pages."""
    stored = [jpeg(image) if seed < 5 else np.asarray(image) for seed, image in enumerate(pictures)]
    return write_beton(tmp_path / "mixed.beton", stored, [image.size for image in pictures], PAGE)


def with_class_names(path: Path, names: object, checksum: int | None = None) -> Path:
    """Adds class names to a file as the format describes it: a blob before the table, its place in the label field."""
    content = bytearray(path.read_bytes())
    (table,) = struct.unpack_from("<Q", content, 16)
    blob = json.dumps(names).encode()
    content[table:table] = blob
    struct.pack_into("<Q", content, 16, table + len(blob))
    crc = zlib.crc32(blob) if checksum is None else checksum
    struct.pack_into("<12sIQQ", content, 24 + 1041 + 17, b"fastpmaecls1", crc, table, len(blob))
    path.write_bytes(content)
    return path


def test_reads_what_an_independent_writer_wrote(mixed: Path, pictures: list[Image.Image]) -> None:
    beton = Beton(mixed)
    assert len(beton) == 8
    assert beton.mode.tolist() == [0] * 5 + [1] * 3
    assert [*zip(beton.width.tolist(), beton.height.tolist(), strict=True)] == [p.size for p in pictures]
    assert beton.label.tolist() == [10 * i for i in range(8)]
    assert beton.class_names is None
    assert beton.page_size == PAGE
    assert (beton.page_of == beton.pointer // PAGE).all()
    assert len(set(beton.page_of.tolist())) > 1
    for index, picture in enumerate(pictures):
        expected = np.asarray(picture)
        if index < 5:
            assert beton.payload(index).tobytes() == jpeg(picture)
            expected = np.asarray(Image.open(io.BytesIO(jpeg(picture))))
        assert np.array_equal(beton.decode(index), expected)
    with pytest.raises(ValueError, match="read-only"):
        beton.payload(0)[0] = 1


def test_survives_being_sent_to_another_process(mixed: Path) -> None:
    import pickle

    assert np.array_equal(pickle.loads(pickle.dumps(Beton(mixed))).pointer, Beton(mixed).pointer)


def test_class_names_are_read_and_checked(mixed: Path) -> None:
    original = mixed.read_bytes()
    names = [f"class {i} – é" for i in range(71)]
    assert Beton(with_class_names(mixed, names)).class_names == names
    mixed.write_bytes(original)
    strange = [*names[:69], "\x1b]0;owned\x07", "\ud800"]
    assert Beton(with_class_names(mixed, strange)).class_names == [*names[:69], "\\x1b]0;owned\\x07", "\\ud800"]
    mixed.write_bytes(original)
    for damaged, says in [(names[:70], "label 70"), ("names", "no list"), ([1, 2], "no list"), (None, "no list")]:
        mixed.write_bytes(original)
        with pytest.raises(BetonError, match=says):
            Beton(with_class_names(mixed, damaged))
    mixed.write_bytes(original)
    with pytest.raises(BetonError, match="checksum"):
        Beton(with_class_names(mixed, names, checksum=1))
    mixed.write_bytes(original)
    with pytest.raises(BetonError, match="no list"):
        Beton(with_class_names(mixed, json.loads("[" * 900 + "]" * 900)))


def put(path: Path, offset: int, form: str, *values) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, offset, *values)
    path.write_bytes(content)


def table_at(path: Path, entry: int) -> int:
    (table,) = struct.unpack_from("<Q", path.read_bytes(), 16)
    return table + 24 * entry


@pytest.mark.parametrize(
    ("offset", "form", "value", "says"),
    [
        (0, "<H", 1, "version 1"),
        (2, "<H", 0, "no fields"),
        (2, "<H", 65535, "field descriptors"),
        (4, "<I", 3000, "power of two"),
        (4, "<I", 0, "power of two"),
        (4, "<I", 64, "crosses a page"),
        (8, "<Q", 0, "no samples"),
        (8, "<Q", 2**64 - 1, "metadata of 18446744073709551615 samples"),
        (8, "<Q", 9, "storage mode|pixels|nothing is allocated"),
        (16, "<Q", 10, "allocation table"),
        (16, "<Q", 2**64 - 24, "allocation table"),
        (24, "B", 255, "unknown type"),
        (24, "B", 0, "none of its fields"),
        (25, "B", 200, "not ASCII"),
        (DESCRIPTORS + 0, "B", 2, "mode 2"),
        (DESCRIPTORS + 1, "<H", 0, "0x30 pixels"),
        (DESCRIPTORS + 5, "<Q", 2**64 - 1, "nothing is allocated"),
        (DESCRIPTORS + 5, "<Q", 0, "nothing is allocated"),
        (DESCRIPTORS + 24 * 6 + 1, "<H", 59, "instead of"),
    ],
)
def test_damage_is_named(mixed: Path, offset: int, form: str, value: int, says: str) -> None:
    put(mixed, offset, form, value)
    with pytest.raises(BetonError, match=says) as caught:
        Beton(mixed)
    assert str(mixed) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (0, 8, "belongs to no sample"),
        (0, 3, "allocated to sample 3"),
        (8, 2**64 - 1, "outside the data"),
        (8, 16, "outside the data"),
        (16, 2**64 - 1, "outside the data"),
        (16, 0, "nothing is allocated"),
        (16, 4000, "overlaps the next"),
    ],
)
def test_damage_in_the_allocation_table_is_named(mixed: Path, offset: int, value: int, says: str) -> None:
    put(mixed, table_at(mixed, 1) + offset, "<Q", value)
    with pytest.raises(BetonError, match=says):
        Beton(mixed)


def test_two_samples_cannot_share_bytes(mixed: Path) -> None:
    shared = struct.unpack_from("<Q", mixed.read_bytes(), DESCRIPTORS + 5)[0]
    put(mixed, DESCRIPTORS + 24 + 5, "<Q", shared)
    with pytest.raises(BetonError, match=r"sample 1 .*allocated to sample 0"):
        Beton(mixed)


def test_absurd_dimensions_are_refused(mixed: Path) -> None:
    put(mixed, DESCRIPTORS + 1, "<HH", 65535, 65535)
    with pytest.raises(BetonError, match="65535x65535 pixels, above the limit"):
        Beton(mixed)


def test_two_fields_of_one_name_are_refused(mixed: Path) -> None:
    put(mixed, 24 + 1041 + 1, "16s", b"image")
    with pytest.raises(BetonError, match="same name"):
        Beton(mixed)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("hello, I am no .beton file at all, and longer than a header")
    for name, says in [("missing", "does not exist"), ("empty", "empty"), ("", "not a file"), ("text", "version")]:
        with pytest.raises(BetonError, match=says):
            Beton(tmp_path / name)


def test_every_truncation_is_noticed(mixed: Path, tmp_path: Path) -> None:
    content = mixed.read_bytes()
    rng = np.random.default_rng(5)
    lengths = {*range(1, 60), *rng.integers(60, len(content), 150).tolist(), len(content) - 1, len(content) - 24}
    for length in sorted(lengths):
        cut = tmp_path / f"cut{length}.beton"
        cut.write_bytes(content[:length])
        with pytest.raises(BetonError):
            Beton(cut)


def test_a_jpeg_larger_than_its_metadata_is_not_decoded(mixed: Path) -> None:
    put(mixed, DESCRIPTORS + 1, "<HH", 20, 15)
    with pytest.raises(BetonError, match="sample 0: the JPEG is 40x30 pixels, its metadata say 20x15"):
        Beton(mixed).decode(0)


def test_a_damaged_jpeg_is_named_by_its_index(mixed: Path) -> None:
    beton = Beton(mixed)
    put(mixed, int(beton.pointer[3]) + 180, "64s", b"\xff\xd9" * 32)  # in its Huffman tables
    with pytest.raises(BetonError, match="sample 3"):
        Beton(mixed).decode(3)


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One or a few changes: extreme numbers where numbers stand, flipped bits, swapped words; some files are cut."""
    data = bytearray(content)
    (table,) = struct.unpack_from("<Q", content, 16)
    names = 24 + 1041 + 17
    regions = [(0, 24), (24, 60), (names, names + 40), (DESCRIPTORS, DESCRIPTORS + 8 * 24), (table, len(data))]
    for _ in range(rng.integers(1, 4)):
        start, stop = regions[rng.integers(len(regions))]
        place, other = (int(place) for place in rng.integers(start, stop - 7, 2))
        kind = rng.integers(5)
        if kind == 0:
            aligned = start + (place - start) // 8 * 8
            struct.pack_into("<Q", data, aligned, EXTREMES[rng.integers(len(EXTREMES))])
        elif kind == 1:
            data[place : place + 2] = rng.bytes(2)
        elif kind == 2:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 3:
            data[place : place + 8], data[other : other + 8] = data[other : other + 8], data[place : place + 8]
        else:
            anywhere = int(rng.integers(len(data) - 16))
            data[anywhere : anywhere + 16] = rng.bytes(16)
    if rng.random() < 0.05:
        return bytes(data[: int(rng.integers(1, len(data)))])
    return bytes(data) + rng.bytes(int(rng.choice([0, 0, 0, 0, 0, 0, 0, 0, 24, 5])))


def is_one_sentence(error: BetonError, about: str) -> bool:
    return about in str(error) and "\n" not in str(error)


def sound_or_error(path: Path) -> bool:
    """Whether the file opens. If it does, everything it promises must hold, by reckoning of our own."""
    try:
        beton = Beton(path)
    except BetonError as error:
        assert is_one_sentence(error, str(path))  # noqa: PT017 - it may raise or not
        return False
    size = path.stat().st_size
    (table,) = struct.unpack_from("<Q", path.read_bytes(), 16)
    ranges = sorted((int(p), int(p) + int(s)) for p, s in zip(beton.pointer, beton.size, strict=True))
    assert all(DESCRIPTORS + 24 * len(beton) <= start < stop <= table <= size for start, stop in ranges)
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))
    for index in range(len(beton)):
        shape = (int(beton.height[index]), int(beton.width[index]), 3)
        try:
            assert beton.decode(index).shape == shape
        except BetonError as error:
            assert is_one_sentence(error, f"sample {index}")  # noqa: PT017
    return True


def hostile(mixed: Path, tmp_path: Path, seed: int, count: int) -> int:
    """Opens `count` mutations of a file; returns how many still opened."""
    content = with_class_names(mixed, [str(i) for i in range(71)]).read_bytes()
    rng = np.random.default_rng(seed)
    opened = 0
    for number in range(count):
        path = tmp_path / f"hostile{number}.beton"
        path.write_bytes(mutated(content, rng))
        opened += sound_or_error(path)
        path.unlink()
    return opened


def test_hostile_files_raise_or_are_sound(mixed: Path, tmp_path: Path) -> None:
    assert 0 < hostile(mixed, tmp_path, 0, 400) < 200


@pytest.mark.slow
def test_many_hostile_files_raise_or_are_sound(mixed: Path, tmp_path: Path) -> None:
    assert 0 < hostile(mixed, tmp_path, 1, 5000) < 2500


@pytest.mark.parametrize("stretch", [1, 3, 8])
def test_tables_are_checked_across_stretches(mixed: Path, monkeypatch: pytest.MonkeyPatch, stretch: int) -> None:
    whole = Beton(mixed)
    monkeypatch.setattr("fastpmae_loaders.sources.tables._STRETCH", stretch)
    apart = Beton(mixed)
    for name in ("mode", "width", "height", "pointer", "size", "label", "page_of"):
        assert getattr(apart, name).tolist() == getattr(whole, name).tolist()
    for sample in (2, 3, 7):
        put(mixed, DESCRIPTORS + 24 * sample, "B", 9)
    with pytest.raises(BetonError, match=r"sample 2 has storage mode 9; .* \(2 more like it\)"):
        Beton(mixed)
    for sample, mode in ((2, 0), (3, 0), (7, 1)):
        put(mixed, DESCRIPTORS + 24 * sample, "B", mode)
    neighbours = [i for i in range(7) if whole.page_of[i] == whole.page_of[i + 1]]
    assert len(neighbours) > 2
    for sample in neighbours:  # each reaches a byte into the next
        reach = int(whole.pointer[sample + 1] - whole.pointer[sample]) + 1
        put(mixed, table_at(mixed, sample) + 16, "<Q", reach)
        with pytest.raises(BetonError, match=f"allocation {sample} .*overlaps the next one"):
            Beton(mixed)
        put(mixed, table_at(mixed, sample) + 16, "<Q", int(whole.size[sample]))


def test_allocations_in_any_order(mixed: Path) -> None:
    """As FFCV's writer leaves them, whose workers write pages by turns; one that stands twice is missing elsewhere."""
    whole, content = Beton(mixed), bytearray(mixed.read_bytes())
    (start,) = struct.unpack_from("<Q", content, 16)
    table = np.frombuffer(content, "<u8", offset=start).reshape(-1, 3)
    table[:] = table[[5, 2, 7, 0, 1, 6, 3, 4]]
    mixed.write_bytes(content)
    again = Beton(mixed)
    assert (again.size == whole.size).all()
    for index in range(8):
        assert (again.payload(index) == whole.payload(index)).all()
    table[3] = table[4]
    mixed.write_bytes(content)
    with pytest.raises(BetonError, match="overlaps the next one"):
        Beton(mixed)


def test_images_that_lie_in_another_order_than_they_are_numbered(tmp_path: Path, pictures: list[Image.Image]) -> None:
    sizes = [image.size for image in pictures]
    path = write_beton(tmp_path / "a.beton", [jpeg(image) for image in pictures], sizes, PAGE)
    whole, content = Beton(path), bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<Q", content, 16)
    turn = [3, 1, 7, 0, 2, 6, 5, 4]
    records = np.frombuffer(content, "V24", count=8, offset=DESCRIPTORS)
    records[:] = records[turn]
    table = np.frombuffer(content, "<u8", offset=start).reshape(-1, 3)
    table[:, 0] = np.argsort(turn)[table[:, 0]]
    path.write_bytes(content)
    turned = Beton(path)
    for index, place in enumerate(turn):
        assert (turned.payload(index) == whole.payload(place)).all()
    # one of them reaches into the one behind it in the file, which has another number
    first = next(i for i in range(7) if whole.page_of[i] == whole.page_of[i + 1])
    table[first, 2] = whole.pointer[first + 1] - whole.pointer[first] + 1
    path.write_bytes(content)
    with pytest.raises(BetonError, match="overlaps the next one"):
        Beton(path)


def test_opening_keeps_some_thirty_bytes_a_sample(tmp_path: Path) -> None:
    beton = Beton(write_beton(tmp_path / "a.beton", [jpeg(made_image(1, 40, 30))] * 50, [(40, 30)] * 50, PAGE))
    columns = [value for value in vars(beton).values() if isinstance(value, np.ndarray)]
    assert sum(column.nbytes for column in columns) == 29 * 50
    assert beton.page_of.nbytes == 4 * 50


def test_opens_a_million_samples_in_about_a_second(tmp_path: Path) -> None:
    count, size, page = 1_280_000, 100_000, 1 << 23
    per_page = page // size
    index = np.arange(count)
    start = -(-(DESCRIPTORS + 24 * count) // page) * page
    pointer = start + index // per_page * page + index % per_page * size
    image = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
    records = np.zeros(count, np.dtype([("image", image), ("label", "<i8")], align=True))
    records["image"]["width"], records["image"]["height"] = 500, 375
    records["image"]["data_ptr"] = pointer
    table = np.stack([index, pointer, np.full(count, size)], axis=1).astype("<u8")
    path = tmp_path / "million.beton"
    with path.open("wb") as file:  # a sparse file: the images take no room on the disk
        file.write(struct.pack("<HHIQQ", 2, 2, page, count, int(pointer[-1]) + size))
        for type_id, name in ((2, b"image"), (1, b"label")):
            file.write(struct.pack("<B16s1024x", type_id, name))
        file.write(records.tobytes())
        file.seek(int(pointer[-1]) + size)
        file.write(table.tobytes())
    began = time.process_time()
    beton = Beton(path)
    assert time.process_time() - began < 3
    assert len(beton) == count
    path.unlink()


def test_jpeg_size_reads_what_pillow_reads(tmp_path: Path) -> None:
    picture = made_image(1, 77, 45)
    thumbnail = jpeg(made_image(2, 16, 12))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + bytes(6) + thumbnail  # a second JPEG with a frame header of its own
    for payload in [
        jpeg(picture),
        jpeg(picture, progressive=True),
        jpeg(picture, exif=exif),
        jpeg(picture.convert("L")),
        jpeg(picture.convert("CMYK")),
        jpeg(picture, restart_marker_blocks=2),
        b"\xff\xd8\xff\xff\xff" + jpeg(picture)[3:],  # fill bytes before a marker
    ]:
        assert jpeg_size(payload) == Image.open(io.BytesIO(payload)).size == (77, 45)
        assert jpeg_size(np.frombuffer(payload, np.uint8)) == (77, 45)
    assert jpeg_header(jpeg(picture)).is_ycbcr
    assert not jpeg_header(jpeg(picture, keep_rgb=True)).is_ycbcr


def test_jpeg_size_of_what_is_no_jpeg() -> None:
    whole = jpeg(made_image(1, 77, 45))
    for payload in [
        b"",
        b"\xff",
        b"\xff\xd8",
        b"\x89PNG",
        whole[1:],
        whole[:100],
        b"\xff\xd8" * 9,
        b"\xff\xd8\xff\xc0\0",
    ]:
        with pytest.raises(BetonError):
            jpeg_size(payload)
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(whole[:700])
        for place in rng.integers(2, 650, 3):
            damaged[place] = rng.integers(256)
        try:
            width, height = jpeg_size(bytes(damaged))
            assert 0 < width < 65536
            assert 0 < height < 65536
        except BetonError:
            pass


def test_jpeg_size_on_real_files() -> None:
    if not (SHARED_DATA / "odd_images.tar").exists():
        pytest.skip("the shared real images are not here")
    seen = 0
    with tarfile.open(SHARED_DATA / "odd_images.tar") as shard:
        for member in shard:
            if member.name.endswith(".jpg"):
                content = shard.extractfile(member)
                assert content is not None
                payload = content.read()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    assert jpeg_size(payload) == Image.open(io.BytesIO(payload)).size, member.name
                seen += 1
    assert seen > 40


@needs_ffcv
def test_turbo_decode_tells_of_damage() -> None:
    picture = made_image(3, 90, 70)
    payload = jpeg(picture, quality=95, subsampling=0)
    pixels = turbo_decode(payload, 90, 70)
    assert pixels is not None
    assert np.abs(pixels.astype(int) - np.asarray(picture)).mean() < 2
    assert turbo_decode(payload, 90, 71) is None
    assert turbo_decode(payload, 45, 35) is None  # libjpeg-turbo would scale it to that
    assert turbo_decode(payload[: len(payload) // 2], 90, 70) is None
