"""Thousands of damaged .beton files through the reader, the check and the engines: never a crash, one clear error.

What is proven of memory: each sample that opens is decoded and made into views with every array that is read or
written (payload, decoded pixels, scratch, views, masks) ending, or beginning, at a page that kills who touches it.
"""

import io
import json
import os
import struct
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastpmae_loaders import PairedViews, UserError
from fastpmae_loaders.native.coefficients import pack_jpeg
from fastpmae_loaders.sources.beton import DESCRIPTOR
from fastpmae_loaders.sources.jpeg import jpeg_size, turbo_decode
from fastpmae_loaders.sources.tables import metadata_type
from fastpmae_loaders.write.check import check_beton
from tests.engines import needs_ffcv
from tests.loaders.conftest import jpeg
from tests.loaders.files import made_pixels, write_beton
from tests.loaders.mutations import VIEWS, mutation
from tests.loaders.sources.test_beton import with_class_names
from tests.made import REPOSITORY, made_image

SEED = 7


def coded(number: int, width: int, height: int, **options) -> bytes:
    buffer = io.BytesIO()
    made_image(number, width, height).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_every_field(path: Path) -> Path:
    """A file with a field of each of FFCV's kinds, by hand (FFCV's own writer hangs for ever if anything is wrong)."""
    kinds = ((0, b"weight"), (3, b"bytes"), (4, b"array"), (5, b"words"), (6, b"tensor"), (1, b"kind"), (2, b"picture"))
    kinds = (*kinds, (2, b"other"))
    fields = np.zeros(len(kinds), DESCRIPTOR)
    for field, (kind, name) in zip(fields, kinds, strict=True):
        field["type_id"], field["name"][: len(name)] = kind, np.frombuffer(name, np.uint8)
        if kind in (4, 6):
            described = b'[["", "<f4"]]'
            content = struct.pack("<33Q", 3, *(31 * [0]), len(described)) + described
            field["arguments"][: len(content)] = np.frombuffer(content, np.uint8)
    page, count, record = 1 << 13, 3, metadata_type([kind for kind, _ in kinds])
    rows, table = np.zeros(count, record), []
    start = 24 + fields.nbytes + rows.nbytes
    at = -(-start // page) * page
    body = bytearray(at - start)

    def allocate(sample: int, content: bytes) -> int:
        nonlocal at
        if at % page + len(content) > page:
            body.extend(bytes(-at % page))
            at += -at % page
        table.append((sample, at, len(content)))
        body.extend(content)
        at += len(content)
        return at - len(content)

    for i, row in enumerate(rows):
        pixels = made_pixels(i, 20 + i, 31)
        row["f0"], row["f5"] = 0.5, i
        row["f1"] = allocate(i, bytes(9)), 9
        row["f2"] = allocate(i, bytes(12))
        row["f3"] = allocate(i, b'{"a": 1}\0'), 9
        row["f4"] = allocate(i, bytes(12))
        row["f6"] = 0, 40, 30, allocate(i, jpeg(i, 40, 30))
        row["f7"] = 1, 31, 20 + i, allocate(i, pixels.tobytes())
    header = struct.pack("<HHIQQ", 2, len(kinds), page, count, at)
    entries = np.array(table, "<u8").tobytes()
    path.write_bytes(header + fields.tobytes() + rows.tobytes() + bytes(body) + entries)
    return path


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound files: ordinary ones with class names, hard JPEGs, a tiny raw image, every kind of field, coefficients."""
    folder = tmp_path_factory.mktemp("sound")
    stored = [jpeg(i, 40 + 3 * i, 30 + 5 * i) if i < 5 else made_pixels(i, 30 + 5 * i, 40 + 3 * i) for i in range(8)]
    write_beton(folder / "a.beton", stored, [(40 + 3 * i, 30 + 5 * i) for i in range(8)], 1 << 14)
    with_class_names(folder / "a.beton", [str(i) for i in range(71)])
    hard = [
        coded(1, 61, 47, progressive=True), coded(2, 61, 47, restart_marker_blocks=2), coded(3, 61, 47, subsampling=2),
        coded(4, 61, 47, progressive=True, restart_marker_blocks=1), coded(5, 61, 47, optimize=True, quality=99),
    ]  # fmt: skip
    write_beton(folder / "b.beton", hard, [(61, 47)] * 5, 1 << 15)
    write_beton(folder / "c.beton", [made_pixels(0, 3, 5)], page_size=1 << 12)
    with_every_field(folder / "d.beton")
    codes = [pack_jpeg(coded(i, 61, 47, subsampling=i % 3), 47, 61) for i in range(6)]
    write_beton(folder / "e.beton", [code for code in codes if code is not None], [(61, 47)] * 6, 1 << 15)
    return folder


def block(folder: Path, start: int, stop: int) -> dict:
    """A process that tries mutations; the report that it prints."""
    paths = os.pathsep.join(str(REPOSITORY / part) for part in (".", "kernels", "loaders"))
    words = ["-W", "error", "-m", "tests.loaders.mutations", str(folder), str(SEED), str(start), str(stop)]
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=400,
    )
    progress = folder / f"progress-{start}"
    at = progress.read_text() if progress.exists() else "none"
    assert done.returncode == 0, f"status {done.returncode} at mutation {at}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def blocks(folder: Path, count: int, size: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda start: block(folder, start, min(start + size, count)), range(0, count, size)))
    broken = [text for report in reports for text in report["broken"]]
    assert not broken, f"{len(broken)} broken promises:\n" + "\n".join(broken[:20])
    outcomes: Counter[str] = sum((Counter(report["outcomes"]) for report in reports), Counter())
    print(dict(outcomes))
    assert sum(outcomes.values()) == count
    # the mutations are worth something only if many of them get past the door
    assert count * 0.2 < outcomes["refused"] < count * 0.8
    assert outcomes["opened, bad samples"] > count * 0.1


@pytest.mark.slow
def test_hostile_files_on_every_engine(sound: Path) -> None:
    blocks(sound, 500, 250)


@pytest.mark.slow
def test_five_thousand_hostile_files_on_every_engine(sound: Path) -> None:
    blocks(sound, 5000, 2500)


@pytest.mark.slow
def test_the_check_itself_survives(sound: Path, tmp_path: Path) -> None:
    """`fastpmae-write --check` with its worker processes; the blocks call what those processes run."""
    contents = [path.read_bytes() for path in sorted(sound.glob("*.beton"))]
    opened = 0
    for number in range(40):
        what, content = mutation(contents, SEED, number)
        path = tmp_path / "hostile.beton"
        path.write_bytes(content)
        try:
            checked = check_beton(path)
        except UserError as error:
            assert str(path) in str(error), what  # noqa: PT017 - it may raise or not
            continue
        opened += 1
        assert all(reason and reason.isprintable() for _, reason in checked.bad)
        if opened == 4:
            break
    assert opened == 4


def without(payload: bytes, marker: int) -> bytes:
    """A JPEG whose segments of one kind are gone."""
    at, kept = 2, [payload[:2]]
    while payload[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(payload[at + 2 : at + 4], "big")
        if payload[at + 1] != marker:
            kept.append(payload[at:end])
        at = end
    return b"".join([*kept, payload[at:]])


@needs_ffcv
@pytest.mark.parametrize("progressive", [False, True])
def test_no_image_is_decoded_with_the_tables_of_another(tmp_path: Path, progressive: bool) -> None:
    """libjpeg keeps its tables from image to image: what a thread showed before would decide what it shows now."""
    whole = coded(1, 61, 47, progressive=progressive)
    images = [whole, without(whole, 0xDB), whole, without(whole, 0xC4), whole]
    file = write_beton(tmp_path / "tables.beton", images, [(61, 47)] * 5)
    settings = {"settings": VIEWS, "shuffle": False, "bad_fraction": 1.0, "workers": 1}
    shown = []
    for engine in ("ffcv", "torch"):
        with PairedViews(file, 5, engine, **settings) as views:
            batch = next(iter(views))
            shown.append((batch.failed, batch.samples.tolist()))
        with PairedViews(file, 1, engine, **settings) as views:
            alone = [batch.failed for batch in views]
        assert [index for failed in alone for index in failed] == shown[-1][0]
    assert shown[0] == shown[1]
    assert 1 in shown[0][0]


@pytest.mark.slow
@needs_ffcv
def test_the_engines_agree_on_what_is_bad(tmp_path: Path) -> None:
    """Hundreds of damaged JPEGs, many of which libjpeg decodes with a warning: shown, or bad, on both engines alike."""
    rng = np.random.default_rng(1)
    images, warned = [], 0
    for number in range(400):
        data = bytearray(coded(number % 7, 48, 40, progressive=number % 2 == 0))
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(2, len(data))] = rng.integers(0, 256)
        if number % 5 == 0:
            del data[rng.integers(2, len(data)) :]
        images.append(bytes(data))
    file = write_beton(tmp_path / "damaged.beton", images, [(48, 40)] * 400)
    batches = []
    for engine in ("ffcv", "torch"):
        with PairedViews(file, 400, engine, VIEWS, shuffle=False, bad_fraction=1.0) as views:
            batches.append(next(iter(views)))
    first, second = batches
    assert first.failed == second.failed
    assert first.samples.tolist() == second.samples.tolist()
    difference = (first.simple.int() - second.simple.int()).abs().float().flatten(1).mean(1)
    for index in sorted(set(range(400)) - set(first.failed)):
        if jpeg_size(images[index]) != (48, 40) or turbo_decode(images[index], 48, 40) is None:
            warned += 1
            assert difference[index] == 0  # Pillow's pixels on both
    assert warned > 50
    # the rest differs by the two decoders' DCT alone, but where damage drives it out of its range
    assert difference.median() < 1.5
