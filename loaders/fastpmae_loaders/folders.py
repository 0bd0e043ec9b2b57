"""Images as they lie on a disk, in folders or tar shards, as samples for the engines that need no .beton file."""

import io
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.beton import Beton
from fastpmae_loaders.sources.beton_set import BetonSet, is_set, open_set
from fastpmae_loaders.sources.listing import Files, Item, Listing, helper_notes, list_folder
from fastpmae_loaders.sources.pictures import ImageError, look
from fastpmae_loaders.sources.reading import FILE_LIMIT
from fastpmae_loaders.sources.splits import choose_split, splits_of_files
from fastpmae_loaders.sources.tar import list_shards, no_images
from fastpmae_loaders.sources.weighted import split_weight
from fastpmae_loaders.stores.address import is_address
from fastpmae_loaders.stores.cache import CacheSettings
from fastpmae_loaders.values import checked, local_path

if TYPE_CHECKING:  # looking at files needs no torch
    from fastpmae_loaders.engines.base import Samples

_TOGETHER = 64  # files that a thread looks at in one go
_THREADS = 8
_STRETCH = 8 << 20  # of a shard, read as one by `page_order`


class EncodedImages:
    """Images in files or in tar shards, found and measured. Everything is read-only; n is the number of samples.

    Attributes: `path`; `height`, `width` int64 [n], pixels of the upright image; `size` int64 [n], bytes; `mode`
    uint8 [n] (0 a JPEG that any decoder reads as it is, 2 anything else that Pillow decodes); `label` int64 [n]
    (-1 for none); `page_of` int64 [n], stretches of the disk; `class_names` (list of str, or None); `nbytes`, of
    all images together. `left_out`: (name, reason) of what looked like an image and is none; `passed_over`: the
    number of other files; `notes`: sentences about how the source was understood.

    Only headers are read here, so that an image whose pixels are damaged is found out when it is shown.
    `payload` may be called by any number of threads; no file stays open.
    """

    def __init__(self, path: str | os.PathLike[str], listing: Listing) -> None:
        self.path = Path(path)
        self.passed_over, self.notes, self.class_names = listing.passed_over, listing.notes, listing.class_names
        looks = _look_at_all(listing.items)
        good = [(item, seen) for item, seen in zip(listing.items, looks, strict=True) if not isinstance(seen, str)]
        self.left_out = [
            (item.name, seen) for item, seen in zip(listing.items, looks, strict=True) if isinstance(seen, str)
        ]
        if not good:
            some = f" (the first: {self.left_out[0][0]}: {self.left_out[0][1]})" if self.left_out else ""
            raise UserError(f"{printable(str(path))}: none of {len(looks):,} images can be read{some}")
        self._items = [item for item, _ in good]
        mode, height, width, offset, size = np.array([seen for _, seen in good], np.int64).T
        self.mode = _frozen(mode.astype(np.uint8))
        self.height, self.width = _frozen(height), _frozen(width)
        self.label = _frozen(np.array([item.label for item in self._items], np.int64))
        self.page_of = _frozen(_pages([item.path for item in self._items], offset))
        self.nbytes = int(size.sum())
        self.size = _frozen(size)
        self._offset = offset

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        left_out = f", {len(self.left_out):,} left out" if self.left_out else ""
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} samples{left_out})"

    def name(self, index: int) -> str:
        """What a sample is called in messages; always printable."""
        return self._items[index].name

    def payload(self, index: int) -> np.ndarray:
        """The image file's bytes, uint8. UserError where it can no longer be read."""
        size = int(self.size[index])
        data = np.empty(size, np.uint8)
        try:
            with io.FileIO(self._items[index].path) as file:
                file.seek(int(self._offset[index]))
                place = 0
                while place < size and (count := file.readinto(data.data[place:])):
                    place += count
        except OSError as error:
            raise UserError(f"{self.name(index)} cannot be read: {error.strerror or error}") from None
        if place < size:
            raise UserError(f"{self.name(index)} has become shorter since it was listed")
        return data


class ImageFolder(EncodedImages):
    """A folder of images: a folder for each class, or images without labels; split folders may lie above them.

    Understood as `fastpmae-write` does: the same order, labels and class names. `split` names a split folder
    ("all" takes every one; train is taken where there are several). `flat` takes every image, without labels.

    Raises:
        UserError: where there are no images, or no telling what is a class.
    """

    @checked
    def __init__(self, path: str | os.PathLike[str], split: str | None = None, flat: bool = False) -> None:
        root = _existing(path)
        files = Files(root)
        listing, notes = list_folder(root, files, split, flat)
        listing.add(files.bad)
        listing.notes[:0] = notes
        if not listing.items:
            hidden = "".join(f". {note.rstrip('.')}" for note in helper_notes(files.helpers))
            raise UserError(f"{printable(str(root))} holds no images ({files.others:,} other files){hidden}")
        super().__init__(root, listing)


class TarShards(EncodedImages):
    """Plain .tar files in WebDataset's layout: one of them, a list, or a folder of them.

    Files of one sample share their name up to its first dot; its label is in a .cls or .json file. A sample may hold
    several images, each of which is taken, or those of one field alone: `image="jpg"`. `split`: of shards whose names
    say "train", "val" and so on, as in ImageFolder.

    Raises:
        UserError: where there are no shards, or none with an image.
    """

    @checked
    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        split: str | None = None,
        image: str | None = None,
    ) -> None:
        if isinstance(path, str | os.PathLike):
            root = _existing(path)
            shards, notes, others = [str(root)], [], 0
            if root.is_dir():
                files = Files(root)
                found, notes = choose_split(files.tars, splits_of_files(files.tars), split, root)
                notes = files.notes() + notes
                shards = [str(root / shard) for shard in found]
                others = files.others + len(files.images) + len(files.tables)
        else:
            shards, notes, others = [str(_existing(shard)) for shard in path], [], 0
            root = Path(shards[0]).parent if shards else Path()
        if not shards:
            raise UserError(f"{printable(str(root))} holds no tar shards (plain .tar files)")
        listing = list_shards(shards, image)
        listing.passed_over += others
        listing.notes[:0] = notes
        if not listing.items:
            raise UserError(no_images(root, listing))
        super().__init__(root, listing)


def open_beton(path: str | os.PathLike[str], cache: CacheSettings | None = None) -> Beton | BetonSet:
    """A .beton file, or a set of them, on this machine or at an address in a store.

    Raises:
        UserError: where there is none, or it is not sound.
    """
    if is_address(path):
        from fastpmae_loaders.sources.remote_beton import open_remote

        return open_remote(path, cache)
    return open_set(path) if is_set(path) else Beton(path)


def open_samples(
    path: "Samples | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]",
    split: str | None = None,
    flat: bool = False,
    cache: CacheSettings | None = None,
) -> "Samples":
    """What lies at a path: a .beton file, a set of them, a tar shard or a folder of them, or a folder of images.

    At an address in a store (s3://bucket/set) lies a .beton file or a set of them; `cache` says where its pages are
    kept on this machine. Samples that are open already come back as they are. Several paths are a Mixture of what lies
    there; a weight may stand behind each (`a.beton:0.7`), and behind one alone it says nothing.

    Args:
        split, flat: which images of a folder are taken and whether without labels (see `ImageFolder`); of several
            folders each. Folders of tar shards have splits too.

    Raises:
        UserError: where it is none of these, or a folder of both images and shards, and for `split` or `flat` of what
            has none.
    """
    if not isinstance(path, str | os.PathLike):
        if isinstance(path, list | tuple) and path:
            if not all(isinstance(each, str | os.PathLike) for each in path):
                raise UserError("a list names paths: of images that are open make a Mixture")
            return _mixed(path, split, flat, cache)
        if hasattr(path, "payload"):
            images = cast("Samples", path)
            _check_whole_alone(images.path, split, flat)
            return images
        raise UserError(f"{path!r} names no images: give a path, or images that are open")
    if isinstance(path, str | Path):
        path, _ = split_weight(str(path))
    if is_address(path):
        _check_whole_alone(path, split, flat)
        return open_beton(path, cache)
    root = _existing(path)
    if root.is_file() or is_set(root):
        _check_whole_alone(root, split, flat)
        return open_set(root) if root.is_dir() else TarShards(root) if root.suffix.lower() == ".tar" else Beton(root)
    files = Files(root)
    if files.tars and files.images:
        raise UserError(
            f"{printable(str(root))} holds {len(files.images):,} images and {len(files.tars):,} tar files: "
            "say which with ImageFolder(path) or TarShards(path)"
        )
    if files.tars:
        _check_whole_alone(root, None, flat)
    return TarShards(root, split) if files.tars else ImageFolder(root, split, flat)


def _check_whole_alone(path: object, split: str | None, flat: bool) -> None:
    """Refuse what would be asked in vain of anything but a folder of images."""
    for name, given in ((f"split={split!r}", split is not None), ("flat=True", flat)):
        if given:
            raise UserError(f"{printable(str(path))} has nothing that {name} chooses from: leave it out")


def _mixed(
    paths: Sequence[str | os.PathLike[str]], split: str | None, flat: bool, cache: CacheSettings | None
) -> "Samples":
    """The mixture of what lies at some paths; one alone is itself."""
    from fastpmae_loaders.mixture import Mixture

    sources = [split_weight(os.fspath(path)) for path in paths]
    weights = [weight for _, weight in sources if weight is not None]
    if len(sources) == 1:
        return open_samples(paths[0], split, flat, cache)
    if weights and len(weights) < len(sources):
        without = next(source for source, weight in sources if weight is None)
        if not is_address(without):  # what stands behind it may be meant for a weight
            _existing(without)
        raise UserError(f"{printable(without)} has no weight and others have: give one to each, as in {without}:0.5")
    return Mixture([open_samples(source, split, flat, cache) for source, _ in sources], weights or None)


def _existing(path: str | os.PathLike[str]) -> Path:
    root = local_path(path)
    try:
        exists = root.exists()
    except (OSError, ValueError):
        exists = False
    if not exists:
        before, _, behind = str(root).rpartition(":")
        if before and os.path.lexists(before):
            raise UserError(
                f"{printable(before)} exists, and {printable(behind)!r} behind it is no weight: expected a number "
                "above 0, as in a.beton:0.7"
            )
        raise UserError(f"{printable(str(root))} does not exist")
    return root


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array


Seen = tuple[int, int, int, int, int] | str
"""(mode, height, width, offset, size), or why the image is left out."""


def _look_at_all(items: Sequence[Item]) -> list[Seen]:
    parts = [items[start : start + _TOGETHER] for start in range(0, len(items), _TOGETHER)]
    # threads share the warnings' settings: they are changed here alone, while this thread waits for the others
    with warnings.catch_warnings(), ThreadPoolExecutor(min(_THREADS, max(1, len(parts)))) as pool:
        warnings.simplefilter("ignore")
        return list(chain.from_iterable(pool.map(lambda part: [_look_at(item) for item in part], parts)))


def _look_at(item: Item) -> Seen:
    if item.kind == "bad":
        return item.where[0]
    try:
        with io.FileIO(item.path) as file:
            offset, size = item.where[:2] if item.kind == "tar" else (0, os.fstat(file.fileno()).st_size)
            if size > FILE_LIMIT:
                return f"the file has {size:,} bytes, more than the {FILE_LIMIT:,} that are read"
            with io.BufferedReader(_Window(file, offset, size), 1 << 14) as window:
                return (*look(window), offset, size)
    except ImageError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        if self._at < 0:
            raise ValueError("before the file's beginning")
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._start + self._at)
        read = self._file.readinto(memoryview(buffer)[:count]) if count else 0
        self._at += read or 0
        return read or 0


def _pages(paths: list[str], offset: np.ndarray) -> np.ndarray:
    """Stretches of a shard; in folders every file is one."""
    pages = np.empty(len(paths), np.int64)
    page, last = -1, None
    for place, (path, start) in enumerate(zip(paths, offset.tolist(), strict=True)):
        here = (path, start // _STRETCH)
        page += here != last
        pages[place], last = page, here
    return pages
