"""Our own JPEG decoder against libjpeg-turbo on one thread: CPU-milliseconds an image, and where they go.

`python -m benchmarks.bench_decoder [--data DIR_OR_BETON] [--quick] [--json F] [--plot F]`. Every case decodes the same
images in turn, in one process and alternating with the others, after its pixels were checked: ours against Pillow's, to
the bit. "views" decode what two crops of a sample show, as the loader draws them; the parts of a JPEG's decoding are
timed by themselves, for as many blocks and pixels as the images have. libjpeg-turbo's fast DCT is not what Pillow
decodes with: what exactness costs is the accurate one beside it.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np

from benchmarks.bench_loader import prepare
from benchmarks.common import Row, arguments, finish, make_row, processor_name
from fastpmae_loaders import Beton, ViewSettings, draw_samples
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.native import colours, idct
from fastpmae_loaders.native.coefficients import pack_jpeg, unpack
from fastpmae_loaders.native.decoder import Workspace, decode, make_workspace
from fastpmae_loaders.sources.jpeg import TURBO_DECOMPRESS, TURBO_RGB, TurboDecoders, jpeg_header, turbo_available
from fastpmae_loaders.sources.pictures import decode_jpeg

FAST, ACCURATE = 2048, 4096
"""TurboJPEG's flags for the two DCTs."""
LARGEST = 3_000_000
"""Pixels: a few pictures of twenty megapixels would say nothing about a data set."""


@dataclass(frozen=True)
class Image:
    """A JPEG, its coefficients in our code, its views' boxes int32 [2, 4], and room for its pixels."""

    jpeg: np.ndarray
    code: np.ndarray
    height: int
    width: int
    views: np.ndarray
    pixels: np.ndarray
    blocks: int

    @property
    def whole(self) -> np.ndarray:
        return np.array([[0, 0, self.height, self.width]], np.int32)

    @property
    def corner(self) -> np.ndarray:
        """The last pixel alone: all codes are read for it, and next to nothing else is done."""
        return np.array([[self.height - 1, self.width - 1, 1, 1]], np.int32)


@numba.njit(nogil=True)
def _transform_only(pairs, coefficients, quantisation, out):
    for pair in range(pairs):
        idct.two_blocks(coefficients + 256 * (pair & 15), quantisation, out + 16 * (pair & 15), 512)


@numba.njit(nogil=True)
def _colours_only(pixels, wide_chroma, planes, out):
    for start in range(0, pixels, colours.PIXELS):
        at = start & 255
        if wide_chroma:
            colours.store_pixels(out, planes + at, colours.chroma(planes + at + 512, planes + at + 1024))
        else:
            near, far = planes + at // 2 + 512, planes + at // 2 + 1024
            colours.store_pixels(out, planes + at, colours.chroma_both_ways(near, far, near + 1024, far + 1024))


def images_of(beton: Beton) -> list[Image]:
    """Those JPEGs of a file that our decoder takes, their pixels checked. RuntimeError where they are not Pillow's."""
    found = []
    settings = ViewSettings()
    for index in range(len(beton)):
        height, width = int(beton.height[index]), int(beton.width[index])
        payload = beton.payload(index).tobytes()
        code = pack_jpeg(payload, height, width) if height * width <= LARGEST else None
        if code is None:
            continue
        draws = draw_samples(
            0, 0, np.array([index]), np.array([height]), np.array([width]), settings.views, settings.patches
        )
        boxes = np.ascontiguousarray(draws.boxes[0], np.int32)
        header = jpeg_header(payload)
        blocks = -(-height // 8) * -(-width // 8) * (3 if len(header.component_ids) == 3 else 1)
        jpeg, packed = np.frombuffer(payload, np.uint8).copy(), np.frombuffer(code, np.uint8).copy()
        image = Image(jpeg, packed, height, width, boxes, np.empty((height, width, 3), np.uint8), blocks)
        work, expected = make_workspace(height, width, len(jpeg)), decode_jpeg(payload, height, width)
        for decoder, data in ((decode, jpeg), (unpack, packed)):
            image.pixels[:] = 0
            done = decoder(data, height, width, image.whole, image.pixels.ctypes.data, work)
            if not done or not np.array_equal(image.pixels, expected):
                raise RuntimeError(f"image {index} does not come out as Pillow decodes it")
        found.append(image)
    return found


def cases_of(work: Workspace) -> dict[str, Callable[[Image], object]]:
    """What is timed, by name: each does one image."""
    numbers = np.random.default_rng(0).integers(-20, 20, 16 * 128).astype(np.int16)
    ones, room = np.ones(128, np.uint16), np.zeros(1 << 14, np.uint8)
    cases: dict[str, Callable[[Image], object]] = {
        "ours": lambda i: decode(i.jpeg, i.height, i.width, i.whole, i.pixels.ctypes.data, work),
        "ours-views": lambda i: decode(i.jpeg, i.height, i.width, i.views, i.pixels.ctypes.data, work),
        "ours-coefficients": lambda i: unpack(i.code, i.height, i.width, i.whole, i.pixels.ctypes.data, work),
        "ours-coefficients-views": lambda i: unpack(i.code, i.height, i.width, i.views, i.pixels.ctypes.data, work),
        "part: entropy decoding": lambda i: decode(i.jpeg, i.height, i.width, i.corner, i.pixels.ctypes.data, work),
        "part: inverse DCT": lambda i: _transform_only(
            i.blocks // 2, numbers.ctypes.data, ones.ctypes.data, room.ctypes.data
        ),
        "part: colours": lambda i: _colours_only(i.height * i.width, True, room.ctypes.data, room.ctypes.data + 8192),
        "part: upsampling and colours": lambda i: _colours_only(
            i.height * i.width, False, room.ctypes.data, room.ctypes.data + 8192
        ),
    }
    if turbo_available():
        decoders = TurboDecoders()
        function = TURBO_DECOMPRESS(decoders.function)

        def by_turbo(flags: int) -> Callable[[Image], object]:
            def run(i: Image) -> object:
                with decoders.lend() as handle:
                    where = (handle, i.jpeg.ctypes.data, i.jpeg.size, i.pixels.ctypes.data, i.width, 0, i.height)
                    return function(*where, TURBO_RGB, flags)

            return run

        cases |= {"libjpeg-turbo-fast": by_turbo(FAST), "libjpeg-turbo-accurate": by_turbo(ACCURATE)}
    return cases


def rows_of(images: Sequence[Image], rounds: int) -> list[Row]:
    """CPU-milliseconds an image of every case, and the bytes of both forms."""
    largest = max(images, key=lambda image: image.height * image.width)
    sides = max(image.height for image in images), max(image.width for image in images)
    work = make_workspace(*sides, max(image.jpeg.size for image in images))
    cases = cases_of(work)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case(largest)
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.process_time()
            for image in images:
                case(image)
            times[name].append((time.process_time() - start) * 1e3 / len(images))
    device = f"{processor_name()}, one thread"
    rows = []
    for name, samples in times.items():
        against = [other for other in ("libjpeg-turbo-fast", "libjpeg-turbo-accurate") if other in times]
        for other in (against if name.startswith("ours") else []) or [None]:
            baseline = None if other is None else (other, times[other])
            rows.append(make_row(name, "cpu_ms_per_image", "ms", samples, device, True, baseline))
    stored = statistics.fmean(image.jpeg.size / 1e3 for image in images)
    coded = statistics.fmean(image.code.size / 1e3 for image in images)
    rows.append(make_row("jpeg", "bytes", "KB", [stored], device, True))
    rows.append(make_row("ours-coefficients", "bytes", "KB", [coded], device, True, ("jpeg", [stored])))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("bench_decoder", (__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, help="a folder of images or a .beton of JPEGs")
    given = parser.parse_args(argv)
    count, rounds = (40, 3) if given.quick else (400, 7)
    with tempfile.TemporaryDirectory() as folder:
        try:
            prepared = prepare(given.data, Path(folder), count)
        except UserError as error:
            print(f"bench_decoder: error: {error}", file=sys.stderr)
            return 2
        images = images_of(Beton(prepared.beton))[:count]
        if not images:
            print(f"bench_decoder: error: {prepared.words}: none is an ordinary JPEG", file=sys.stderr)
            return 2
        rows = rows_of(images, rounds)
    return finish(rows, f"Decoding: {prepared.words}", given.json, given.plot)


if __name__ == "__main__":
    sys.exit(main())
