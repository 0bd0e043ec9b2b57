"""What a folder or a tar shard holds: its images in the order of their names, with labels from folders or files.

Nothing is decoded here. A source is listed in full, in an order that depends on names alone, so that the same
source is always the same samples. Of a folder's images their names are kept, and nothing else of each.
"""

import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.sources.names import Names
from fastpmae_loaders.sources.splits import (
    EVERYTHING,
    Named,
    below_splits,
    count_images,
    doubtful_classes,
    within_classes,
)

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".jpx", ".heic", ".heif",
    ".hif", ".jxl",
))
# files of other suffixes than these two sets are looked into
_OTHER_SUFFIXES = frozenset((
    ".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".md", ".html", ".yaml", ".yml", ".py", ".log", ".pdf",
    ".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".npy", ".npz", ".pt", ".pth", ".mat", ".h5", ".beton", ".cls",
    ".lock", ".idx", ".index",
))
# fmt: on
_TAR_SUFFIXES = (".tar",)
_PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
ARCHIVE_SUFFIXES = (*_TAR_SUFFIXES, *_PACKED_SUFFIXES)
_TABLE_SUFFIXES = (".parquet", ".arrow")
_KNOWN_SUFFIXES = (*IMAGE_SUFFIXES, *_TAR_SUFFIXES, *_TABLE_SUFFIXES)
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|....ftypavif"
    rb"|....ftyp(?:hei[cxms]|hev[cxms]|heif|mif1|msf1)|\0\0\0\x0cjP  |\0\0\0\x0cJXL ",
    re.DOTALL,
)
# Folders that programs keep beside a user's own, in lower case; so are all whose names begin with a dot
_HELPERS = frozenset((
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "lost+found",
    "system volume information", "__macosx", "__pycache__", "thumbnails", "_thumbnails", "thumbs", "_thumbs",
))  # fmt: skip


class Item(NamedTuple):
    """One image of a source: in a file, at `where` within it; label −1 where it has none of several classes.

    kind: "file"; "tar" with where = (offset, size); "parquet" with (row group, row, column); "arrow" with
    (row, column); "sample" of a .beton, with its number; "bad", with the reason in `where`: found to be unusable while
    listing.
    """

    kind: str
    path: str
    where: tuple
    label: int

    @property
    def name(self) -> str:
        """How the image is called in messages; always printable, and of a longer name in a tar 1,000 signs."""
        inner = {"tar": lambda: f" ({short(self.where[2], 1000)})", "parquet": lambda: f" (row {self.where[3]})"}
        suffix = inner[self.kind]() if self.kind in inner else ""
        if self.kind in ("arrow", "sample"):
            suffix = f" ({'row' if self.kind == 'arrow' else 'sample'} {self.where[0]})"
        return printable(self.path + suffix)


class FileItems(Sequence[Item]):
    """The images of some folders, each made when it is asked for: what is kept is their names.

    Args:
        base: the folder that names are relative to.
        folders: (number, label) of each folder of `names` that is taken, in order.
        others: images that follow them.
    """

    def __init__(
        self, base: Path, names: Names, folders: Sequence[tuple[int, int]], others: Sequence[Item] = ()
    ) -> None:
        self._base, self._names, self._folders, self._others = f"{base}/", names, folders, others
        counts = [folder.count for folder in names.folders]
        starts = [0, *accumulate(counts)]
        self._starts = [starts[number] for number, _ in folders]
        self._ends = list(accumulate(counts[number] for number, _ in folders))

    def __len__(self) -> int:
        return (self._ends[-1] if self._ends else 0) + len(self._others)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        place = place + len(self) if place < 0 else place
        if not 0 <= place < len(self):
            raise IndexError(f"of {len(self)} images none has the number {place}")
        at = bisect_right(self._ends, place)
        if at == len(self._ends):
            return self._others[place - len(self)]
        last = self._starts[at] + self._names.folders[self._folders[at][0]].count
        return Item("file", self._base + self._names[last - self._ends[at] + place], (), self._folders[at][1])

    def __iter__(self) -> Iterator[Item]:
        for (number, label), start in zip(self._folders, self._starts, strict=True):
            for name in self._names.between(start, start + self._names.folders[number].count):
                yield Item("file", self._base + name, (), label)
        yield from self._others

    def followed_by(self, others: Sequence[Item]) -> "FileItems":
        """The same, and others behind them."""
        return FileItems(Path(self._base), self._names, self._folders, [*self._others, *others])


@dataclass
class Listing:
    """What a source holds. `notes` are sentences for the user about how it was understood.

    nested: names of archives within tar shards, which are not looked into.
    """

    items: Sequence[Item]
    class_names: list[str] | None = None
    passed_over: int = 0
    notes: list[str] = field(default_factory=list)
    nested: list[str] = field(default_factory=list)

    def add(self, items: Sequence[Item]) -> None:
        """Have more images, behind those that are there."""
        here = self.items
        self.items = here.followed_by(items) if isinstance(here, FileItems) else [*here, *items]


class Files:
    """Every file below a path, by what it is; names relative to the path, in the order of their names.

    Below no path there is none.

    Args:
        names: of the files below a path that are not there to be looked into, folder by folder in any order; by default
            they are looked for.
    """

    def __init__(self, root: Path | None, names: Names | None = None):
        self.images = Names()
        self.tars: list[str] = []
        self.tables: list[str] = []
        self.others = 0
        self.packed: list[str] = []
        self.betons: list[str] = []
        self.bad: list[Item] = []
        self.helpers: Counter[str] = Counter()
        self._twice: list[list[str]] = []
        if root is None:
            return
        if names is not None:
            self._take(str(root), names)
        elif root.is_dir():
            self._walk(str(root))
        elif root.is_file():
            images: list[str] = []
            self._add("", root.name, str(root), images)
            self.images.add("", images)
        else:
            raise UserError(f"{printable(str(root))} is neither a file nor a folder")

    def _walk(self, root: str) -> None:
        names: dict[tuple[int, int], list[str]] = {}
        linked: set[tuple[int, int]] = set()
        pending = [("", _identity(root), (), False)]
        while pending:
            folder, identity, above, in_link = pending.pop()
            above = (*above, identity)
            names.setdefault(identity, []).append(folder)
            images: list[str] = []
            try:
                with os.scandir(f"{root}/{folder}") as scan:
                    entries = sorted(_beside(scan, images), key=lambda entry: entry.name)
            except OSError as error:
                if not folder:
                    raise UserError(f"{printable(root)} cannot be read: {error.strerror}") from None
                self._unusable(f"{root}/{folder}", f"the folder cannot be read: {error.strerror}")
                continue
            below = []
            for entry in entries:
                relative = f"{folder}/{entry.name}" if folder else entry.name
                if not _is_folder(entry):
                    self._add(folder, entry.name, entry.path, images, entry)
                    continue
                if is_helper(entry.name):
                    self.helpers[entry.name] += _known_files(entry.path)
                    continue
                identity, is_link = _identity(entry.path), entry.is_symlink()
                if is_link:
                    # a link upwards would never end, and links within linked folders could fan out without limit
                    if identity in above or (in_link and identity in linked):
                        self.others += 1
                        continue
                    linked.add(identity)
                below.append((relative, identity, above, in_link or is_link))
            self.images.add(folder, sorted(images))
            pending += reversed(below)
        self._twice = [names[identity] for identity in linked if len(names.get(identity, ())) > 1]

    def _take(self, root: str, names: Names) -> None:
        """The same of files that are not there: those of images are told by their names alone."""
        images: dict[str, list[str]] = {}
        for name in names.in_folder_order():
            folder, _, own = name.rpartition("/")
            helper = next(filter(is_helper, folder.split("/")), None)
            if helper is not None:
                self.helpers[helper] += own.lower().endswith(_KNOWN_SUFFIXES)
                continue
            if folder not in images:
                self._keep(images)
                images[folder] = []
            self._add(folder, own, f"{root}/{name}", images[folder])
        self._keep(images)

    def _keep(self, images: dict[str, list[str]]) -> None:
        for folder in list(images):
            self.images.add(folder, images.pop(folder))

    def notes(self) -> list[str]:
        """What a user should know of how the folders were understood."""
        found = []
        for first, *again in sorted(self._twice)[:1]:
            if any(image.startswith(f"{first}/") for image in self.images):
                more = f", and so for {len(self._twice) - 1:,} more" if len(self._twice) > 1 else ""
                found.append(
                    f"{printable(first)} and {printable(again[0])} are one folder by two names: "
                    f"its images are there under each{more}."
                )
        return found + helper_notes(self.helpers)

    def _add(self, folder: str, name: str, path: str, images: list[str], entry: os.DirEntry | None = None) -> None:
        """Count a file among those of its kind; that of an image goes to `images`, by its name in its folder."""
        relative = f"{folder}/{name}" if folder else name
        suffix = "." + name.lower().rpartition(".")[2]
        known = suffix in IMAGE_SUFFIXES
        try:
            regular = entry.is_file() if entry else True
        except OSError:
            regular = False
        if not regular:
            if known:
                self._unusable(path, "a link to nothing" if Path(path).is_symlink() else "not a regular file")
            else:
                self.others += 1
        elif name.startswith("._"):  # macOS keeps a file's attributes under the file's own suffix
            self.others += 1
        elif known or (suffix not in _OTHER_SUFFIXES and not is_container(name) and _looks_like_image(path)):
            images.append(name)
        elif suffix in _TAR_SUFFIXES:
            self.tars.append(relative)
        elif suffix in _TABLE_SUFFIXES:
            self.tables.append(relative)
        else:
            self.others += 1
            if name.lower().endswith(_PACKED_SUFFIXES):
                self.packed.append(relative)
            elif suffix == ".beton":
                self.betons.append(relative)

    def _unusable(self, path: str, reason: str) -> None:
        self.bad.append(Item("bad", path, (reason,), -1))


def _beside(scan: Iterable[os.DirEntry], images: list[str]) -> Iterator[os.DirEntry]:
    """What else a folder holds beside files that are images by their suffix; the names of those go to `images`."""
    for entry in scan:
        name = entry.name
        known = name[name.rfind(".") :].lower() in IMAGE_SUFFIXES and not name.startswith("._")
        if known and entry.is_file(follow_symlinks=False):
            images.append(name)
        else:
            yield entry


def is_helper(folder: str) -> bool:
    """Whether a folder of this name is a program's own: hidden, or of thumbnails, deleted files and the like."""
    return folder.lower() in _HELPERS or (folder.startswith(".") and folder not in (".", ".."))


def helper_notes(helpers: Mapping[str, int]) -> list[str]:
    """A note on images in folders for which `is_helper` holds; `helpers`: how many are in those of each name."""
    found = [f"{short(name)} ({count:,})" for name, count in sorted(helpers.items()) if count]
    if not found:
        return []
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5:,} more" if len(found) > 5 else "")
    return [f"Passed over: files in folders that are hidden or hold thumbnails and the like: {shown}."]


def _known_files(folder: str) -> int:
    """How many images, shards and tables lie below a folder, by their names; links are not followed."""
    return sum(name.lower().endswith(_KNOWN_SUFFIXES) for _, _, files in os.walk(folder) for name in files)


def is_container(name: str) -> bool:
    """Whether a file of this name is a tar shard or a table, which may hold any number of images."""
    return name.lower().endswith((*_TAR_SUFFIXES, *_TABLE_SUFFIXES))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:
        return (-1, -1)
    return status.st_dev, status.st_ino


def _looks_like_image(path: str) -> bool:
    try:
        with Path(path).open("rb") as file:
            return _SIGNATURES.match(file.read(32)) is not None
    except OSError:
        return False


def list_folder(root: Path, files: Files, wanted: str | None = None, flat: bool = False) -> tuple[Listing, list[str]]:
    """Labels from folder names: below what all images share, and below split folders, a folder is a class."""
    if flat and wanted not in (None, *EVERYTHING):
        raise UserError(
            f"{printable(str(root))}: flat takes every image, and split {printable(wanted)!r} would take some: name "
            "one of the two"
        )
    names = files.images
    paths = [tuple(folder.name.split("/")) if folder.name else () for folder in names.folders]
    folders = [Named(path, path, names.folders[number].count, number) for number, path in enumerate(paths)]
    notes: list[str] = []
    split_seen = False
    while folders and not flat:
        tops = {folder.parts[0] for folder in folders if folder.parts}
        chosen = None if split_seen else below_splits(folders, tops, wanted, root)
        if chosen is not None:
            split_seen = True
            folders = chosen[0]
            notes += chosen[1]
        elif len(tops) != 1 or any(len(folder.parts) < 2 for folder in folders):
            break
        folders = [folder.within() for folder in folders]
    if not split_seen and not flat:
        every = folders
        folders, more = within_classes(folders, wanted, root)
        split_seen = len(folders) < len(every)
        notes += more
    if wanted not in (None, *EVERYTHING) and not split_seen:
        raise UserError(f"{printable(str(root))} has no split {printable(wanted)!r}: it has no split folders")
    classes = sorted({folder.parts[0] for folder in folders if folder.parts})
    loose = count_images(folder for folder in folders if not folder.parts)
    if classes and loose and not flat:
        raise UserError(
            f"{printable(str(root))} holds {loose:,} images beside {len(classes):,} folders of images, so it is "
            "neither one folder a class nor a flat folder: move them, or take all images without labels: --flat"
        )
    base = root if root.is_dir() else root.parent
    number = {} if flat else {name: label for label, name in enumerate(classes)}
    labels = [(folder.number, number.get(folder.parts[0], -1) if folder.parts else -1) for folder in folders]
    items = FileItems(base, names, labels)
    listing = Listing(items, [printable(name) for name in classes] if number else None)
    listing.passed_over = files.others + len(files.tars) + len(files.tables)
    if number and wanted is None:
        listing.notes += doubtful_classes(classes)
    if items and not number:
        listing.notes.append("The images have no labels: all of them get label -1.")
    return listing, files.notes() + notes


def labels_from(values: Iterable[int | str | None]) -> tuple[list[int], list[str] | None, list[str]]:
    """(labels, class names or None, notes) from labels as a data set gives them, numbers or words."""
    values = list(values)
    missing = sum(value is None for value in values)
    if missing == len(values):
        return [-1] * len(values), None, ["The images have no labels: all of them get label -1."]
    notes = [f"{missing:,} images have no label and get -1."] if missing else []
    if all(value is None or (isinstance(value, int) and -(2**63) <= value < 2**63) for value in values):
        return [-1 if value is None else int(value) for value in values], None, notes
    names = sorted({str(value) for value in values if value is not None})
    number = {name: label for label, name in enumerate(names)}
    return [-1 if v is None else number[str(v)] for v in values], [printable(n) for n in names], notes
