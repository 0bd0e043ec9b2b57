"""What a folder or a tar shard holds: its images in the order of their names, with labels from folders or files.

Nothing is decoded here. A source is listed in full, in an order that depends on names alone, so that the same
source is always the same samples.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from .errors import UserError
from .printable import printable

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
_TABLE_SUFFIXES = (".parquet", ".arrow")
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|....ftypavif"
    rb"|....ftyp(?:hei[cxms]|hev[cxms]|heif|mif1|msf1)|\0\0\0\x0cjP  |\0\0\0\x0cJXL ",
    re.DOTALL,
)
_TRAIN = ("train", "training")
_SPLITS = (*_TRAIN, "val", "valid", "validation", "dev", "test", "testing", "eval", "unlabeled", "unlabelled")
_SPLIT_WORD = re.compile(rf"(?<![a-z0-9])({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?![a-z0-9])")


class Item(NamedTuple):
    """One image of a source: in a file, at `where` within it; label −1 where it has none of several classes.

    kind: "file"; "tar" with where = (offset, size); "parquet" with (row group, row, column); "arrow" with
    (row, column); "bad", with the reason in `where`: found to be unusable while listing.
    """

    kind: str
    path: str
    where: tuple
    label: int

    @property
    def name(self) -> str:
        """How the image is called in messages; always printable."""
        inner = {"tar": lambda: f" ({self.where[2]})", "parquet": lambda: f" (row {self.where[3]})"}
        suffix = inner[self.kind]() if self.kind in inner else ""
        if self.kind == "arrow":
            suffix = f" (row {self.where[0]})"
        return printable(self.path + suffix)


@dataclass
class Listing:
    """What a source holds. `notes` are sentences for the user about how it was understood."""

    items: list[Item]
    class_names: list[str] | None = None
    passed_over: int = 0
    notes: list[str] = field(default_factory=list)


class Files:
    """Every file below a path, by what it is; names relative to the path, in the order of their names."""

    def __init__(self, root: Path):
        self.images: list[str] = []
        self.tars: list[str] = []
        self.tables: list[str] = []
        self.others = 0
        self.packed: list[str] = []
        self.bad: list[Item] = []
        if root.is_dir():
            self._walk(str(root))
        elif root.is_file():
            self._add("", root.name, str(root))
        else:
            raise UserError(f"{printable(str(root))} is neither a file nor a folder")

    def _walk(self, root: str) -> None:
        linked: set[tuple[int, int]] = set()
        pending = [("", _identity(root), ())]
        while pending:
            folder, identity, above = pending.pop()
            above = (*above, identity)
            try:
                with os.scandir(f"{root}/{folder}") as scan:
                    entries = sorted(scan, key=lambda entry: entry.name)
            except OSError as error:
                if not folder:
                    raise UserError(f"{printable(root)} cannot be read: {error.strerror}") from None
                self._unusable(f"{root}/{folder}", f"the folder cannot be read: {error.strerror}")
                continue
            below = []
            for entry in entries:
                relative = f"{folder}/{entry.name}" if folder else entry.name
                if not _is_folder(entry):
                    self._add(folder, entry.name, entry.path, entry)
                    continue
                identity = _identity(entry.path)
                if entry.is_symlink():
                    # a link upwards would never end, and links across could fan out without limit
                    if identity in above or identity in linked:
                        self.others += 1
                        continue
                    linked.add(identity)
                below.append((relative, identity, above))
            pending += reversed(below)

    def _add(self, folder: str, name: str, path: str, entry: os.DirEntry | None = None) -> None:
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
        elif known or (suffix not in _OTHER_SUFFIXES and not _is_container(suffix) and _looks_like_image(path)):
            self.images.append(relative)
        elif suffix in _TAR_SUFFIXES:
            self.tars.append(relative)
        elif suffix in _TABLE_SUFFIXES:
            self.tables.append(relative)
        else:
            self.others += 1
            if name.lower().endswith(_PACKED_SUFFIXES):
                self.packed.append(relative)

    def _unusable(self, path: str, reason: str) -> None:
        self.bad.append(Item("bad", path, (reason,), -1))


def _is_container(suffix: str) -> bool:
    return suffix in _TAR_SUFFIXES or suffix in _TABLE_SUFFIXES


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


Entry = TypeVar("Entry")


def choose_split(
    entries: Sequence[Entry], split_of: Callable[[Entry], str | None], wanted: str | None, root: Path
) -> tuple[list[Entry], list[str]]:
    """The entries of the split that is wanted, and a note; train where none is named and there are several."""
    splits: dict[str | None, list[Entry]] = {}
    for entry in entries:
        splits.setdefault(split_of(entry), []).append(entry)
    names = sorted(name for name in splits if name is not None)
    if wanted == "all" or (wanted is None and (not names or len(splits) == 1)):
        return list(entries), []
    if wanted is None:
        train = [name for name in names if name in _TRAIN]
        if len(train) != 1 or None in splits:
            if None in splits:  # words like "test" in some names mean nothing then
                return list(entries), []
            raise UserError(
                f"{printable(str(root))} has the splits {', '.join(names)}: choose with --split NAME (or all)"
            )
        left = ", ".join(f"{name} ({len(splits[name]):,} files)" for name in names if name not in train)
        return splits[train[0]], [f"Taking the split {train[0]}; not taken: {left}. --split chooses another."]
    if wanted not in splits:
        what = f"it has {', '.join(names)}" if names else "it has no splits"
        raise UserError(f"{printable(str(root))} has no split {wanted!r}: {what}")
    return splits[wanted], []


def split_word(relative: str) -> str | None:
    """The split that a shard's name or one of its folders names."""
    words = _SPLIT_WORD.findall(relative.lower())
    return words[0] if words else None


def list_folder(root: Path, files: Files, wanted: str | None = None, flat: bool = False) -> tuple[Listing, list[str]]:
    """Labels from folder names: below what all images share, and below split folders, a folder is a class."""
    images = [(relative, tuple(relative.split("/"))) for relative in files.images]
    notes: list[str] = []
    split_seen = False
    while images and not flat:
        tops = {parts[0] for _, parts in images if len(parts) > 1}
        if any(len(parts) == 1 for _, parts in images):
            break
        if {top.lower() for top in tops} <= set(_SPLITS) and not split_seen:
            split_seen = True
            images, note = choose_split(images, lambda image: image[1][0].lower(), wanted, root)
            notes += note
        elif len(tops) > 1 or any(len(parts) == 2 for _, parts in images):
            break
        images = [(relative, parts[1:]) for relative, parts in images]
    if wanted not in (None, "all") and not split_seen:
        raise UserError(f"{printable(str(root))} has no split {wanted!r}: it has no split folders")
    classes = sorted({parts[0] for _, parts in images if len(parts) > 1})
    loose = sum(len(parts) == 1 for _, parts in images)
    if classes and loose and not flat:
        raise UserError(
            f"{printable(str(root))} holds {loose:,} images beside {len(classes):,} folders of images, so it is "
            "neither one folder a class nor a flat folder: move them, or take all images without labels: --flat"
        )
    base = root if root.is_dir() else root.parent
    number = {} if flat else {name: label for label, name in enumerate(classes)}
    items = [
        Item("file", f"{base}/{relative}", (), number.get(parts[0], -1) if len(parts) > 1 else -1)
        for relative, parts in images
    ]
    listing = Listing(items, [printable(name) for name in classes] if number else None)
    listing.passed_over = files.others + len(files.tars) + len(files.tables)
    if items and not number:
        listing.notes.append("The images have no labels: all of them get label −1.")
    return listing, notes


def labels_from(values: Iterable[int | str | None]) -> tuple[list[int], list[str] | None, list[str]]:
    """(labels, class names or None, notes) from labels as a data set gives them, numbers or words."""
    values = list(values)
    missing = sum(value is None for value in values)
    if missing == len(values):
        return [-1] * len(values), None, ["The images have no labels: all of them get label −1."]
    notes = [f"{missing:,} images have no label and get −1."] if missing else []
    if all(value is None or (isinstance(value, int) and -(2**63) <= value < 2**63) for value in values):
        return [-1 if value is None else int(value) for value in values], None, notes
    names = sorted({str(value) for value in values if value is not None})
    number = {name: label for label, name in enumerate(names)}
    return [-1 if v is None else number[str(v)] for v in values], [printable(n) for n in names], notes
