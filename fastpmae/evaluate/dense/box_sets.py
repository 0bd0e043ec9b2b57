"""Opening images with boxes: Pascal VOC, COCO or YOLO, which split of it, and what is checked first."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from fastpmae.evaluate.dense.boxes import LabelledFile, notes_of, place
from fastpmae.evaluate.dense.classes import numbered, read_classes
from fastpmae.evaluate.dense.coco import coco_files, read_coco
from fastpmae.evaluate.dense.labelled import Boxed, Detection
from fastpmae.evaluate.dense.sets import over_all, split_names, tested_split
from fastpmae.evaluate.dense.voc import voc_splits
from fastpmae.evaluate.dense.yolo import read_yolo, yolo_file, yolo_folders
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.values import checked

Masks = Literal["auto", "on", "off"]

LAYOUTS = (
    "JPEGImages/ beside Annotations/ (Pascal VOC), annotations/*.json or */_annotations.coco.json (COCO), or a "
    "data.yaml, or images/ beside labels/ with a text file an image (YOLO)"
)


@dataclass(frozen=True)
class _Opened:
    """The images of one split, the classes in the order that their files have them in, and what to know of both."""

    path: Path
    files: list[LabelledFile]
    names: list[str]
    notes: tuple[str, ...] = ()


@checked
def open_detection(
    train: Path,
    val: Path | None = None,
    classes: Path | None = None,
    masks: Masks = "auto",
    threads: int = 0,
) -> tuple[Detection, Detection | None]:
    """The images with boxes to learn from and those to test on, of the same classes.

    Where `val` is None and `train` has a training and a validation split, those are taken. A file names one split: a
    JSON of COCO, or a list of Pascal VOC (ImageSets/Main/trainval.txt). Boxes that cannot be used are left out, and
    the notes say how many.

    Args:
        classes: the file of `--classes`, of names in the label files; without it all names are classes.
        masks: whether the masks of the boxes are read; "auto" does where every box to train on has one.
        threads: that look at the files; 0 takes all cores.

    Raises:
        UserError: for what is of no known layout, files that are not sound, objects of a class that is not known, and
            masks that are asked for and not there.
    """
    first, second = _opened(train, val)
    if classes is not None:
        names, places = numbered(read_classes(classes))
        labels = {key: number + 1 for key, number in places.items()}  # what is ignored becomes 0
        used = {annotation.name for file in first.files for annotation in file.annotations}
        if not used & labels.keys() and used <= set(names):  # a list of the names in the files
            labels = {name: number + 1 for number, name in enumerate(names)}
    else:
        names = tuple(dict.fromkeys(first.names))
        labels = {name: number + 1 for number, name in enumerate(names)}
    unnamed = ["classes are called by their numbers: a classes.txt beside the label files, or --classes, names them"]
    there = [annotation.outline is not None for file in first.files for annotation in file.annotations]
    if masks == "on" and not (there and all(there)):
        raise UserError(
            f"--masks on: of the {len(there):,} boxes of {printable(str(train))} {there.count(False):,} have no mask"
        )
    outlines = masks != "off" and bool(there) and all(there)
    partly = []
    if masks == "auto" and any(there) and not all(there):
        partly = [f"warning: {there.count(False):,} of {len(there):,} boxes have no mask: boxes alone are learnt"]
    sets = []
    for opened in (first, second):
        if opened is None:
            continue
        whole = outlines and all(a.outline is not None for file in opened.files for a in file.annotations)
        if outlines and not whole:
            raise UserError(f"{printable(str(opened.path))} has boxes without a mask: --masks off leaves masks out")
        placed = over_all(partial(place, labels=labels, outlines=outlines), opened.files, threads)
        entries = tuple(entry for entry, _ in placed)
        notes = notes_of([left_out for _, left_out in placed])
        told = unnamed if names == tuple(map(str, range(len(names)))) else []
        told = [*opened.notes, *told, *(partly if opened is first else [])]
        sets.append(Detection(opened.path, names, entries, outlines, (*told, *notes, *_notes(entries))))
    for part, purpose in zip(sets, ("train on", "test on"), strict=False):
        if not any((~entry.objects.crowd).any() for entry in part.entries):
            why = "".join(f"; {note.removeprefix('warning: ')}" for note in part.notes if note not in unnamed)
            where = printable(str(part.path))
            raise UserError(f"{where}: none of its {len(part):,} images has a box to {purpose}{why}")
    return sets[0], sets[1] if len(sets) > 1 else None


def _notes(entries: tuple[Boxed, ...]) -> list[str]:
    empty = sum(len(entry.objects) == 0 for entry in entries)
    crowds = Counter(bool(crowd) for entry in entries for crowd in entry.objects.crowd)[True]
    notes = [f"{empty:,} of {len(entries):,} images have no box: there is nothing to find in them"] if empty else []
    return notes + ([f"{crowds:,} boxes are crowds or difficult: not trained on, not counted"] if crowds else [])


def _opened(train: Path, val: Path | None) -> tuple[_Opened, _Opened | None]:
    notes: list[str] = []
    splits, names = _splits(train, notes)
    own, other = split_names(splits, train, val is None)
    first = _Opened(train, *_files(splits[own], names), tuple(notes))
    if val is None:
        return first, None if other == "" else _Opened(train, *_files(splits[other], names))
    notes = []
    others, other_names = _splits(val, notes)
    return first, _Opened(val, *_files(others[tested_split(others, val)], other_names), tuple(notes))


def _files(split: list[LabelledFile] | Path, names: list[str] | None) -> tuple[list[LabelledFile], list[str]]:
    """The images of a split, read now where they are a JSON file, and its classes."""
    if isinstance(split, Path):
        return read_coco(split)
    if names is None:
        names = sorted({annotation.name for file in split for annotation in file.annotations})
    return split, names


Splits = dict[str | None, list[LabelledFile]] | dict[str | None, Path]


def _splits(path: Path, notes: list[str]) -> tuple[Splits, list[str] | None]:
    """What lies at a path, by split; the names of the classes where a file lists them. Adds what to know of it."""
    if not path.exists():
        raise UserError(f"{printable(str(path))} does not exist")
    if path.is_file():
        return _of_file(path)
    if found := coco_files(path):
        return found, None
    if described := yolo_file(path):
        return read_yolo(described)
    if listed := voc_splits(path, notes=notes):
        return listed, None
    if written := yolo_folders(path):
        return written
    raise UserError(f"{printable(str(path))} holds no images with boxes: {LAYOUTS}")


def _of_file(path: Path) -> tuple[Splits, list[str] | None]:
    match path.suffix.lower():
        case ".json":
            return {None: path}, None
        case ".yaml" | ".yml":
            return read_yolo(path)
        case ".txt":
            # by its name first: images are called as the user calls them, where a link leads elsewhere
            for named in (path.absolute(), path.resolve()):
                root = named.parents[2] if len(named.parents) > 2 else path.parent
                if (listed := voc_splits(root, path)) is not None:
                    return listed, None
    raise UserError(f"{short(str(path))} is no JSON of COCO, YAML of YOLO or list of Pascal VOC: {LAYOUTS}")
