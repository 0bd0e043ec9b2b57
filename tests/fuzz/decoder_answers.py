"""What our decoder makes of a payload, by its parts that Python can run too: headers, Huffman codes, coefficients.

As a program it answers by compiled code: payloads come on standard input, each behind its length (32 bits), and for
each a digest goes out on standard output.
"""

import hashlib
import struct
import sys
from collections.abc import Callable

import numpy as np

from fastpmae_loaders.native import coefficients, jpeg_writer
from fastpmae_loaders.native.decoder import decode_jpeg, make_workspace
from tests.fuzz.small_jpegs import LARGEST, size_of

LONGEST = 8192
"""Bytes of a payload."""
DIGEST = 16


class Answers:
    """Codes of JPEGs and scans of codes, all in the same memory, as an engine's thread works in its own.

    `wrap` is put around every array that is read or written.
    """

    def __init__(self, wrap: Callable[[np.ndarray], np.ndarray] = lambda array: array) -> None:
        work = make_workspace(LARGEST, LARGEST, LONGEST)
        tables, codes = (type(part)(*map(wrap, part)) for part in (work.tables, work.codes))
        plain = {name: wrap(part) for name, part in work._asdict().items() if isinstance(part, np.ndarray)}
        self.work = work._replace(**plain, tables=tables, codes=codes)
        self._wrap = wrap
        self._out = wrap(np.zeros(coefficients._room(LARGEST, LARGEST) * 2, np.uint8))
        self._line = wrap(np.zeros(128, np.uint8))
        self._symbols = wrap(jpeg_writer._codes())

    def answer(self, payload: bytes, seen: Callable[[np.ndarray], None] = lambda array: None) -> bytes:
        """What it becomes, nothing for what is not taken; `seen` is told the array of the payload before."""
        height, width = size_of(payload)
        data = self._wrap(np.array(np.frombuffer(payload, np.uint8)))
        box = self._wrap(np.array([[0, 0, height, width]], np.int32))
        seen(data)
        if payload.startswith(coefficients.MAGIC):
            size = jpeg_writer.write_scan(data, height, width, box, self._out, self._symbols, self.work)
        else:
            size = coefficients.pack(data, height, width, box, self._out, self._line, self.work)
            # what the digest's place holds is left from before
            self._out[len(coefficients.MAGIC) : len(coefficients.MAGIC) + coefficients.DIGEST] = 0
        return self._out[: max(int(size), 0)].tobytes()


def check_pixels(payload: bytes) -> None:
    """By compiled code: a JPEG's own pixels are Pillow's, and those of its code."""
    from fastpmae_loaders.sources.pictures import decode_jpeg as by_pillow

    height, width = size_of(payload)
    if payload.startswith(coefficients.MAGIC):
        coefficients.unpack_pixels(payload, height, width)
        return
    pixels, code = decode_jpeg(payload, height, width), coefficients.pack_jpeg(payload, height, width)
    if pixels is not None:
        assert np.array_equal(pixels, by_pillow(payload, height, width)), "other pixels than Pillow's"
    if code is not None:
        assert pixels is not None, "a code of what is not decoded"
        unpacked = coefficients.unpack_pixels(code, height, width)
        assert unpacked is not None, "the code of what is decoded is not"
        assert np.array_equal(unpacked, pixels), "other pixels in the code"


def digest(answer: bytes) -> bytes:
    """Of an answer, DIGEST bytes."""
    return hashlib.blake2b(answer, digest_size=DIGEST).digest()


def main() -> None:
    """See the module."""
    answers = Answers()
    while head := sys.stdin.buffer.read(4):
        payload = sys.stdin.buffer.read(*struct.unpack("<I", head))
        check_pixels(payload)
        sys.stdout.buffer.write(digest(answers.answer(payload)))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
