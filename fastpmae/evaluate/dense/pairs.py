"""Folders of images and masks: which files belong together, of which split, and what their numbers mean by default."""

import os
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fastpmae.evaluate.dense.classes import ADE20K, VOC
from fastpmae.evaluate.dense.masks import Pair
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import on_one_line, printable
from fastpmae_loaders.sources.reading import open_file, read_file
from fastpmae_loaders.sources.splits import split_of_folder

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".avif", ".gif", ".jp2", ".heic")
MASKS = (".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm", ".ppm", ".jpg", ".jpeg", ".webp")
MASK_FOLDERS = ("masks", "annotations", "labels")
"""Beside a folder `images`; as it is written, or with a capital."""
_LISTED = 1 << 26  # bytes of a list of names


@dataclass
class Pairs:
    """The pairs below a folder, by split; `None` where there are no splits.

    Attributes:
        kind: folders, ade20k, cityscapes, voc or parquet, which says what the numbers mean by default.
        names: of the classes, where the folder says them; by their numbers in the masks, or colours (`#804000`).
    """

    kind: str
    splits: dict[str | None, list[Pair]]
    notes: list[str] = field(default_factory=list)
    names: list[tuple[str, str | None]] = field(default_factory=list)


def pairs_in(folder: Path) -> Pairs | None:
    """The images with masks that lie below a folder; None where it is none of the layouts that are known.

    Raises:
        UserError: where it is one and nothing in it fits together.
    """
    there = {name.lower(): folder / name for name in _folders(folder)}
    if "leftimg8bit" in there and "gtfine" in there:
        return _cityscapes(there["leftimg8bit"], there["gtfine"])
    if "jpegimages" in there and "segmentationclass" in there:
        return _voc(folder, there)
    masks = next((there[name] for name in MASK_FOLDERS if name in there), None)
    if "images" in there and masks is not None:
        known = {name: _split_of(name, _folders(masks)) for name in _folders(there["images"]) if split_of_folder(name)}
        if any(known.values()):
            found = Pairs("folders", {})
            for name, own in known.items():
                if own is None:
                    left_out = printable(str(there["images"] / name))
                    found.notes.append(f"warning: {left_out} has no masks: it is left out")
                else:
                    found.splits[name] = _matched(there["images"] / name, masks / own, found.notes)
        else:
            found = Pairs("folders", {})
            found.splits[None] = _matched(there["images"], masks, found.notes)
        return _ade20k(folder, found)
    inside = {name: path for name, path in there.items() if split_of_folder(name)}
    parts = {path.name: part for path in inside.values() if (part := pairs_in_split(path)) is not None}
    if not parts:
        return None
    notes = [note for part in parts.values() for note in part.notes]
    return Pairs("folders", {name: part.splits[None] for name, part in sorted(parts.items())}, notes)


def _split_of(name: str, others: Sequence[str]) -> str | None:
    """The folder of the same split among others: of one name, or val beside validation."""
    alike = (other for other in others if _canonical(other) == _canonical(name))
    return name if name in others else next(alike, None)


def _canonical(name: str) -> str | None:
    word = split_of_folder(name)
    return "val" if word in ("valid", "validation") else word


def pairs_in_split(folder: Path) -> Pairs | None:
    """The pairs of a split's folder, which has a folder of images and one of masks in it."""
    there = {name.lower(): folder / name for name in _folders(folder)}
    masks = next((there[name] for name in MASK_FOLDERS if name in there), None)
    if "images" not in there or masks is None or not _files(masks, MASKS):
        return None
    found = Pairs("folders", {})
    found.splits[None] = _matched(there["images"], masks, found.notes)
    return found


def _folders(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UserError(f"{printable(str(folder))} cannot be read: {error.strerror or error}") from None


def visible(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """The files in a folder with one of these ends, in capitals or not, hidden ones left out; none where it is none."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in endings and not path.name.startswith("."))


def files_below(folder: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    """The files below a folder with one of these ends, hidden ones and those in hidden folders left out."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(endings) and not name.startswith("."):
                yield Path(where, name)


def _files(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """The same by their names without the end, below the folder."""
    found: dict[str, Path] = {}
    for path in files_below(folder, endings):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise UserError(f"{printable(str(path))} and {printable(found[stem].name)} have one name")
        found[stem] = path
    return found


def _pair(image: Path, mask: Path) -> Pair:
    return Pair(str(image), str(mask), partial(open_file, image), partial(read_file, mask))


def _matched(images: Path, masks: Path, notes: list[str]) -> list[Pair]:
    """Images and masks of one name, or of one with the end that most images have a mask with, as 0001TP_006690_L.png
    in CamVid."""
    pictures, found = _files(images, IMAGES), _files(masks, MASKS)
    if not pictures or not found:
        raise UserError(f"{printable(str(masks if pictures else images))} holds no images")
    if not pictures.keys() & found.keys():
        ends = Counter(name[place:] for name in found for place in range(len(name)) if name[:place] in pictures)
        end = min(ends, key=lambda end: (-ends[end], len(end)), default="")
        if 2 * ends[end] > len(pictures):  # of fewer it is chance
            found = {name.removesuffix(end): path for name, path in found.items() if name.endswith(end)}
    both = sorted(pictures.keys() & found.keys())
    if not both:
        raise UserError(
            f"{printable(str(masks))} holds no mask of the name of an image in {printable(str(images))}, such as "
            f"{printable(next(iter(pictures)))}.png"
        )
    for files, others, word in ((pictures, found, "without a mask"), (found, pictures, "that are no image's mask")):
        if lonely := sorted(files.keys() - others.keys()):
            first = printable(str(files[lonely[0]]))
            notes.append(f"warning: {len(lonely):,} files {word} are left out (the first: {first})")
    return [_pair(pictures[name], found[name]) for name in both]


def _ade20k(folder: Path, found: Pairs) -> Pairs:
    """ADE20K's scene parsing, told by its file of objects or by how its images are called: 0 is void, then 150."""
    firsts = [Path(pairs[0].image_name).name for pairs in found.splits.values()]
    table = folder / "objectInfo150.txt"
    if not (table.is_file() or all(name.startswith(("ADE_train_", "ADE_val_")) for name in firsts)):
        return found
    found.kind = "ade20k"
    names = [str(number + 1) for number in range(ADE20K)]
    if table.is_file():
        rows = [line.split("\t") for line in _lines(table)[1:]]
        for row in rows:
            if len(row) == 6 and row[0].strip().isdecimal() and 1 <= int(row[0]) <= ADE20K:
                names[int(row[0]) - 1] = printable(row[5].split(",")[0].strip()) or row[0]
    found.names = [(str(place + 1), name) for place, name in enumerate(names)]
    return found


def _cityscapes(images: Path, masks: Path) -> Pairs:
    found = Pairs("cityscapes", {})
    for split in _folders(images):
        if split not in _folders(masks) or not split_of_folder(split):
            continue
        numbers = _files(masks / split, ("_labelids.png",))
        pictures = _files(images / split, ("_leftimg8bit.png", "_leftimg8bit.jpg", "_leftimg8bit.jpeg"))
        named = {name.removesuffix("_labelIds").removesuffix("_gtFine"): path for name, path in numbers.items()}
        seen = {name.removesuffix("_leftImg8bit"): path for name, path in pictures.items()}
        both = sorted(named.keys() & seen.keys())
        if len(both) < len(seen):
            found.notes.append(f"warning: {len(seen) - len(both):,} images of {printable(split)} without a mask")
        if both:
            found.splits[split] = [_pair(seen[name], named[name]) for name in both]
    if not found.splits:
        raise UserError(f"{printable(str(masks))} holds no *_gtFine_labelIds.png of an image in {images.name}")
    return found


def _voc(folder: Path, there: dict[str, Path]) -> Pairs:
    found = Pairs("voc", {})
    pictures, masks = _files(there["jpegimages"], IMAGES), _files(there["segmentationclass"], MASKS)
    found.splits = listed_splits(
        folder / "ImageSets" / "Segmentation",
        pictures,
        lambda name: _pair(pictures[name], masks[name]) if name in pictures and name in masks else None,
    )
    if not found.splits:
        found.splits = {None: _matched(there["jpegimages"], there["segmentationclass"], found.notes)}
    table = folder / "labelmap.txt"
    if table.is_file():  # CVAT's: label:red,green,blue:parts:actions, whose masks are in colours
        rows = [line.split(":") for line in _lines(table) if line and not line.startswith("#")]
        found.names = [(row[1], row[0]) for row in rows if len(row) >= 2 and row[0]]
    else:
        found.names = [(str(place), name) for place, name in enumerate(VOC)]
    return found


def listed_splits(
    folder: Path, known: Container[str], of: Callable[[str], Pair | None]
) -> dict[str | None, list[Pair]]:  # fmt: skip
    """The pairs that VOC's lists of names (train.txt, val.txt, ...) hold. UserError for a name without files."""
    found: dict[str | None, list[Pair]] = {}
    for path in visible(folder, (".txt",)):
        pairs = []
        for name in names_listed(path, known):
            pair = of(name)
            if pair is None:
                raise UserError(f"{printable(str(path))} names {printable(name)}, whose image or mask is not there")
            pairs.append(pair)
        if pairs:
            found[path.stem] = pairs
    return found


def names_listed(path: Path, known: Container[str]) -> list[str]:
    """The names in a list, each once: each line's, or its first word, behind which lists of one class have a number.

    Args:
        known: names that there are, which may have spaces in them.
    """
    lines = [line.strip() for line in _lines(path)]
    return list(dict.fromkeys(line if line in known else line.split()[0] for line in lines if line))


def _lines(path: Path) -> list[str]:
    """The lines of a text file. UserError where it is none, or very large."""
    try:
        if path.stat().st_size > _LISTED:
            raise UserError(f"{printable(str(path))} has more than {_LISTED:,} bytes, which no list of names has")
        return read_file(path).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{printable(str(path))} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(str(path))} is no text in UTF-8: {on_one_line(str(error), 100)}") from None
