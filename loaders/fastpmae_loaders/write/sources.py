"""Finds the images of a source: folders of files, tar shards, Hugging Face data sets; with their labels.

Nothing is decoded here. A source is listed in full before anything is written, in an order that depends on
names alone, so that the same source gives the same file.
"""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.listing import Files, Item, Listing, helper_notes, list_folder
from fastpmae_loaders.sources.reading import read_file
from fastpmae_loaders.sources.splits import choose_split, splits_of_files
from fastpmae_loaders.sources.tar import list_shards, no_images
from fastpmae_loaders.values import Typed, local_path

__all__ = ["Item", "Listing", "SourceSettings", "find_images", "read_item"]


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


def find_images(path: str | os.PathLike[str], settings: SourceSettings | None = None) -> Listing:
    """Lists the images of a folder, a tar shard, a folder of shards, or a Hugging Face data set's folder.

    Raises UserError when there is nothing to list, or no telling how.
    """
    root, settings = local_path(path), settings or SourceSettings()
    try:
        exists = root.exists()
    except (OSError, ValueError):
        exists = False
    if not exists:
        raise UserError(f"{printable(str(root))} does not exist")
    if root.is_file() and root.suffix.lower() == ".beton":
        name, quoted = printable(str(root)), printable(shlex.quote(str(root)))
        raise UserError(
            f"{name} is a .beton file already: train on it as it is, look into it with "
            f"fastpmae-write --check {quoted}, or name the images that it was written from"
        )
    files = Files(root)
    base = root if root.is_dir() else root.parent
    kind = settings.kind or _kind_of(root, files)
    if kind == "tar":
        shards, note = choose_split(files.tars, splits_of_files(files.tars), settings.split, root)
        source = list_shards([str(base / shard) for shard in shards], settings.image_column)
        source.passed_over += files.others + len(files.images) + len(files.tables)
        note = files.notes() + note
    elif kind == "hf":
        from fastpmae_loaders.write.hf_datasets import list_tables

        tables, note = choose_split(files.tables, splits_of_files(files.tables), settings.split, root)
        source = list_tables([str(base / table) for table in tables], settings.image_column, settings.label_column)
        source.passed_over += files.others + len(files.images) + len(files.tars)
        note = files.notes() + note
    else:
        source, note = list_folder(root, files, settings.split, settings.flat)
    source.items += files.bad
    source.notes[:0] = note
    if not source.items and files.packed:
        raise UserError(
            f"{printable(str(root))} holds no images, but packed files such as {printable(files.packed[0])}: "
            "unpack them first (tar shards must be plain .tar files)"
        )
    if not source.items and kind == "tar":
        raise UserError(no_images(root, source))
    if not source.items:
        raise UserError(
            f"{printable(str(root))} holds no images ({files.others:,} other files); a folder of images, tar "
            "shards or the parquet or arrow files of a Hugging Face data set are understood"
            + "".join(f". {note.rstrip('.')}" for note in helper_notes(files.helpers))
        )
    return source


def _kind_of(root: Path, files: Files) -> str:
    found = {"folder": len(files.images), "tar": len(files.tars), "hf": len(files.tables)}
    present = [kind for kind, count in found.items() if count]
    if len(present) > 1:
        raise UserError(
            f"{printable(str(root))} holds {found['folder']:,} images, {found['tar']:,} tar files and "
            f"{found['hf']:,} parquet or arrow files: say which to take with --source folder, tar or hf"
        )
    return present[0] if present else "folder"


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
