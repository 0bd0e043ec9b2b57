"""Hostile .beton files: tables, fields and pointers, and JPEGs broken by their markers, read by every engine.

An epoch is read from each file by each engine, and every image by `--check`. What is asked beyond the fuzzer's own
promises: the engines agree on which images are bad, and those that decode exactly agree on every pixel.
"""

import contextlib
import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastpmae_loaders import Batch, Beton, DaliSettings, PairedViews, PlainViews, UserError, ViewSettings
from fastpmae_loaders.native.coefficients import pack_jpeg
from fastpmae_loaders.sources.jpeg import turbo_available
from fastpmae_loaders.sources.tables import CODED_VERSION
from fastpmae_loaders.write.check import sample_checker
from tests.fuzz.case import Case
from tests.loaders.files import made_pixels, write_beton
from tests.loaders.mutations import KINDS, File
from tests.made import made_image, progressive_bomb

ENGINES = ("torch", "native", "ffcv", "dali")
SETTINGS = ViewSettings(image_size=32, patch_size=8)
SIZE = (61, 47)
_PAYLOADS = 9
"""From this one on, `mutations.KINDS` change images alone."""
_BYTES = (0, 1, 2, 3, 4, 0x11, 0x22, 0x41, 63, 64, 127, 128, 255)
_LONE = frozenset((0x00, 0x01, 0xFF, *range(0xD0, 0xD8)))


def engines() -> list[str]:
    """Those that are installed."""
    there = {"torch": True, "native": True, "ffcv": turbo_available()}
    there["dali"] = bool(importlib.util.find_spec("nvidia")) and importlib.util.find_spec("nvidia.dali") is not None
    return [name for name in ENGINES if there[name]]


def coded(number: int, **options) -> bytes:
    """A sound JPEG of SIZE."""
    file = io.BytesIO()
    image: Image.Image = made_image(number, *SIZE)
    if options.pop("gray", False):
        image = image.convert("L")
    image.save(file, "JPEG", **options)
    return file.getvalue()


def sound_jpegs() -> list[bytes]:
    """JPEGs of every order of scans and subsampling that Pillow writes."""
    return [
        *(coded(1), coded(2, subsampling=0), coded(3, subsampling=1), coded(4, gray=True)),
        *(coded(5, progressive=True), coded(6, progressive=True, subsampling=0), coded(7, restart_marker_blocks=2)),
        *(coded(8, progressive=True, gray=True), coded(9, optimize=True, quality=99), coded(10, keep_rgb=True)),
        coded(11, progressive=True, restart_marker_blocks=3),
    ]


def segments(data: bytes) -> list[bytes]:
    """A sound JPEG cut before each marker: each piece is a segment, with the data behind it of a scan."""
    places = [0]
    at = 2
    while at < len(data) - 1:
        if data[at] == 0xFF and data[at + 1] not in _LONE:
            places.append(at)
            at += 2 if data[at + 1] == 0xD9 else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        else:
            at += 1
    return [data[first:last] for first, last in zip(places, [*places[1:], len(data)], strict=True)]


# each takes the pieces of a JPEG, and those of another one
Pieces = list[bytes]


def drop(pieces: Pieces, other: Pieces, rng: np.random.Generator) -> None:
    del pieces[rng.integers(1, len(pieces))]


def repeat(pieces: Pieces, other: Pieces, rng: np.random.Generator) -> None:
    """Once, or until a decoder that takes every scan would be at it for minutes."""
    at = int(rng.integers(1, len(pieces)))
    times = int(rng.choice([1, 2, 40, 700, 20_000 // (1 + len(pieces[at]) // 50)]))
    pieces[at:at] = [pieces[at]] * times


def reorder(pieces: Pieces, other: Pieces, rng: np.random.Generator) -> None:
    a, b = rng.integers(1, len(pieces), 2)
    pieces[a], pieces[b] = pieces[b], pieces[a]


def splice(pieces: Pieces, other: Pieces, rng: np.random.Generator) -> None:
    """A segment of another image, in the place of one or before it."""
    at = int(rng.integers(1, len(pieces)))
    pieces[at : at + int(rng.integers(2))] = [other[rng.integers(1, len(other))]]


def rewrite(pieces: Pieces, other: Pieces, rng: np.random.Generator) -> None:
    """Bytes of a segment's head: lengths, identities, sampling, tables, spectra."""
    at = int(rng.integers(1, len(pieces)))
    piece = bytearray(pieces[at])
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(1, min(len(piece), 24)))
        piece[place] = int(rng.choice(_BYTES)) if rng.random() < 0.8 else int(rng.integers(256))
    pieces[at] = bytes(piece)


def in_scan(pieces: Pieces, other: Pieces, rng: np.random.Generator) -> None:
    """Something in a scan's data that is none: a marker, noise, nothing."""
    scans = [number for number, piece in enumerate(pieces) if piece[1:2] == b"\xda" and len(piece) > 40]
    if not scans:
        return
    at = scans[rng.integers(len(scans))]
    piece = bytearray(pieces[at])
    place = int(rng.integers(16, len(piece)))
    kind = rng.integers(4)
    if kind == 0:
        piece[place : place + 2] = bytes((0xFF, int(rng.integers(256))))
    elif kind == 1:
        piece[place : place + int(rng.integers(1, 40))] = rng.bytes(int(rng.integers(1, 40)))
    elif kind == 2:
        del piece[place : place + int(rng.integers(1, 200))]
    else:
        piece[place:place] = bytes(int(rng.choice([1, 100, 100_000])))
    pieces[at] = bytes(piece)


def ends(pieces: Pieces, other: Pieces, rng: np.random.Generator) -> None:
    """The image ends after any of its segments, with its marker or without, and something may follow."""
    del pieces[rng.integers(1, len(pieces)) :]
    pieces += [[b"\xff\xd9"], [], [b"\xff\xd9", *other], [b"\xff\xd9" + rng.bytes(100)]][rng.integers(4)]


def claims(pieces: Pieces, other: Pieces, rng: np.random.Generator) -> None:
    """A frame of another size, precision or number of components."""
    for number, piece in enumerate(pieces):
        if piece[1:2] in (b"\xc0", b"\xc2"):
            frame = bytearray(piece)
            place, values = [
                (4, (1, 7, 12, 16)), (5, (0, 1, 255)), (6, (0, 1, 255)), (7, (0, 1, 255)), (8, (0, 1, 255)),
                (9, (0, 1, 2, 4, 255)), (1, (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC9, 0xCA)),
            ][rng.integers(7)]  # fmt: skip
            if place < len(frame):
                frame[place] = int(rng.choice(values))
            pieces[number] = bytes(frame)


BREAKS: tuple[Callable[[Pieces, Pieces, np.random.Generator], None], ...] = (
    drop, repeat, reorder, splice, rewrite, rewrite, in_scan, in_scan, ends, claims,
)  # fmt: skip


def frame_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) that the first frame header claims."""
    for piece in segments(data):
        if piece[1:2] in (b"\xc0", b"\xc1", b"\xc2") and len(piece) > 9:
            return int.from_bytes(piece[7:9], "big"), int.from_bytes(piece[5:7], "big")
    return None


def broken_jpegs(jpegs: list[bytes], rng: np.random.Generator) -> tuple[str, list[bytes], list[tuple[int, int]]]:
    """Some images of a file: what was done to them, their bytes, and the sizes that their records say."""
    images, sizes, names = [], [], []
    for _ in range(int(rng.integers(2, 7))):
        first, second = (segments(jpegs[number]) for number in rng.integers(len(jpegs), size=2))
        done = [BREAKS[rng.integers(len(BREAKS))] for _ in range(int(rng.integers(1, 3)))]
        for change in done:
            if len(first) > 1:
                change(first, second, rng)
        data = b"".join(first) or b"\0"
        # most records believe the header
        claimed = frame_size(data) if rng.random() < 0.8 else None
        fits = claimed is not None and 0 < claimed[0] * claimed[1] <= 50_000_000
        images.append(data)
        sizes.append(claimed if fits and claimed is not None else SIZE)
        names.append("+".join(change.__name__ for change in done))
    return ", ".join(names), images, sizes


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """DALI's parsers print what they find, in colours: their own words, which no file writes."""
    before = os.dup(2)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def epoch_of(path: Path, engine: str) -> tuple[list[Batch], list[int]] | UserError:
    """An epoch's batches and the images that did not decode, or the sentence in their place."""
    quiet = contextlib.nullcontext() if engine != "dali" else silence()
    try:
        with quiet, PairedViews(
            path, 3, engine, SETTINGS, shuffle=False, drop_last=False, bad_fraction=1.0, workers=2,
            dali=DaliSettings(part=2) if engine == "dali" else None,
        ) as views:  # fmt: skip
            return list(views), sorted(set(views.failed))
    except UserError as error:
        return error


def read(path: Path) -> None:
    """Everything that reads such a file, held against each other. UserError where it is refused."""
    beton = Beton(path)
    check = sample_checker(str(path))
    for index in range(len(beton)):
        try:
            check(0, index)
        except UserError as error:
            text = str(error)
            if not text.isprintable():
                raise AssertionError(f"an error that is no line of print: {text!r}") from error
    found = {engine: epoch_of(path, engine) for engine in engines()}
    refused = {engine: outcome for engine, outcome in found.items() if isinstance(outcome, UserError)}
    if refused:
        # FFCV's own reader may not take a field that is not ours
        assert set(refused) in (set(found), {"ffcv"}), f"refused by {list(refused)} alone: {refused}"
        raise next(iter(refused.values()))
    outcomes = {engine: outcome for engine, outcome in found.items() if not isinstance(outcome, UserError)}
    batches, failed = outcomes["torch"]
    for engine, (others, other_failed) in outcomes.items():
        if engine == "dali" and beton.version == CODED_VERSION:
            # it looks at the whole of coefficients, where the others look at what the views show
            assert set(failed) <= set(other_failed), f"dali finds {other_failed} bad, torch {failed}"
            if other_failed != failed:
                continue
        assert other_failed == failed, f"{engine} finds {other_failed} bad, torch {failed}"
        for ours, theirs in zip(others, batches, strict=True):
            assert torch.equal(ours.index, theirs.index)
            if engine != "dali":
                assert torch.equal(ours.simple, theirs.simple), f"{engine} shows other pixels than torch"
                assert torch.equal(ours.complex, theirs.complex), f"{engine} shows other pixels than torch"
    for engine in [engine for engine in outcomes if engine != "dali"]:
        with PlainViews(path, 3, image_size=32, engine=engine, workers=2) as views:
            for _ in views:
                pass


def sound_files(folder: Path, jpegs: list[bytes]) -> list[bytes]:
    """Files whose tables are broken: small JPEGs, raw images, and coefficients among them."""
    stored = [*jpegs[:6], made_pixels(1, SIZE[1], SIZE[0]), made_pixels(2, SIZE[1], SIZE[0])]
    codes = [code for data in jpegs[:4] if (code := pack_jpeg(data, SIZE[1], SIZE[0])) is not None]
    whole = write_beton(folder / "sound.beton", stored, [SIZE] * len(stored), 1 << 15)
    coded = write_beton(folder / "coded.beton", [*codes, *stored[3:7]], [SIZE] * (len(codes) + 4), 1 << 15)
    for file in (whole, coded):
        read(file)  # numba's compiler is no part of the first case
    one = write_beton(folder / "one.beton", [jpegs[0]], [SIZE], 1 << 14)
    return [whole.read_bytes(), one.read_bytes(), coded.read_bytes()]


def cases(rng: np.random.Generator, folder: Path) -> Iterator[Case]:
    """Tables in one case of two, JPEGs in the other, now and then a bomb of scans."""
    jpegs = sound_jpegs()
    sound = sound_files(folder, jpegs)
    path = folder / "hostile.beton"
    while True:
        kind = rng.random()
        if kind < 0.5:
            file = File(sound[rng.integers(len(sound))])
            done = [KINDS[rng.integers(len(KINDS))]]
            if rng.random() < 0.4:
                done.insert(0, KINDS[rng.integers(_PAYLOADS, len(KINDS))])  # while the tables tell where they are
            for change in done:
                change(file, rng)
            name = "tables: " + " then ".join(change.__name__ for change in done)
            path.write_bytes(bytes(file.data))
        elif kind < 0.97:
            name, images, sizes = broken_jpegs(jpegs, rng)
            name = f"JPEGs: {name}"
            write_beton(path, images, sizes, 1 << 23)
        else:
            side, scans = int(rng.integers(16, 2000)), int(rng.integers(400, 3000))
            name = f"a bomb of {scans} scans of {side} x {side}"
            write_beton(path, [progressive_bomb(side, scans), jpegs[0]], [(side, side), SIZE], 1 << 23)
        yield Case(name, lambda: read(path), (path,))
