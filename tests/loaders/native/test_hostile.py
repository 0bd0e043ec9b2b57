"""JPEGs that were made to hurt: sizes that are not there, ends everywhere, restarts in disorder, endless segments."""

import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpmae_loaders import PairedViews, UserError, ViewSettings
from fastpmae_loaders.native.coefficients import pack_jpeg, unpack_pixels
from fastpmae_loaders.native.decoder import decode_jpeg
from fastpmae_loaders.native.jpeg_writer import to_jpeg
from fastpmae_loaders.sources.beton import PIXEL_LIMIT, Beton
from fastpmae_loaders.sources.pictures import ImageError
from fastpmae_loaders.sources.pictures import decode_jpeg as by_pillow
from tests.loaders.files import write_beton
from tests.loaders.native.jpegs import encoded, segments
from tests.loaders.native.test_decoder import check_damaged
from tests.made import REPOSITORY, made_image

SMALL = ViewSettings(image_size=32, patch_size=8)
SCAN = 0xDA


def claiming(data: bytes, width: int, height: int) -> bytes:
    """The same JPEG, said to be of another size."""
    changed, (frame,) = bytearray(data), segments(data, 0xC0)
    struct.pack_into(">HH", changed, frame + 5, height, width)
    return bytes(changed)


def before_scan(data: bytes, inserted: bytes) -> bytes:
    """A JPEG with something more before its scan's header."""
    at = data.index(b"\xff\xda")
    return data[:at] + inserted + data[at:]


def test_a_size_above_the_limit_is_refused_by_the_metadata(tmp_path: Path) -> None:
    data = claiming(encoded(made_image(1, 16, 16), 0, 80), 65500, 65500)
    assert len(data) < 1500
    file = write_beton(tmp_path / "bomb.beton", [data], [(65500, 65500)])
    with pytest.raises(UserError, match=r"65500x65500 pixels, above the limit of 178,956,970"):
        Beton(file)
    assert decode_jpeg(data, 16, 16) is None


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from fastpmae_loaders.native.coefficients import unpack_pixels
from fastpmae_loaders.native.decoder import decode_jpeg

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

kind, side = sys.argv[1], int(sys.argv[3])
function = decode_jpeg if kind == "jpeg" else unpack_pixels
data = Path(sys.argv[2]).read_bytes()
assert function(data, 16, 16) is None  # what is compiled is there
before = peak()
assert function(data, side, side) is None
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jpeg", "code"])
def test_a_size_that_is_not_there_takes_no_memory(kind: str, tmp_path: Path) -> None:
    """The largest picture that is allowed, in a kilobyte: 537 MB of pixels, of which no page is touched."""
    side = int(PIXEL_LIMIT**0.5)
    data = encoded(made_image(1, 16, 16), 2, 80)
    if kind == "jpeg":
        data = claiming(data, side, side)
    else:
        code = pack_jpeg(data, 16, 16)
        assert code is not None
        data = code[:12] + struct.pack("<HH", side, side) + code[16:]
    (tmp_path / "data").write_bytes(data)
    words = [sys.executable, "-c", MEMORY, kind, str(tmp_path / "data"), str(side)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 * 1024, "KiB"


@pytest.mark.parametrize("subsampling", [0, 2, "gray"])
@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 1}])
def test_an_end_at_every_byte(subsampling: int | str, options: dict) -> None:
    """With and without an end marker: what is decoded is what Pillow shows, and what Pillow refuses is not decoded."""
    data = encoded(made_image(5, 24, 17), subsampling, 60, **options)
    taken = 0
    for end in range(2, len(data)):
        for part in (data[:end], data[:end] + b"\xff\xd9"):
            taken += check_damaged(part, 24, 17, at_start=bool(end & 1))
    # all but the end marker, and the marker
    assert taken == 1


def test_a_code_that_ends_at_any_byte_is_refused() -> None:
    for subsampling in (0, 2, "gray"):
        code = pack_jpeg(encoded(made_image(5, 24, 17), subsampling, 60), 17, 24)
        assert code is not None
        for end in range(len(code)):
            assert unpack_pixels(code[:end], 17, 24) is None
        assert to_jpeg(code[: len(code) - 1], 17, 24) is None


def in_disorder(data: bytes) -> list[bytes]:
    """A JPEG's restart markers: two exchanged, one gone, one twice, one of another number, all of them the first."""
    scan = data.index(b"\xff\xda")
    places = [at for at in range(scan, len(data) - 1) if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7]
    assert len(places) > 4
    exchanged, other, first = (bytearray(data) for _ in range(3))
    exchanged[places[0] + 1], exchanged[places[1] + 1] = 0xD1, 0xD0
    other[places[2] + 1] = 0xD6
    for at in places:
        first[at + 1] = 0xD0
    gone, twice = data[: places[2]] + data[places[2] + 2 :], data[: places[2]] + data[places[2] : places[2] + 2]
    return [bytes(exchanged), bytes(other), bytes(first), gone, twice + data[places[2] :]]


def test_restarts_in_disorder_are_left_to_pillow(tmp_path: Path) -> None:
    """libjpeg finds its way again, in its own way: each engine shows what Pillow makes of it."""
    width, height = 61, 47
    broken = [
        jpeg
        for subsampling in (0, 2)
        for jpeg in in_disorder(encoded(made_image(6, width, height), subsampling, 80, restart_marker_blocks=2))
    ]
    for jpeg in broken:
        assert decode_jpeg(jpeg, height, width) is None
    file = write_beton(tmp_path / "restarts.beton", broken, len(broken) * [(width, height)])
    shown = []
    for engine in ("native", "torch"):
        with PairedViews(file, 10, engine, SMALL, shuffle=False, bad_fraction=1.0, workers=1) as views:
            shown.append((next(iter(views)), sorted(set(views.failed))))
    assert shown[0][1] == shown[1][1]
    assert torch.equal(shown[0][0].simple, shown[1][0].simple)


@pytest.mark.parametrize(
    "segment",
    [
        b"\xff\xfe\0\2",
        b"\xff\xe1\0\2",
        b"\xff\xdd\0\4\0\0",
        b"\xff\xdb\0\x43\0" + bytes(range(1, 65)),
        b"\xff\xc4\0\x14\0\1" + bytes(15) + b"\0",
    ],
    ids=["comments", "application", "restarts", "quantisation", "codes"],
)
def test_a_million_bytes_of_segments_are_passed_in_a_moment(segment: bytes) -> None:
    """Each is looked at once: seconds would be time that grows with the square."""
    data = encoded(made_image(7, 40, 33), 0, 80)
    data = before_scan(data, segment * (2_000_000 // len(segment)))
    decode_jpeg(data[:100], 33, 40)  # what is compiled is there
    began = time.process_time()
    found = decode_jpeg(data, 33, 40)
    assert time.process_time() - began < 2
    assert found is None or np.array_equal(found, by_pillow(data, 33, 40))


def test_a_million_restarts_behind_the_picture_are_passed_in_a_moment() -> None:
    data = encoded(made_image(7, 40, 33), 0, 80, restart_marker_blocks=1)
    many = data[:-2] + b"".join(bytes((0xFF, 0xD0 + number % 8)) for number in range(1_000_000)) + data[-2:]
    decode_jpeg(data, 33, 40)
    began = time.process_time()
    found = decode_jpeg(many, 33, 40)
    assert time.process_time() - began < 5
    try:
        expected = by_pillow(many, 33, 40)
    except ImageError:
        assert found is None
    else:
        assert found is None or np.array_equal(found, expected)
