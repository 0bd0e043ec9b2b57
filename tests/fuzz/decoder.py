"""Broken JPEGs and codes of coefficients, given to our decoder's compiled code with each index checked.

The worker's environment has numba check indices, and all that is read or written by address lies between forbidden
pages. What is decoded must be what Pillow makes of it, and its code of coefficients must give the same picture; what
a broken code gives must be what Pillow makes of the JPEG that the code is turned into.
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.native.coefficients import MAGIC, pack_jpeg, unpack, unpack_pixels
from fastpmae_loaders.native.decoder import Workspace, decode, make_workspace, planes_size
from fastpmae_loaders.native.jpeg_writer import to_jpeg
from fastpmae_loaders.sources.pictures import decode_jpeg as by_pillow
from tests.fuzz.beton import BREAKS, segments
from tests.fuzz.case import Case
from tests.fuzz.small_jpegs import size_of, small_codes, small_jpegs
from tests.loaders.guards import guarded

_HEAD = 300
"""Bytes of a code that hold more than blocks: header, tables, index."""
_BY_ADDRESS = ("data", "coefficients", "ends", "quantisation", "planes", "spare", "blocks", "parts", "places")


def in_guards(height: int, width: int, stored: int) -> Workspace:
    """A workspace for this very picture whose arrays end where memory does."""
    work = make_workspace(height, width, stored, int(planes_size(height, width)))
    return work._replace(**{name: guarded(getattr(work, name)) for name in _BY_ADDRESS})


def shown(payload: bytes, height: int, width: int, boxes: np.ndarray, at_start: bool) -> np.ndarray | None:
    """The picture of a JPEG or a code, decoded between forbidden pages."""
    data = guarded(np.frombuffer(payload, np.uint8).copy(), at_start=at_start)
    pixels = guarded(np.zeros((height, width, 3), np.uint8), at_start=at_start)
    work = in_guards(height, width, len(payload))
    function = unpack if payload.startswith(MAGIC) else decode
    return pixels if function(data, height, width, boxes, pixels.ctypes.data, work) else None


def look_at(payload: bytes, box: np.ndarray, at_start: bool) -> None:
    """Decode a payload, whole and a part of it, and hold the pictures against what else makes them.

    UserError where it is not decoded here.
    """
    height, width = size_of(payload)
    whole = np.array([[0, 0, height, width]], np.int32)
    pixels = shown(payload, height, width, whole, at_start)
    top, left = int(box[0] * height), int(box[1] * width)
    tall, wide = 1 + int(box[2] * (height - top)), 1 + int(box[3] * (width - left))
    tall, wide = min(tall, height - top), min(wide, width - left)
    part = shown(payload, height, width, np.array([[top, left, tall, wide]], np.int32), not at_start)
    if pixels is None:
        # what is wrong may lie where nothing is wanted of it: the part may be there
        raise UserError("left to Pillow")
    assert part is not None, "a part of what is decoded is not"
    here = np.s_[top : top + tall, left : left + wide]
    assert np.array_equal(part[here], pixels[here]), "a part is another picture"
    jpeg = to_jpeg(payload, height, width) if payload.startswith(MAGIC) else payload
    if jpeg is not None:
        assert np.array_equal(pixels, by_pillow(jpeg, height, width)), "other pixels than Pillow's"
        code = pack_jpeg(jpeg, height, width)
        assert code is not None or jpeg is payload, "a JPEG of ours has no code"
        if code is not None:
            unpacked = unpack_pixels(code, height, width)
            assert unpacked is not None, "the code of what is decoded is not"
            assert np.array_equal(unpacked, pixels), "other pixels in the code"


def change_bytes(data: bytes, rng: np.random.Generator, reach: int) -> bytes:
    """A few bytes are others, are gone, come twice, or the end is missing; in the first `reach` of them."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(4, max(5, min(len(changed), reach))))
        kind, size = rng.integers(8), int(rng.integers(1, 20))
        if kind < 3:
            changed[place : place + 1] = rng.bytes(1)
        elif kind < 5:
            changed[place : place + 1] = bytes([changed[min(place, len(changed) - 1)] ^ (1 << int(rng.integers(8)))])
        elif kind == 5:
            del changed[place : place + size]
        elif kind == 6:
            changed[place:place] = changed[place : place + size]
        elif rng.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def cases(rng: np.random.Generator, folder: Path) -> Iterator[Case]:
    """JPEGs broken by their segments and by their bytes, and codes by theirs, without end."""
    jpegs, codes = small_jpegs(), small_codes()
    for payload in jpegs[:8] + codes[:8]:
        with suppress(UserError):
            look_at(payload, np.array([0, 0, 1, 1]), at_start=False)  # numba's compiler is no part of the first case
    path = folder / "payload"
    while True:
        if rng.random() < 0.5:
            name, payload = "code", codes[rng.integers(len(codes))]
            if rng.random() < 0.2:
                other = codes[rng.integers(len(codes))]
                name, payload = "spliced code", payload[: int(rng.integers(4, len(payload)))] + other[_HEAD // 3 :]
            payload = change_bytes(payload, rng, _HEAD if rng.random() < 0.5 else len(payload))
        else:
            payload, name = jpegs[rng.integers(len(jpegs))], "JPEG"
            if rng.random() < 0.5:
                first, second = segments(payload), segments(jpegs[rng.integers(len(jpegs))])
                change = BREAKS[rng.integers(len(BREAKS))]
                change(first, second, rng)
                payload, name = b"".join(first), f"JPEG: {change.__name__}"
            if name == "JPEG" or rng.random() < 0.3:
                payload = change_bytes(payload, rng, len(payload))
        path.write_bytes(payload)
        box, at_start = rng.random(4), bool(rng.integers(2))
        yield Case(name, partial(look_at, payload, box, at_start), (path,))
