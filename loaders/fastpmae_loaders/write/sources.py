"""Finds the images of a source: folders of files, tar shards, Hugging Face data sets; with their labels.

Nothing is decoded here. A source is listed in full before anything is written, in an order that depends on
names alone, so that the same source gives the same file.
"""

import json
import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.listing import Files, Item, Listing, helper_notes, list_folder
from fastpmae_loaders.sources.reading import read_file
from fastpmae_loaders.sources.splits import choose_split, splits_of_files
from fastpmae_loaders.sources.tar import list_shards, no_images
from fastpmae_loaders.stores.address import is_address, parse_address
from fastpmae_loaders.values import Typed, local_path
from fastpmae_loaders.write.remote_source import RemoteSource, list_source
from fastpmae_loaders.write.workers import ITEMS_AHEAD

_MARGIN = 256
"""Images that workers may hold beyond those: the last group that was handed out."""

__all__ = [
    "Found",
    "Item",
    "Listing",
    "SourceSettings",
    "find_images",
    "list_files",
    "list_found",
    "look_into",
    "name_in",
    "nothing_in",
    "read_item",
    "spread",
]


@dataclass(frozen=True)
class SourceSettings(Typed):
    """How a source is understood.

    kind: "folder", "tar" or "hf" instead of finding out. split: which of its splits ("all" for every one).
    flat: take every image of a folder as unlabelled. image_column, label_column: of a Hugging Face data set.
    """

    kind: str | None = None
    split: str | None = None
    flat: bool = False
    image_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind is not None and self.kind not in _KINDS:
            raise UserError(f"a source's kind is {self.kind!r}; expected folder, tar or hf, or None to find out")


@dataclass(frozen=True)
class Found:
    """What a source is, as far as the names of its files tell: no image and no label has been read.

    base: the folder that names are relative to; kind: "folder", "tar" or "hf"; names: the tar shards or tables that are
    taken, in order.
    """

    root: Path
    base: Path
    kind: str
    files: Files
    names: list[str]
    notes: list[str]
    settings: SourceSettings
    remote: RemoteSource | None = None
    """What brings the files of a source in a store to below `base`."""

    def present(self, paths: Iterable[str]) -> AbstractContextManager[None]:
        """Within it these files of the source, by their paths on this machine, are here."""
        if self.remote is None:
            return nullcontext()
        base = f"{self.remote.folder}/"
        return self.remote.present([path.removeprefix(base) for path in paths])

    @contextmanager
    def brought(self, listing: Listing) -> Iterator[None]:
        """Within it the images of a listing can be read one after another, as a single file is written."""
        if self.remote is None:
            yield
        elif self.kind == "folder":
            with self.remote.in_turn(listing.items, ITEMS_AHEAD + _MARGIN) as items:
                listing.items = items
                yield
        else:
            with self.present({item.path for item in listing.items if item.kind != "bad"}):
                yield

    @property
    def others(self) -> int:
        """Files that were passed over, beside those within tar shards."""
        taken = {"folder": self.files.images, "tar": self.files.tars, "hf": self.files.tables}
        known = sum(len(names) for names in (self.files.images, self.files.tars, self.files.tables))
        return self.files.others + known - len(taken[self.kind])

    def named(self) -> AbstractContextManager[None]:
        """Within it a UserError names the source's files as the user does, wherever they are on this machine."""
        return _named(self.remote)

    def size_of(self, name: str) -> int:
        """Bytes of a tar shard or table; -1 where it cannot be told."""
        if self.remote is not None:
            return self.remote.sizes.get(name, -1)
        try:
            return (self.base / name).stat().st_size
        except OSError:
            return -1

    def without_files(self) -> "Found":
        """The same with no names of files in it, which may be many."""
        remote = None if self.remote is None else replace(self.remote, sizes={})
        return replace(self, files=Files(None), names=[], notes=[], remote=remote)


def _named(remote: RemoteSource | None) -> AbstractContextManager[None]:
    return nullcontext() if remote is None else remote.by_address()


def look_into(path: str | os.PathLike[str], settings: SourceSettings | None = None) -> Found:
    """Finds out what lies at a path, and which of its files are taken.

    Raises UserError when there is nothing, or no telling what.
    """
    remote, stored, settings = None, None, settings or SourceSettings()
    if is_address(path):
        remote, root, stored = list_source(parse_address(path))
    else:
        root = local_path(path)
    try:
        exists = stored is not None or root.exists()
    except (OSError, ValueError):
        exists = False
    if not exists:
        raise UserError(f"{printable(str(root))} does not exist")
    base = remote.folder if remote is not None else root if root.is_dir() else root.parent
    is_file = root.is_file() if stored is None else root != base
    if is_file and root.suffix.lower() == ".beton":
        name, quoted = printable(str(root)), printable(shlex.quote(str(root)))
        raise UserError(
            f"{name} is a .beton file already: train on it as it is, look into it with "
            f"fastpmae-write --check {quoted}, or name the images that it was written from"
        )
    files = Files(root if stored is None else base, stored)
    if not is_file:
        own = _own_tables(base, files.tables)
        beside = len(files.tables) - len(own)
        files.tables, files.others = own, files.others + beside
    else:
        beside = 0
    with _named(remote):
        kind = settings.kind or _kind_of(root, files)
        if kind != "folder" or files.images:
            _check_settings(settings, kind)
        names, notes = list[str](), list[str]()
        if kind != "folder":
            every = files.tars if kind == "tar" else files.tables
            names, notes = choose_split(every, splits_of_files(every), settings.split, root)
        if kind == "hf" and beside:
            what = "1 arrow file is" if beside == 1 else f"{beside:,} arrow files are"
            notes.append(f"{what} passed over: no part of the data set, but kept beside it by Hugging Face's library.")
    return Found(root, base, kind, files, names, notes, settings, remote)


_KINDS = {"folder": "a folder of images", "tar": "tar shards", "hf": "a Hugging Face data set"}
_OF = {"flat": ("folder",), "image_column": ("tar", "hf"), "label_column": ("hf",)}
"""Which kinds a setting is for."""


def _check_settings(settings: SourceSettings, kind: str) -> None:
    """Refuse what a source of this kind makes no use of."""
    for name, kinds in _OF.items():
        if getattr(settings, name) and kind not in kinds:
            flag, meant = "--" + name.replace("_", "-"), " or ".join(_KINDS[each] for each in kinds)
            raise UserError(f"{flag} is for {meant}, and the source is {_KINDS[kind]}: leave it out")


def _own_tables(base: Path, tables: list[str]) -> list[str]:
    """The tables that are a data set's own: what its state.json names, where that lies beside them.

    Hugging Face's library keeps what its `map` and `filter` have made in the same folder.
    """
    named: dict[str, set[str]] = {}
    for folder in {name.rpartition("/")[0] for name in tables}:
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads((base / folder / "state.json").read_text(encoding="utf-8"))
            named[folder] = {entry["filename"] for entry in state["_data_files"]}
    own = []
    for name in tables:
        folder, _, last = name.rpartition("/")
        if last in named[folder] if named.get(folder) else not fnmatchcase(last, "cache-*.arrow"):
            own.append(name)
    return own


def list_files(found: Found, names: list[str]) -> Listing:
    """The images in some of the shards or tables of a source; labels that are words are numbered among these alone."""
    paths, settings = [str(found.base / name) for name in names], found.settings
    if found.remote is not None:
        found.remote.bring(str(Path(path).relative_to(found.remote.folder)) for path in paths)
    if found.kind == "tar":
        return list_shards(paths, settings.image_column)
    from fastpmae_loaders.write.hf_datasets import list_tables

    return list_tables(paths, settings.image_column, settings.label_column)


def find_images(path: str | os.PathLike[str], settings: SourceSettings | None = None) -> Listing:
    """Lists the images of a folder, a tar shard, a folder of shards, or a Hugging Face data set's folder.

    Raises UserError when there is nothing to list, or no telling how.
    """
    return list_found(look_into(path, settings))


def list_found(found: Found) -> Listing:
    """All images of a source. Raises UserError where there are none."""
    with found.named():
        return _listed(found)


def _listed(found: Found) -> Listing:
    root, files, settings = found.root, found.files, found.settings
    if found.kind == "folder":
        source, notes = list_folder(root, files, settings.split, settings.flat)
    else:
        source, notes = list_files(found, found.names), files.notes() + found.notes
        source.passed_over += found.others
    source.add(files.bad)
    source.notes[:0] = notes
    if not source.items:
        raise UserError(nothing_in(found, source))
    return source


def nothing_in(found: Found, listing: Listing) -> str:
    """Why there are no images in a source, as a sentence."""
    root, files = found.root, found.files
    if files.packed:
        return (
            f"{printable(str(root))} holds no images, but packed files such as {printable(files.packed[0])}: "
            "unpack them first (tar shards must be plain .tar files)"
        )
    if files.betons:
        return (
            f"{printable(str(root))} holds no images, but .beton files such as {printable(files.betons[0])}, which are "
            "written already: train on them as they are, or name the images that they were written from"
        )
    if found.kind == "tar":
        return no_images(root, listing)
    return (
        f"{printable(str(root))} holds no images ({files.others:,} other files); a folder of images, tar "
        "shards or the parquet or arrow files of a Hugging Face data set are understood"
        + "".join(f". {note.rstrip('.')}" for note in helper_notes(files.helpers))
    )


def _kind_of(root: Path, files: Files) -> str:
    found = {"folder": len(files.images), "tar": len(files.tars), "hf": len(files.tables)}
    present = [kind for kind, count in found.items() if count]
    if len(present) > 1:
        raise UserError(
            f"{printable(str(root))} holds {found['folder']:,} images, {found['tar']:,} tar files and "
            f"{found['hf']:,} parquet or arrow files: say which to take with --source folder, tar or hf"
        )
    return present[0] if present else "folder"


def spread(listing: Listing, limit: int | None) -> None:
    """Keeps `limit` of the images, spread evenly."""
    if limit is not None and limit < len(listing.items):
        every = len(listing.items) / limit
        listing.items = [listing.items[int((place + 0.5) * every)] for place in range(limit)]


def name_in(base: str, item: Item) -> bytes:
    """What an image is called in a source whose files lie below `base`, which ends in "/", wherever that is."""
    where = () if item.kind == "bad" else item.where
    return os.fsencode(item.path.removeprefix(base)) + b"\0" + repr(where).encode("utf-8", "backslashreplace")


def read_item(item: Item) -> bytes:
    """The bytes of one image file. UserError with the reason when they cannot be had."""
    if item.kind == "bad":
        raise UserError(item.where[0])
    try:
        if item.kind == "file":
            return read_file(item.path)
        if item.kind == "tar":
            return read_file(item.path, *item.where[:2])
        from fastpmae_loaders.write.table_reader import read_row

        return read_row(item.path, item.where)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}") from None
