"""Sound .beton files of every kind, and blocks of damaged ones by number, each block in a process of its own.

`python -m tests.loaders.hostile [COUNT]` tries mutations 0 ... COUNT-1 (5,000), two blocks at a time, of which
`tests/loaders/test_mutations.py` tries the first few hundred.
"""

import io
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastpmae_loaders.native.coefficients import pack_jpeg
from fastpmae_loaders.sources.beton import DESCRIPTOR
from fastpmae_loaders.sources.tables import metadata_type
from tests.loaders.conftest import jpeg
from tests.loaders.files import made_pixels, write_beton
from tests.loaders.sources.test_beton import with_class_names
from tests.made import REPOSITORY, made_image

SEED = 7
BLOCK = 2500
"""Mutations that a process tries."""


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


def write_sound(folder: Path) -> Path:
    """Sound files: ordinary ones with class names, hard JPEGs, a tiny raw image, every kind of field, coefficients."""
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


def blocks(folder: Path, count: int) -> dict[str, int]:
    """What became of the first mutations; AssertionError where one broke a promise, or too few of them could have."""
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda start: block(folder, start, min(start + BLOCK, count)), range(0, count, BLOCK)))
    broken = [text for report in reports for text in report["broken"]]
    assert not broken, f"{len(broken)} broken promises:\n" + "\n".join(broken[:20])
    outcomes: Counter[str] = sum((Counter(report["outcomes"]) for report in reports), Counter())
    assert sum(outcomes.values()) == count
    # the mutations are worth something only if many of them get past the door
    assert count * 0.2 < outcomes["refused"] < count * 0.8
    assert outcomes["opened, bad samples"] > count * 0.1
    return dict(outcomes)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="fastpmae-hostile-") as made:
        print(blocks(write_sound(Path(made)), int(sys.argv[1]) if len(sys.argv) > 1 else 5000))
