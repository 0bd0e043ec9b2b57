"""Tar shards in WebDataset's layout: neighbours that share a name up to its first dot are one sample.

What follows that dot is the field, so that `2023.05.01 cat.jpg` is the field `05.01 cat.jpg` of the sample `2023`.
Archives of ordinary folders are read by the same rule: a sample may hold any number of images, and each is taken.

The archive is read by hand: Python's tarfile loops for ever on a negative size (before 3.11.14) and allocates
whatever a header asks for. Headers are read, and the small files that hold labels; images are not.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.sources.listing import (
    ARCHIVE_SUFFIXES,
    IMAGE_SUFFIXES,
    Item,
    Listing,
    helper_notes,
    is_helper,
    labels_from,
)

_TEXT_LIMIT = 1 << 20  # a label or a long name is a few bytes; more of it is not read
_FIELDS_SHOWN = 16
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


class _Sample:
    """Neighbouring files of one folder whose names agree up to their first dot."""

    def __init__(self, key: tuple[str, str]) -> None:
        self.key = key
        self.images: list[tuple[int, int, str, str]] = []  # offset, size, name, field
        self._labels: dict[tuple[str, str], int | str] = {}

    def add_label(self, field: str, content: bytes) -> None:
        prefix, _, kind = field.rpartition(".")
        value = _label(kind.lower(), content)
        if value is not None:
            self._labels[prefix, kind.lower()] = value

    def label(self, field: str) -> int | str | None:
        """That of the image's whole name, where there is one (`05.01 cat.cls`), else that of the sample."""
        prefix = field.rpartition(".")[0]
        keys = ((prefix, "cls"), (prefix, "json"), ("", "cls"), ("", "json"))
        return next((self._labels[key] for key in keys if key in self._labels), None)

    @property
    def labels(self) -> int:
        return len(self._labels)


class _Shard:
    """What one archive holds; `nested`: the names of archives within it."""

    def __init__(self) -> None:
        self.samples: list[_Sample] = []
        self.others = self.apart = 0
        self.nested: list[str] = []
        self.helpers: Counter[str] = Counter()
        self.damage: str | None = None


def list_shards(paths: list[str], image: str | None = None) -> Listing:
    """The images of tar files, with labels from their samples' .cls or .json members.

    Only headers and labels are read. `image` names a field, such as "jpg" or "seg.png": no other images are taken
    then. A damaged shard costs its images after the damage, as one bad item.

    Raises:
        UserError: where no image is of that field.
    """
    items: list[Item] = []
    labels: list[int | str | None] = []
    bad: list[Item] = []
    listing = Listing(items)
    fields: Counter[str] = Counter()
    helpers: Counter[str] = Counter()
    nested: list[str] = []
    together: list[tuple[int, int, str, str]] = []
    shared = apart = 0
    for path in paths:
        shard = _list_shard(path)
        listing.passed_over += shard.others
        helpers += shard.helpers
        apart += shard.apart
        nested += shard.nested
        for sample in shard.samples:
            if len(sample.images) > 1:
                shared += len(sample.images)
                together = together or sample.images[:2]
            for offset, size, name, field in sample.images:
                if len(fields) < _FIELDS_SHOWN or field.lower() in fields:
                    fields[field.lower()] += 1
                if image is not None and field.lower() != image.lower():
                    listing.passed_over += 1
                    continue
                items.append(Item("tar", path, (offset, size, name), 0))
                labels.append(sample.label(field))
        if shard.damage:
            bad.append(Item("bad", path, (shard.damage,), -1))
    if image is not None and not items and fields:
        shown = ", ".join(short(field) for field in sorted(fields)[:5])
        raise UserError(f"no image in the shards is of the field {short(image)!r}; there are {shown}")
    numbers, listing.class_names, listing.notes = labels_from(labels)
    items[:] = [item._replace(label=label) for item, label in zip(items, numbers, strict=True)]
    items += bad
    listing.notes += helper_notes(helpers)
    if shared and image is None:
        first, second = (short(name) for _, _, name, _ in together)
        few = len(fields) < _FIELDS_SHOWN and len(fields) < shared
        one = f"; --image-column {short(min(fields, key=len))} takes those of one field" if few else ""
        listing.notes.append(
            f"{shared:,} images share their name up to its first dot with another, as {first} and {second} do, "
            f"and each is taken{one}."
        )
    if apart:
        listing.notes.append(
            f"{apart:,} labels (.cls or .json) lie apart from their images and are not used: the files of a sample "
            "must be neighbours in a shard (tar --sort=name writes them so)."
        )
    listing.nested = nested
    if nested and items:
        listing.notes.append(f"{len(nested):,} archives within the shards were passed over, such as {nested[0]}.")
    return listing


def no_images(path: Path, listing: Listing) -> str:
    """Why there is nothing in shards, as a sentence: a tar of tars, as ImageNet comes, or no images at all."""
    where = printable(str(path))
    if not listing.nested:
        return f"{where}: its tar shards hold no images ({listing.passed_over:,} other files)"
    return (
        f"{where} holds no images but {len(listing.nested):,} archives, such as {listing.nested[0]}: unpack it, and "
        "each archive in it into a folder of its own name, their class; then name the folder that holds them"
    )


def _list_shard(path: str) -> _Shard:
    shard = _Shard()
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would never open
    except (OSError, ValueError) as error:
        shard.damage = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        return shard
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise _Damage("not a regular file")
        _list_members(file, status.st_size, shard)
    except _Damage as damage:
        shard.damage = str(damage)
    except OSError as error:
        shard.damage = f"cannot be read: {error.strerror or error}"
    finally:
        os.close(file)
    shard.apart = sum(sample.labels for sample in shard.samples if not sample.images)
    shard.others += shard.apart
    shard.samples = [sample for sample in shard.samples if sample.images]
    return shard


def _list_members(file: int, length: int, shard: _Shard) -> None:
    sample: _Sample | None = None
    for member in _members(file, length):
        if member.kind == "other":
            shard.others += 1
            continue
        folder, _, name = member.name.rpartition("/")
        suffix = "." + name.lower().rpartition(".")[2]
        helper = next((part for part in folder.split("/") if is_helper(part)), None)
        if helper is not None:
            shard.helpers[helper] += suffix in IMAGE_SUFFIXES
            shard.others += suffix not in IMAGE_SUFFIXES
            continue
        if name.lower().endswith(ARCHIVE_SUFFIXES):
            shard.nested.append(short(member.name))
            shard.others += 1
            continue
        stem, _, field = name.partition(".")
        if stem == "" or (name.startswith("__") and name.endswith("__")):
            shard.others += 1
            continue
        if sample is None or sample.key != (folder, stem):
            sample = _Sample((folder, stem))
            shard.samples.append(sample)
        if suffix in IMAGE_SUFFIXES:
            sample.images.append((member.offset, member.size, member.name, field))
        elif suffix in (".cls", ".json") and member.size <= _TEXT_LIMIT:
            sample.add_label(field, os.pread(file, member.size, member.offset))
        else:
            shard.others += 1


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
        shown = this.decode("utf-8", "surrogateescape")  # a sample's name, printable where it is printed
        regular = kind in _FILES and not (kind == b"\0" and this.endswith(b"/"))
        if kind == _SPARSE:
            start = _after_sparse_map(file, block, start)
        elif kind in _NO_CONTENT:
            stored = 0
        if start + stored > length:
            raise _Damage(f"the shard is truncated within {short(this)}")
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


def _label(kind: str, content: bytes) -> int | str | None:
    """What a .cls or .json file says."""
    try:
        text = content.decode().strip()
        value = text
        if kind == "json":
            fields = json.loads(text)
            fields = fields if isinstance(fields, dict) else {}
            value = next((fields[key] for key in ("label", "cls", "class") if key in fields), None)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, str):
        value = value.strip()
        try:
            value = int(value)
        except ValueError:
            value = value or None
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return None
    return value
