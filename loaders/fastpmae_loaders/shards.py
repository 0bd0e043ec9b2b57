"""Tar shards in WebDataset's layout: files that share a name up to its first dot are one sample.

The archive is read by hand: Python's tarfile loops for ever on a negative size (before 3.11.14) and allocates
whatever a header asks for. Headers are read, and the small files that hold labels; images are not.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import UserError
from .listing import IMAGE_SUFFIXES, Item, Listing, labels_from

_TEXT_LIMIT = 1 << 20  # a label or a long name is a few bytes; more of it is not read
_BLOCK = 512
_FILES, _FOLDER, _SPARSE = b"0\x007", b"5", b"S"
_NO_CONTENT = b"123456"  # links, devices, folders, pipes: whatever their size field says


class Member(NamedTuple):
    """A regular file of an archive, or (kind "other") something else; folders are not reported."""

    kind: str
    name: str
    offset: int
    size: int


class _Damage(Exception):
    """Why an archive cannot be read on, as the end of a sentence about it."""


def list_shards(paths: list[str]) -> Listing:
    """The images of tar files, with labels from their samples' .cls or .json members.

    Only headers and labels are read. A damaged shard costs its images after the damage, as one bad item.
    """
    items: list[Item] = []
    labels: list[int | str | None] = []
    bad: list[Item] = []
    listing = Listing(items)
    for path in paths:
        samples, others, damage = _list_shard(path)
        listing.passed_over += others
        for sample in samples:
            offset, size, name = sample["image"]
            items.append(Item("tar", path, (offset, size, name), 0))
            labels.append(sample.get("label"))
        if damage:
            bad.append(Item("bad", path, (damage,), -1))
    numbers, listing.class_names, listing.notes = labels_from(labels)
    items[:] = [item._replace(label=label) for item, label in zip(items, numbers, strict=True)]
    items += bad
    return listing


def _list_shard(path: str) -> tuple[list[dict], int, str | None]:
    samples: list[dict] = []
    others = 0
    sample: dict = {}
    try:
        file = os.open(path, os.O_RDONLY)
    except (OSError, ValueError) as error:
        return samples, others, f"cannot be read: {getattr(error, 'strerror', None) or error}"
    try:
        for member in _members(file, os.fstat(file).st_size):
            if member.kind == "other":
                others += 1
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if stem == "" or name.startswith("__"):
                others += 1
                continue
            if sample.get("key") != (folder, stem):
                sample = {"key": (folder, stem)}
            suffix = "." + extension.lower().rpartition(".")[2]
            if suffix in IMAGE_SUFFIXES and "image" not in sample:
                sample["image"] = (member.offset, member.size, member.name)
                samples.append(sample)
            elif extension.lower() in ("cls", "json") and member.size <= _TEXT_LIMIT:
                _add_label(sample, extension.lower(), os.pread(file, member.size, member.offset))
            else:
                others += 1
    except _Damage as damage:
        return samples, others, str(damage)
    except OSError as error:
        return samples, others, f"cannot be read: {error.strerror or error}"
    finally:
        os.close(file)
    return samples, others, None


def _members(file: int, length: int) -> Iterator[Member]:
    """Walks an archive of `length` bytes: ustar, GNU's long names, POSIX's pax headers."""
    if not length:
        raise _Damage("the file is empty")
    at = 0
    name, size, sparse = None, None, False  # what headers before the file's own said of it
    while True:
        block = os.pread(file, _BLOCK, at)
        if len(block) < _BLOCK:
            raise _Damage("the shard ends without the zeros that close a tar file: it is truncated")
        if not block.strip(b"\0"):
            return
        if not _checksum_fits(block):
            if at == 0:
                raise _Damage("not a tar file")
            raise _Damage(f"the shard is damaged at byte {at}: what follows there was not read")
        kind, own_size = block[156:157], _number(block[124:136], at)
        start = at + _BLOCK
        if kind in (b"L", b"K", b"x", b"X", b"g"):
            text = _text(file, start, own_size, length, at)
            if kind == b"L":
                name = text.split(b"\0")[0]
            elif kind in (b"x", b"X"):
                records = dict(_pax_records(text, at))
                name = records.get(b"path", name)
                if b"size" in records:
                    size = _decimal(records[b"size"], at)
                sparse = any(key.startswith(b"GNU.sparse.") for key in records)
            at = start + _whole_blocks(own_size)
            continue
        this = _own_name(block) if name is None else name
        stored = own_size if size is None else size
        shown = this.decode("utf-8", "surrogateescape")
        regular = kind in _FILES and not (kind == b"\0" and this.endswith(b"/"))
        if kind == _SPARSE:
            start = _after_sparse_map(file, block, start)
        elif kind in _NO_CONTENT:
            stored = 0
        if start + stored > length:
            raise _Damage(f"the shard is truncated within {shown}")
        if regular and not sparse:
            yield Member("file", shown, start, stored)
        elif kind != _FOLDER and not this.endswith(b"/"):
            yield Member("other", shown, start, stored)
        at = start + _whole_blocks(stored)
        name, size, sparse = None, None, False


def _checksum_fits(block: bytes) -> bool:
    try:
        said = int(block[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return False
    plain = sum(block) - sum(block[148:156]) + 8 * 32
    # some old archivers summed signed characters
    return said in (plain, plain - 256 * sum(byte > 127 for byte in block[:148] + block[156:]))


def _number(field: bytes, at: int) -> int:
    """An octal number, or GNU's binary one, which may not be negative."""
    try:
        if field[0] in (0x80, 0xFF):
            value = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
        else:
            value = int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        value = -1
    if value < 0:
        raise _Damage(f"the shard is damaged at byte {at}: the size there is no number")
    return value


def _decimal(text: bytes, at: int) -> int:
    if not text.isdigit() or len(text) > 20:
        raise _Damage(f"the shard is damaged at byte {at}: the size there is no number")
    return int(text)


def _whole_blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _text(file: int, start: int, size: int, length: int, at: int) -> bytes:
    if size > _TEXT_LIMIT or start + size > length:
        raise _Damage(f"the shard is damaged at byte {at}: a name of {size:,} bytes")
    return os.pread(file, size, start)


def _pax_records(text: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
    """Records "length key=value\\n", the length being that of the whole record."""
    place = 0
    while place < len(text) and text[place] != 0:
        space = text.find(b" ", place)
        digits = text[place:space]
        length = int(digits) if space > 0 and digits.isdigit() and len(digits) < 8 else 0
        record = text[place : place + length]
        key, equals, value = record[len(digits) + 1 :].partition(b"=")
        if len(record) != length or not equals or not record.endswith(b"\n"):
            raise _Damage(f"the shard is damaged at byte {at}: its extended header makes no sense")
        yield key, value[:-1]
        place += length


def _own_name(block: bytes) -> bytes:
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _after_sparse_map(file: int, block: bytes, start: int) -> int:
    """Where the content of a sparse file begins: its map may go on in blocks of its own."""
    more = block[482]
    while more:
        block = os.pread(file, _BLOCK, start)
        if len(block) < _BLOCK:
            raise _Damage("the shard is truncated within the map of a sparse file")
        more = block[504]
        start += _BLOCK
    return start


def _add_label(sample: dict, extension: str, content: bytes) -> None:
    try:
        text = content.decode().strip()
        value = text
        if extension == "json":
            fields = json.loads(text)
            fields = fields if isinstance(fields, dict) else {}
            value = next((fields[key] for key in ("label", "cls", "class") if key in fields), None)
    except (ValueError, RecursionError):
        return
    if isinstance(value, str):
        value = value.strip()
        try:
            value = int(value)
        except ValueError:
            value = value or None
    if isinstance(value, bool) or not isinstance(value, int | str):
        return
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return
    if extension == "cls" or "label" not in sample:
        sample["label"] = value


def read_member(path: str, offset: int, size: int) -> bytes:
    """The bytes of one file within a shard."""
    with Path(path).open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise UserError("the shard is truncated")
    return data
