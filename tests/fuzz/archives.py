"""Tar archives whose headers, names, sizes, labels and order are drawn, and then broken."""

import numpy as np

from tests.fuzz.values import broken, choice, some_images

_NAMES = (
    b"001.jpg", b"001.cls", b"001.seg.png", b"001.json", b"a/002.jpg", b"./a/003.JPG", b"2023.05.01 cat.jpg",
    b"2023.05.02 cat.jpg", b"2023.05.01 cat.cls", b".hidden/1.jpg", b"@eaDir/1.jpg", b"__a__.jpg", b".jpg", b"", b"/",
    b"..", b"../../etc/passwd.jpg", b"/etc/1.jpg", b"caf\xe9.jpg", b"\x1b[31mred\x07.jpg", b"a\nb.jpg", b"x" * 100,
    b"n0144.tar", b"set.tar.gz", b"\xff\xfe.cls", b"001", b"001.", b"a//b.jpg", b"\xe2\x80\xae.jpg",
)  # fmt: skip
_LABELS = (
    b"3", b"-1", b"cat", b"", b"\xff\xfe", b"9" * 5000, b"1e400", b"9223372036854775807", b"9223372036854775808",
    b"\x1b]0;owned\x07", b'{"label": 2}', b'{"label": {"a": [1]}}', b"[" * 5000, b'{"cls": "a\\u0000b"}', b"null",
    b'{"label": NaN}', b'{"class": true}', b" 7\n", b"\xef\xbb\xbf5", b"d\xc3\xb6g", b'{"label": "\\ud800"}',
)  # fmt: skip
_KINDS = (b"0", b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"x", b"X", b"g", b"S", b"V", b"Z", b"\xff")
_SIZES = (
    b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + bytes(11), b"77777777777\0", b"00000000000 ", b"  12 \0", b"-1\0",
    b"9\0", b"", b"12zz", b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7, b"00000001000\0", b"\xf0" + b"\0" * 11,
)  # fmt: skip
_RECORDS = (
    (b"path", b"pax.jpg"), (b"path", b"\xff\x1b[1m.jpg"), (b"path", b"y" * 3000 + b".jpg"), (b"size", b"0"),
    (b"size", b"-512"), (b"size", b"99999999999999999999"), (b"size", b"many"), (b"GNU.sparse.major", b"1"),
    (b"GNU.sparse.map", b"0,1"), (b"", b""), (b"path", b""), (b"a=b", b"\n"), (b"size", b"512"),
    (b"size", "٣".encode()),
)  # fmt: skip


def archive(rng: np.random.Generator) -> tuple[bytes, str]:
    """An archive of a few members, and what is wrong with it."""
    done: list[str] = []
    parts = [_member(rng, done) for _ in range(rng.integers(1, 9))]
    if rng.random() < 0.2:
        rng.shuffle(parts)
    content = b"".join(parts) + bytes(512 * int(rng.choice([0, 1, 2, 2, 2, 5])))
    if rng.random() < 0.1:
        content += content
        done.append("twice")
    if rng.random() < 0.35:
        content, how = broken(rng, content)
        done.append(how)
    return content, ", ".join(done) or "sound"


def _member(rng: np.random.Generator, done: list[str]) -> bytes:
    name = choice(rng, _NAMES)
    before = b""
    if rng.random() < 0.2:
        before = _extended(rng, done)
    is_label = name.lower().endswith((b".cls", b".json"))
    content = choice(rng, _LABELS) if is_label else choice(rng, some_images(300))
    size, kind = b"%011o\0" % len(content), b"0"
    if rng.random() < 0.1:
        size = choice(rng, _SIZES)
        done.append(f"size {size!r}")
    if rng.random() < 0.15:
        kind = choice(rng, _KINDS)
        done.append(f"kind {kind!r}")
    return before + _header(rng, name, size, kind, done) + content + bytes(-len(content) % 512)


def _extended(rng: np.random.Generator, done: list[str]) -> bytes:
    """A header that says something of the next: a long name, or pax records."""
    kind = choice(rng, (b"L", b"x", b"g", b"K", b"X"))
    if kind in (b"L", b"K"):
        content = choice(rng, (b"long/" * 60 + b"1.jpg\0", b"", b"\0", b"a\0b.jpg\0", b"\xff" * 2000, b"z" * 5000))
    else:
        content = b""
        for _ in range(rng.integers(0, 4)):
            key, value = choice(rng, _RECORDS)
            body = b" " + key + b"=" + value + b"\n"
            length = len(body) + len(str(len(body)))
            length += len(str(length)) - len(str(len(body)))
            length += int(rng.choice([0, 0, 0, 0, 1, -1, 10**6, -length]))
            content += str(length).encode() + body
            done.append(f"pax {key!r} {value[:20]!r} {length}")
    size = b"%011o\0" % len(content) if rng.random() < 0.9 else choice(rng, _SIZES)
    return _header(rng, b"././@LongLink", size, kind, done) + content + bytes(-len(content) % 512)


def _header(rng: np.random.Generator, name: bytes, size: bytes, kind: bytes, done: list[str]) -> bytes:
    block = bytearray(512)
    block[:100], block[124:136], block[156:157] = name[:100].ljust(100, b"\0"), size[:12].ljust(12, b"\0"), kind
    block[257:263] = choice(rng, (b"ustar\0", b"ustar ", bytes(6)))
    if rng.random() < 0.05:
        block[345:500] = choice(rng, (b"pre/fix", b"\xff" * 155, b"..")).ljust(155, b"\0")
    if rng.random() < 0.05:
        block[482], block[504] = 1, 1  # a sparse file's map goes on
    for _ in range(rng.integers(0, 3) if rng.random() < 0.1 else 0):
        block[rng.integers(512)] = rng.integers(256)
        done.append("header bytes")
    if rng.random() < 0.97:  # a fitting checksum, so that the lie is believed
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)
