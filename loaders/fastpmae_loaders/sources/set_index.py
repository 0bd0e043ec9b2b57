"""The index of a set of .beton files: `index.json`, which names the parts and says what is in each.

It is small beside the parts, so a set of any size is opened by it alone. It is taken for hostile until it proves sound:
nothing in it can name a file elsewhere, or ask for memory that the parts do not have bytes for.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastpmae_loaders.errors import BetonError
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.sources.beton import Beton
from fastpmae_loaders.sources.reading import given_bytes
from fastpmae_loaders.values import NAME_MAX

INDEX = "index.json"
FORMAT, VERSION = "fastpmae-set", 1
SUFFIX = ".beton"
LARGEST_INDEX = 1 << 30
"""Bytes; 10^9 images take about 40 MB."""
_MOST_BYTES = 1 << 48
_LONGEST_SIDE = (1 << 16) - 1
_LARGEST_PAGE = 1 << 31
_LEAST_IMAGE = 37
"""Bytes that the tables of a .beton file hold for each image, beside the image's own."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One part of a set: a .beton file, by the name that it has beside the index.

    `images` in it, `bytes` of the file, `page_size` as its header says, `height` and `width`, the largest sides of any
    of its images, and `digest`, "sha256:" and the 64 hexadecimal digits of the file's bytes. `pages`, where they are
    known, are the images of each of its pages that holds any, in the file's order: [pages] of the smallest unsigned
    type that has room for them. Then the images lie in the file as they are numbered; it is empty where that is not so.
    """

    name: str
    images: int
    bytes: int
    page_size: int
    height: int
    width: int
    digest: str
    # the digest stands for them where two parts are compared
    pages: np.ndarray | Sequence[int] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        pages = np.array(self.pages, np.uint32)
        # nothing else of a set grows with its images
        pages = pages.astype(np.min_scalar_type(pages.max(initial=0)))
        pages.setflags(write=False)
        object.__setattr__(self, "pages", pages)

    def entry(self) -> dict[str, Any]:
        """The part as the index has it."""
        entry = {name: getattr(self, name) for name in _FIELDS}
        return entry | ({"pages": np.asarray(self.pages).tolist()} if len(self.pages) else {})


_FIELDS = {"name": str, "images": int, "bytes": int, "page_size": int, "height": int, "width": int, "digest": str}


@dataclass(frozen=True)
class SetIndex:
    """What `index.json` says: the parts, in the order of their images' numbers, and the classes' names."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None = None

    @property
    def images(self) -> int:
        """Images of all parts."""
        return sum(shard.images for shard in self.shards)

    def to_json(self) -> str:
        """The file's text, the same for the same parts and classes always."""
        parts = [json.dumps(shard.entry(), sort_keys=True, separators=(",", ":")) for shard in self.shards]
        classes = None if self.classes is None else list(self.classes)
        return (
            f'{{"classes": {json.dumps(classes)},\n"format": "{FORMAT}",\n"images": {self.images},\n"shards": [\n'
            + ",\n".join(parts)
            + f'\n],\n"version": {VERSION}}}\n'
        )


def read_index(source: bytes | str | os.PathLike[str], where: str | None = None) -> SetIndex:
    """The index in these bytes, or in the file of that path.

    Args:
        where: what the bytes are called in sentences.

    Raises:
        BetonError: one sentence, where the file cannot be read, or anything in it is not as `to_json` writes it.
    """
    blob, where = given_bytes(source, where, INDEX)
    if len(blob) > LARGEST_INDEX:
        raise BetonError(f"{where} has {len(blob):,} bytes, more than the {LARGEST_INDEX:,} that are read")
    try:
        found = json.loads(blob, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else short(str(error))
        raise BetonError(f"{where} is no index of a set: {reason}") from None
    try:
        return _index(found)
    except BetonError as error:
        raise BetonError(f"{where}: {error}") from None


def shard_of(path: str | os.PathLike[str], digest: str | None = None) -> Shard:
    """A .beton file as a part of a set; it is opened and checked, and read once for its digest unless that is known.

    Raises:
        BetonError: where it is no sound .beton file, or its name is none for a part.
    """
    beton = Beton(path)
    name = beton.path.name
    if reason := _bad_name(name):
        raise BetonError(f"{beton.path} cannot be a part of a set: {reason}")
    pages = beton.page_of
    in_order = bool((pages[1:] >= pages[:-1]).all())
    counts = np.diff(np.flatnonzero(np.diff(pages, prepend=-1, append=np.iinfo(np.int64).max))) if in_order else ()
    height, width = int(beton.height.max()), int(beton.width.max())
    if digest is None:
        digest = file_digest(beton.path)
    return Shard(name, len(beton), beton.nbytes, beton.page_size, height, width, digest, counts)


def file_digest(path: str | os.PathLike[str]) -> str:
    """The digest of a file's bytes as the index has it. BetonError where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BetonError(f"{printable(os.fspath(path))} cannot be read: {error.strerror or error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object in it has the same key twice")
    if (counts := _counts(found.get("pages"))) is not None:
        found["pages"] = counts  # as soon as it is read: as a list it takes eight times the bytes
    return found


def _counts(pages: Any) -> np.ndarray | None:
    """A list of whole numbers above 0, of 32 bits, as an array of the smallest type; None where it is no such list."""
    if not isinstance(pages, list) or set(map(type, pages)) != {int} or min(pages) < 1 or max(pages) >= 2**32:
        return None
    return np.array(pages, np.min_scalar_type(max(pages)))


def _index(found: Any) -> SetIndex:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BetonError(f'it is no index of a set: its "format" is not "{FORMAT}"')
    version = found.get("version")
    if type(version) is not int or version != VERSION:
        raise BetonError(
            f"its version is {_shown(version)}, and {VERSION} is the only one that is read: update fastpmae"
        )
    entries = found.get("shards")
    if not isinstance(entries, list) or not entries:
        raise BetonError('its "shards" are no list of parts')
    shards = tuple(shard_from(entry, f"part {place}") for place, entry in enumerate(entries))
    names: set[str] = set()
    for shard in shards:
        # a disk may take upper and lower case for the same
        if shard.name.casefold() in names:
            raise BetonError(f"the part {shard.name} is named twice")
        names.add(shard.name.casefold())
    images = _number(found, "images", 1, _MOST_BYTES, "the index")
    if images != sum(shard.images for shard in shards):
        raise BetonError(f"it says {images:,} images, and its parts have {sum(shard.images for shard in shards):,}")
    classes = found.get("classes")
    if classes is not None and (not isinstance(classes, list) or not all(isinstance(name, str) for name in classes)):
        raise BetonError('its "classes" are no list of names')
    return SetIndex(shards, None if classes is None else tuple(map(printable, classes)))


def shard_from(entry: Any, where: str = "the part") -> Shard:
    """A part from what `Shard.entry` gave and a file has kept.

    Raises:
        BetonError: where anything in it is not as `entry` gives it.
    """
    if not isinstance(entry, dict):
        raise BetonError(f"{where} is {_shown(entry)}, and should be an object")
    for name, kind in _FIELDS.items():
        if name not in entry:
            raise BetonError(f'{where} has no "{name}"')
        if type(entry[name]) is not kind:
            kind_of_value = "a text" if kind is str else "a whole number"
            raise BetonError(f'the "{name}" of {where} is {_shown(entry[name])}, and should be {kind_of_value}')
    if reason := _bad_name(entry["name"]):
        raise BetonError(f"{where} is called {_shown(entry['name'])}: {reason}")
    where = f"{where} ({entry['name']})"
    size = _number(entry, "bytes", 1, _MOST_BYTES, where)
    images = _number(entry, "images", 1, max(1, size // _LEAST_IMAGE), where)
    page = _number(entry, "page_size", 1, _LARGEST_PAGE, where)
    if page & (page - 1):
        raise BetonError(f"the page size of {where} is {page}, which is no power of two")
    height, width = (_number(entry, side, 1, _LONGEST_SIDE, where) for side in ("height", "width"))
    if not _DIGEST.fullmatch(entry["digest"]):
        raise BetonError(f'the digest of {where} is {_shown(entry["digest"])}, and should be "sha256:" and 64 digits')
    pages = entry.get("pages", ())
    if not isinstance(pages, tuple):
        counts = pages if isinstance(pages, np.ndarray) else _counts(pages)
        if counts is None or int(counts.sum()) != images:
            raise BetonError(
                f'the "pages" of {where} are no list of whole numbers above 0 whose sum is its {images:,} images'
            )
        if len(counts) > -(-size // page):
            raise BetonError(f"{where} has {len(counts):,} pages of images, more than its {size:,} bytes hold")
        pages = counts
    return Shard(entry["name"], images, size, page, height, width, entry["digest"], pages)


def _bad_name(name: str) -> str:
    """Why a part may not be called so; nothing where it may."""
    if any(mark in name for mark in "/\\:"):
        return "a part lies beside the index, so its name has no folder and no drive"
    if name.startswith(".") or not name.endswith(SUFFIX):
        return f"a part's name ends in {SUFFIX} and does not begin with a dot"
    if not name.isprintable() or name != name.strip() or len(name.encode("utf-8", "replace")) > NAME_MAX:
        return f"a part's name is printable, and of {NAME_MAX} bytes at most"
    return ""


def _number(entry: dict[str, Any], name: str, least: int, most: int, where: str) -> int:
    value = entry.get(name)
    if type(value) is not int or not least <= value <= most:
        raise BetonError(f'the "{name}" of {where} is {_shown(value)}, and should be between {least} and {most:,}')
    return value


def _shown(value: Any) -> str:
    return (
        short(json.dumps(value, default=str)) if isinstance(value, str | int | float | None) else type(value).__name__
    )
