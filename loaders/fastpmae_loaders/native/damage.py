"""What is wrong with a code of coefficients, in words: for who asks after the decoder has refused it, or to be sure."""

import numpy as np

from fastpmae_loaders.native.coefficients import FIXED, GROUP, LARGEST_BLOCK, MAGIC, MEANINGS, RAW, is_whole
from fastpmae_loaders.native.decoder import NARROWEST
from fastpmae_loaders.native.headers import BLOCK

OTHER_DIGEST = "its coefficients are not those that were written: the digest says otherwise"
IMPOSSIBLE = "its coefficients are none that a JPEG may have"
_HEADER = FIXED - 8


def damage_of(payload: bytes, height: int, width: int) -> str | None:
    """The first thing that is wrong with the code of a picture of height x width pixels; None where all is well."""
    version = len(MAGIC) - 1
    if payload[:version] != MAGIC[:version] or len(payload) < FIXED:
        return "its coefficients do not begin as such do"
    if payload[version] != MAGIC[version]:
        return (
            f"its coefficients are of version {payload[version]}, and {MAGIC[version]} is read here: write the file "
            "anew, or use the version of fastpmae that wrote it"
        )
    high, wide = (int.from_bytes(payload[at : at + 2], "little") for at in (_HEADER, _HEADER + 2))
    if (high, wide) != (height, width):
        return f"its coefficients are of {wide}x{high} pixels, its metadata say {width}x{height}"
    components, across, down = payload[_HEADER + 4 : _HEADER + 7]
    most = 2 if components == 3 else 1
    if components not in (1, 3) or not (1 <= across <= most and 1 <= down <= most) or width < NARROWEST * (across - 1):
        return f"its coefficients are of a sampling that there is not ({components} components, {across} x {down})"
    return _rows_damage(payload, components, across, down, height, width) or (
        None if is_whole(payload) else OTHER_DIGEST
    )


def _rows_damage(payload: bytes, components: int, across: int, down: int, height: int, width: int) -> str | None:
    mcus, rows = -(-width // (8 * across)), -(-height // (8 * down))
    lines = down * [mcus * across] + (components - 1) * [mcus]
    start = FIXED + components * BLOCK
    first = start + 4 * (len(lines) * rows + 1)
    if first > len(payload):
        return f"the index of its rows of blocks would end at byte {first}, and there are {len(payload)}"
    index = np.frombuffer(payload[start:first], "<u4").astype(np.int64) + first
    for number, (at, stop) in enumerate(zip(index[:-1].tolist(), index[1:].tolist(), strict=True)):
        if not at <= stop <= len(payload):
            return (
                f"the index of its rows of blocks is damaged: row {number} would be bytes {at} to {stop} of "
                f"{len(payload)}"
            )
        if not _sound_row(payload[at:stop], lines[number % len(lines)]):
            return f"row {number} of its blocks is damaged"
    return None


def _sound_row(row: bytes, blocks: int) -> bool:
    at = 0
    for _ in range(blocks):
        if at + 3 > len(row):
            return False
        groups, exceptions = row[at] & 31, row[at] >> 5
        codes = at + 3 + GROUP * groups
        size = LARGEST_BLOCK if groups == RAW else 3 + GROUP * groups + 3 * exceptions
        if at + size > len(row):
            return False
        if groups != RAW:
            advances = MEANINGS[np.frombuffer(row[at + 3 : codes], np.uint8)] & 255
            if advances.sum() >= BLOCK or any(place >= BLOCK for place in row[codes : at + size : 3]):
                return False
        at += size
    return True
