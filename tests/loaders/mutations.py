"""Damaged .beton files by number, and what becomes of each: run as a process of its own, since one may kill it.

`python -m tests.loaders.mutations FOLDER SEED START STOP` reads the sound files in FOLDER and prints, as JSON,
how many mutations START ... STOP-1 were refused and opened, and every one that broke a promise.
"""

import json
import struct
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastpmae_loaders import Beton, PairedViews, UserError, ViewSettings
from fastpmae_loaders.engines import torch_engine
from fastpmae_loaders.engines.base import Source, largest, make_job
from fastpmae_loaders.engines.scratch import Scratch
from fastpmae_loaders.engines.views import Rows
from fastpmae_loaders.sources.beton import COEFFICIENTS
from fastpmae_loaders.sources.jpeg import turbo_available
from fastpmae_loaders.write.check import sample_checker
from tests.loaders.guards import guarded

HEADER, DESCRIPTOR, RECORD, ENTRY = 24, 1041, 24, 24
EXTREMES = (0, 1, 2, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**63 - 1, 2**63)
EXTREMES += (2**64 - 25, 2**64 - 24, 2**64 - 1)
VIEWS = ViewSettings(image_size=32, patch_size=8)
ENGINES = ("native", "ffcv", "torch") if turbo_available() else ("native", "torch")


class File:
    """A .beton as its format describes it, with the places of everything in it."""

    def __init__(self, content: bytes):
        self.data = bytearray(content)
        _, self.fields, self.page, self.samples, self.table = struct.unpack_from("<HHIQQ", content)
        self.records = HEADER + self.fields * DESCRIPTOR
        types = content[HEADER : self.records : DESCRIPTOR]
        record = np.dtype(
            [("", {0: "f8", 1: "i8", 2: "u1,u2,u2,u8", 3: "u8,u8", 5: "u8,u8"}.get(t, "u8")) for t in types], align=True
        )
        self.record = record.itemsize
        fields: Any = record.fields
        self.image = int(fields[f"f{types.index(2)}"][1])
        self.entries = (len(content) - self.table) // ENTRY
        sizes = {struct.unpack_from("<QQQ", content, place)[1:] for place in range(self.table, len(content), ENTRY)}
        pointers = [struct.unpack_from("<Q", content, self.place(i) + 5)[0] for i in range(self.samples)]
        self._payloads = [(pointer, dict(sizes)[pointer]) for pointer in pointers]

    def place(self, sample: int) -> int:
        """Where a sample's image record is: mode (1 byte), width, height (2), pointer (8)."""
        return self.records + sample * self.record + self.image

    def payload(self, sample: int) -> tuple[int, int]:
        """(first byte, size) of an image, before anything was changed."""
        return self._payloads[sample]

    def put(self, form: str, place: int, value: int) -> None:
        """Write a number, cut to its width."""
        size = struct.calcsize(form)
        self.data[place : place + size] = (value % 256**size).to_bytes(size, "little")


def _extreme(file: File, rng: np.random.Generator, near: int) -> int:
    """A number that somebody may have forgotten: the largest, the smallest, just beside a true one."""
    kind = rng.integers(4)
    if kind == 0:
        return int(EXTREMES[rng.integers(len(EXTREMES))])
    if kind == 1:
        return near + int(rng.choice([-1, 1, -8, 8, -24, 24, 4096, -4096]))
    if kind == 2:
        landmarks = (len(file.data), file.table, file.records, file.page, file.payload(0)[0], 0)
        return int(rng.choice(landmarks)) + int(rng.integers(-2, 3))
    return int(rng.integers(0, 2**63)) >> int(rng.integers(0, 63))


def header(file: File, rng: np.random.Generator) -> None:
    form, place = (("<H", 0), ("<H", 2), ("<I", 4), ("<Q", 8), ("<Q", 16))[rng.integers(5)]
    (near,) = struct.unpack_from(form, file.data, place)
    file.put(form, place, _extreme(file, rng, near))


def descriptors(file: File, rng: np.random.Generator) -> None:
    start = HEADER + DESCRIPTOR * int(rng.integers(file.fields))
    for _ in range(rng.integers(1, 4)):
        place = start + int(
            rng.choice([0, int(rng.integers(1, 17)), int(rng.integers(17, 90)), int(rng.integers(273, 300))])
        )
        file.data[place] = int(rng.choice([int(rng.integers(256)), int(rng.integers(8)), 0, 255]))


def arguments(file: File, rng: np.random.Generator) -> None:
    """Shapes, lengths and types in a field's arguments, the place of class names: as 8-byte numbers, or all zero."""
    start = HEADER + DESCRIPTOR * int(rng.integers(file.fields)) + 17
    if rng.random() < 0.2:
        file.data[start : start + 1024] = bytes(1024)
        return
    place = start + int(rng.choice([16, 24, int(rng.integers(0, 34)) * 8, 256]))
    (near,) = struct.unpack_from("<Q", file.data, place)
    file.put("<Q", place, _extreme(file, rng, near))


def records(file: File, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 3)):
        place = file.place(int(rng.integers(file.samples)))
        form, offset = (("B", 0), ("<H", 1), ("<H", 3), ("<Q", 5))[rng.integers(4)]
        (near,) = struct.unpack_from(form, file.data, place + offset)
        file.put(form, place + offset, _extreme(file, rng, near))


def table(file: File, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 3)):
        place = file.table + ENTRY * int(rng.integers(file.entries)) + 8 * int(rng.integers(3))
        (near,) = struct.unpack_from("<Q", file.data, place)
        file.put("<Q", place, _extreme(file, rng, near))


def swap(file: File, rng: np.random.Generator) -> None:
    """Two samples' pointers, records or table entries change places, or one is copied over the other."""
    a, b = (int(sample) for sample in rng.integers(file.samples, size=2))
    entry_a, entry_b = (file.table + ENTRY * int(entry) for entry in rng.integers(file.entries, size=2))
    one, other, size = [
        (file.place(a) + 5, file.place(b) + 5, 8), (file.place(a), file.place(b), 13), (entry_a, entry_b, ENTRY),
        (entry_a, entry_b, 8), (entry_a + 8, entry_b + 8, 8), (entry_a + 16, entry_b + 16, 8),
    ][rng.integers(6)]  # fmt: skip
    first, second = file.data[one : one + size], file.data[other : other + size]
    file.data[other : other + size] = first
    if rng.random() < 0.7:
        file.data[one : one + size] = second


def overlap(file: File, rng: np.random.Generator) -> None:
    """A sample's pointer and its table entry move together, into a neighbour or out of the data."""
    sample = int(rng.integers(file.samples))
    start, _ = file.payload(sample)
    step = int(rng.choice([-1, 1, 16, -16, 500, -500, file.page, -file.page, 2**63, -start]))
    for entry in range(file.entries):
        place = file.table + ENTRY * entry + 8
        if struct.unpack_from("<Q", file.data, place)[0] == start:
            file.put("<Q", place, start + step)
            if rng.random() < 0.5:
                file.put("<Q", place + 8, _extreme(file, rng, file.page))
    file.put("<Q", file.place(sample) + 5, start + step)


def cut(file: File, rng: np.random.Generator) -> None:
    """The file ends at, or a byte from, where something begins or ends; or somewhere; or goes on too long."""
    start, size = file.payload(int(rng.integers(file.samples)))
    edges = (1, 8, HEADER, HEADER + DESCRIPTOR, file.records, file.place(0), file.place(file.samples - 1), start)
    edges += (start + size, file.page, 2 * file.page, file.table, len(file.data) - ENTRY, len(file.data))
    edge = int(rng.choice([*edges, int(rng.integers(1, len(file.data)))])) + int(rng.integers(-1, 2))
    if edge <= len(file.data):
        del file.data[max(1, edge) :]
    else:
        file.data += rng.bytes(int(rng.choice([1, 8, ENTRY, 4096])))
    if rng.random() < 0.3 and len(file.data) > HEADER:
        # the header believes it
        file.put("<Q", 16, max(0, len(file.data) - ENTRY * int(rng.integers(0, file.entries + 1))))


def bits(file: File, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 9)):
        place = int(rng.choice([rng.integers(file.place(int(file.samples))), rng.integers(len(file.data))]))
        file.data[place] ^= 1 << int(rng.integers(8))


def noise(file: File, rng: np.random.Generator) -> None:
    """Random bytes all over an image, or zeros, or another image's beginning."""
    start, size = file.payload(int(rng.integers(file.samples)))
    kind = rng.integers(4)
    if kind == 0:
        for place in rng.integers(start, start + size, int(rng.integers(1, 12))):
            file.data[place] = int(rng.integers(256))
    elif kind == 1:
        first = start + int(rng.integers(size))
        last = min(start + size, first + int(rng.integers(1, 400)))
        file.data[first:last] = rng.bytes(last - first)
    elif kind == 2:
        first = start + int(rng.integers(size))
        file.data[first : start + size] = bytes([int(rng.choice([0, 255, 0xD9]))]) * (start + size - first)
    else:
        other, length = file.payload(int(rng.integers(file.samples)))
        length = min(size, length, int(rng.integers(1, max(2, length))))
        file.data[start : start + length] = file.data[other : other + length]


def frame(file: File, rng: np.random.Generator) -> None:
    """The JPEG's own header: size, precision, components, sampling, lengths of segments, kinds of marker."""
    sample = int(rng.integers(file.samples))
    start, size = file.payload(sample)
    payload = bytes(file.data[start : start + size])
    markers = [place for place in range(2, size - 12) if payload[place] == 0xFF and payload[place + 1] in _MARKERS]
    if not markers:
        noise(file, rng)
        return
    frames = [place for place in markers if payload[place + 1] in (0xC0, 0xC2)]
    at = start + int(rng.choice(frames if frames and rng.random() < 0.7 else markers))
    kind = rng.integers(6)
    if kind == 0:
        wide, high = (int(rng.choice([0, 1, 7, 65_535, 65_500, int(rng.integers(1, 3000))])) for _ in range(2))
        struct.pack_into(">HH", file.data, at + 5, high, wide)
        if rng.random() < 0.6:  # the record tells the same lie
            struct.pack_into("<HH", file.data, file.place(sample) + 1, wide, high)
    elif kind == 1:
        file.data[at + 4] = int(rng.choice([0, 1, 7, 12, 16, 255]))
    elif kind == 2:
        file.data[at + 9] = int(rng.choice([0, 1, 2, 4, 5, 10, 255]))
    elif kind == 3:
        file.data[at + 10 + int(rng.integers(9))] = int(rng.integers(256))
    elif kind == 4:
        struct.pack_into(">H", file.data, at + 2, int(rng.choice([0, 1, 2, 3, 65_535, int(rng.integers(65_536))])))
    else:
        file.data[at + 1] = int(rng.choice([*_MARKERS, 0xC1, 0xC3, 0xC5, 0xC9, 0xCA, 0xCB, 0xD8, 0xD9, 0xDC, 0x01]))


_MARKERS = (0xC0, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE)


def shorter(file: File, rng: np.random.Generator) -> None:
    """A payload that ends early, by the table: cut scans, headers without images, one byte."""
    sample = int(rng.integers(file.samples))
    start, size = file.payload(sample)
    for entry in range(file.entries):
        place = file.table + ENTRY * entry + 8
        if struct.unpack_from("<Q", file.data, place)[0] == start:
            file.put("<Q", place + 8, int(rng.choice([1, 2, 3, 19, size // 3, size // 2, size - 2, size - 1])))


KINDS: tuple[Callable[[File, np.random.Generator], None], ...] = (
    header, descriptors, arguments, records, table, swap, overlap, cut, bits, noise, noise, frame, frame, shorter,
)  # fmt: skip


def mutation(contents: list[bytes], seed: int, number: int) -> tuple[str, bytes]:
    """Mutation `number`: (what was done, the file). One in five is two kinds at once."""
    rng = np.random.default_rng([seed, number])
    file = File(contents[number % len(contents)])
    kinds = [KINDS[number // len(contents) % len(KINDS)]]
    if rng.random() < 0.2:
        kinds.append(KINDS[9 + int(rng.integers(len(KINDS) - 9))])
        kinds.reverse()  # payloads first, while the tables still tell where they are
    for kind in kinds:
        kind(file, rng)
    return " then ".join(kind.__name__ for kind in kinds), bytes(file.data)


def sentence(error: UserError, path: Path) -> None:
    """An error must be one line that names the file."""
    text = str(error)
    assert str(path) in text or "in a row" in text, f"an error that names no file: {text!r}"
    assert text == text.strip(), f"an error with blanks around it: {text!r}"
    assert text.isprintable(), f"an error that is no one line of print: {text!r}"


def opens(path: Path) -> Beton | None:
    """The file, if it opens; then all that its tables promise is reckoned anew."""
    try:
        beton = Beton(path)
    except UserError as error:
        sentence(error, path)
        return None
    (start,) = struct.unpack_from("<Q", path.read_bytes(), 16)
    ranges = sorted((int(p), int(p) + int(s)) for p, s in zip(beton.pointer, beton.size, strict=True))
    assert all(HEADER < first < last <= start <= path.stat().st_size for first, last in ranges)
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))
    assert all(first // beton.page_size == (last - 1) // beton.page_size for first, last in ranges)
    return beton


def batch(path: Path, engine: str) -> Any:
    """The first batch of an epoch over all samples, or None with a good sentence."""
    try:
        with PairedViews(path, 64, engine, VIEWS, drop_last=False, shuffle=False, bad_fraction=1.0, workers=1) as views:
            return next(iter(views))
    except UserError as error:
        sentence(error, path)
        return None


class Alone:
    """One sample of a file as if it were all of it, its payload before (or behind) a forbidden page."""

    def __init__(self, beton: Beton, index: int):
        self.path = beton.path
        self.height, self.width, self.size, self.mode, self.label = (
            np.array(getattr(beton, name)[index : index + 1]) for name in ("height", "width", "size", "mode", "label")
        )
        self._payload = guarded(beton.payload(index), at_start=index % 3 == 0)
        self._beton, self._index = beton, index

    def __len__(self) -> int:
        return 1

    def payload(self, index: int) -> np.ndarray:
        return self._payload

    def locate(self, indices: np.ndarray) -> Any:
        return self._beton.locate(indices + self._index)


def guarded_scratch(source: Source) -> Scratch:
    """A thread's memory, every array of it with a forbidden page behind."""
    _, _, pixels, size = largest(source.samples)
    scratch = source.scratch()._replace(decoded=np.empty(3 * pixels, np.uint8), stored=np.empty(size, np.uint8))
    return Scratch(*(guarded(part) if isinstance(part, np.ndarray) else part for part in scratch))


def guarded_pixels(samples: Any, index: int, boxes: np.ndarray | None = None) -> np.ndarray | None:
    pixels = _plain_decode(samples, index, boxes)
    return None if pixels is None else guarded(pixels, at_start=samples.width[0] % 3 == 0)


_plain_decode = torch_engine.decode


def fill_guarded(path: Path, name: str, beton: Beton) -> list[int]:
    """The samples of a file that an engine shows, each array that it reads or writes ending at a forbidden page."""
    shown = []
    with PairedViews(path, 64, name, VIEWS, drop_last=False, shuffle=False, workers=1) as views:
        for index in range(len(beton)):
            alone: Any = Alone(beton, index)
            source = replace(views._source, samples=alone)
            if name == "ffcv":
                engine: Any = views._runner._engine
                engine._samples, engine._source = alone, source
            else:
                engine = torch_engine.TorchEngine(source)
            job = make_job(np.zeros(1, np.int64), 3, source)
            pictures = [guarded(view.numpy()) for view in job.views]
            arrays = {part: guarded(value) for part, value in job.rows._asdict().items() if part != "views"}
            job.rows = Rows(np.array([picture.ctypes.data for picture in pictures], np.int64), **arrays)
            engine.fill(job, guarded_scratch(source))
            if job.rows.index[0] == 0:
                shown.append(index)
    return shown


def try_one(path: Path) -> str:
    """What became of a file: "refused", "opened"; AssertionError or anything else where a promise broke."""
    beton = opens(path)
    batches = {name: batch(path, name) for name in ENGINES}
    if beton is None:
        assert not any(batches.values()), "an engine opened what the reader refuses"
        return "refused"
    check = sample_checker(str(path))
    bad = set()
    for index in range(len(beton)):
        try:
            check(0, index)
        except UserError as error:
            bad.add(index)
            text = str(error)
            assert text, "an error without words"
            assert text.isprintable(), f"an error that is no one line of print: {text!r}"
    refusing = [name for name, found in batches.items() if found is None]
    assert refusing in ([], list(batches), ["ffcv"]), "the torch engine refuses what FFCV's reads"
    for found in batches.values():
        if found is not None:
            failed = set(found.failed)
            assert failed <= bad, f"samples {sorted(failed - bad)} do not decode and --check says nothing"
    for a, b in pairwise(found for found in batches.values() if found is not None):
        assert a.failed == b.failed, f"the engines disagree on what decodes: {a.failed} and {b.failed}"
        assert a.samples.tolist() == b.samples.tolist(), "the engines show other samples"
        assert bool((a.boxes == b.boxes).all()), "the engines cut other crops"
    torch_engine.decode = guarded_pixels
    try:
        for name, found in batches.items():
            # what the native engine does with memory is tested beside its decoder
            if found is not None and name != "native":
                expected = set(range(len(beton))) - set(found.failed)
                # damaged coefficients are shown where the views do not look at what is damaged, and these are others
                unsure = {index for index in bad if beton.mode[index] == COEFFICIENTS}
                shown = set(fill_guarded(path, name, beton))
                assert shown - unsure == expected - unsure, "alone, other samples decode"
    finally:
        torch_engine.decode = _plain_decode
    if refusing:
        return f"opened, refused by {' and '.join(refusing)}"
    return "opened, bad samples" if bad else "opened, all well"


def main() -> None:
    """See the module."""
    folder, seed, start, stop = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    contents = [path.read_bytes() for path in sorted(folder.glob("*.beton"))]
    path = folder / f"hostile-{start}"
    outcomes: Counter[str] = Counter()
    broken: list[str] = []
    for number in range(start, stop):
        what, content = mutation(contents, seed, number)
        path.write_bytes(content)
        (folder / f"progress-{start}").write_text(f"{number} ({what})")
        try:
            outcomes[try_one(path)] += 1
        except Exception as error:
            broken.append(f"mutation {number} ({what}): {type(error).__name__}: {error}")
    path.unlink()
    print(json.dumps({"outcomes": outcomes, "broken": broken}))


if __name__ == "__main__":
    main()
