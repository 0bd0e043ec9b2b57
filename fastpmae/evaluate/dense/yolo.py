"""Boxes as YOLO has them: a text file an image, and perhaps a YAML file that names the classes and the splits."""

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fastpmae.evaluate.dense.boxes import MOST_BOXES, Annotation, LabelledFile
from fastpmae.evaluate.dense.classes import MOST_CLASSES
from fastpmae.evaluate.dense.outlines import MOST_POINTS, Outline
from fastpmae.evaluate.dense.pairs import IMAGES, files_below
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import on_one_line, printable
from fastpmae_loaders.sources.reading import open_file, read_file
from fastpmae_loaders.sources.splits import split_of_folder

_SIZE = 1 << 24  # bytes
SPLITS = ("train", "val", "test")
NAMES = ("classes.txt", "obj.names")
"""What files of the classes' names, one a line, are called, at the top or among the label files."""


def yolo_file(folder: Path) -> Path | None:
    """The YAML file of a folder: data.yaml, or the only one."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".yaml", ".yml"))
    named = [path for path in found if path.stem in ("data", "dataset")]
    return named[0] if named else found[0] if len(found) == 1 else None


def read_yolo(path: Path) -> tuple[dict[str | None, list[LabelledFile]], list[str]]:
    """The splits of a YAML file, and its classes.

    Raises:
        UserError: where it is no such file, its folders are not there, or a line of a label file is no box.
    """
    said = _yaml(path)
    names = _names(said.get("names"), path)
    root = path.parent
    if isinstance(said.get("path"), str) and _is_below(root / said["path"], root):
        root = root / said["path"]
    splits: dict[str | None, list[LabelledFile]] = {}
    for split in SPLITS:
        folders = said.get(split) or (said.get("valid") if split == "val" else None) or []
        named = [folders] if isinstance(folders, str) else folders if isinstance(folders, list) else []
        images = [image for folder in named for image in _images(root, str(folder), path)]
        if images:
            splits[split] = [_labelled(image, names) for image in images]
    if not splits:
        raise UserError(f"{printable(str(path))} names no folder of images under train, val or test")
    return splits, names


def yolo_folders(folder: Path) -> tuple[dict[str | None, list[LabelledFile]], list[str]] | None:
    """The splits of a folder without a YAML file, and its classes; None where no image in it has a text file.

    The images lie in images/ or in its split folders, in images/ of each split folder, or all beside their text files.
    The classes are called by the lines of a classes.txt, or else by their numbers.

    Raises:
        UserError: where a line of a label file is no box, or is of a class that the classes.txt does not name.
    """
    splits = {split: sorted(files_below(place, IMAGES)) for split, place in _image_folders(folder).items()}
    labels = [_label_file(image) for images in splits.values() for image in images]
    if not any(label.is_file() for label in labels):
        return None
    places = dict.fromkeys([folder, folder / "labels", *(label.parent for label in labels)])
    listed = next((place / name for place in places for name in NAMES if (place / name).is_file()), None)
    names = None if listed is None else _lines(listed)
    found = {split: [_labelled(image, names) for image in images] for split, images in splits.items() if images}
    if names is None:
        numbers = [int(each.name) for files in found.values() for file in files for each in file.annotations]
        names = [str(number) for number in range(max(numbers, default=-1) + 1)]
    return found, names


def _image_folders(folder: Path) -> dict[str | None, Path]:
    """The folders of images by split."""
    own = folder / "images"
    if own.is_dir():
        parts = {part.name: part for part in sorted(own.iterdir()) if part.is_dir() and split_of_folder(part.name)}
        return {**parts} or {None: own}
    inside = {part.parent.name: part for part in sorted(folder.glob("*/images")) if split_of_folder(part.parent.name)}
    return {**inside} or {None: folder}


def _lines(path: Path) -> list[str]:
    """The names in a file, one a line."""
    lines = [line.strip() for line in _text(path).rstrip().splitlines()]
    if "" in lines:
        raise UserError(
            f"{printable(str(path))}, line {lines.index('') + 1}: it is empty, and each line is the name of a class"
        )
    return [printable(line) for line in lines[:MOST_CLASSES]]


def _yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise UserError("YAML files are read by PyYAML, which is not installed: pip install pyyaml") from None
    try:
        if path.stat().st_size > _SIZE:
            raise UserError(f"{printable(str(path))} has more than {_SIZE:,} bytes")
        said = yaml.safe_load(read_file(path))
    except OSError as error:
        raise UserError(f"{printable(str(path))} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{printable(str(path))} is no YAML: {on_one_line(str(error), 200)}") from None
    if not isinstance(said, dict):
        raise UserError(f"{printable(str(path))} must hold names, and folders under train and val")
    return said


def _names(said: Any, path: Path) -> list[str]:
    if isinstance(said, dict) and sorted(said, key=str) == sorted(range(len(said)), key=str):
        said = [said[number] for number in range(len(said))]
    if not isinstance(said, list) or not said or not all(isinstance(name, str | int) for name in said):
        raise UserError(f"{printable(str(path))}: `names` must list what the classes 0, 1, ... are called")
    return [printable(str(name)) for name in said]


def _images(root: Path, named: str, path: Path) -> Iterator[Path]:
    """The images of a folder that a YAML file names, which must lie beside that file."""
    plain = named
    while plain.startswith("../"):  # as Roboflow writes it
        plain = plain.removeprefix("../")
    folder = root / plain
    if not _is_below(folder, path.parent):
        raise UserError(f"{printable(str(path))}: its folder {printable(named)} is not in {printable(str(root))}")
    yield from sorted(files_below(folder, IMAGES))


def _is_below(folder: Path, above: Path) -> bool:
    """Whether it is a folder that lies below another by its name; where links lead is the user's own affair."""
    return folder.is_dir() and Path(os.path.normpath(folder)).is_relative_to(os.path.normpath(above))


def _labelled(image: Path, names: list[str] | None) -> LabelledFile:
    labels = _label_file(image)
    found = tuple(_annotations(labels, names)) if labels.is_file() else ()
    return LabelledFile(str(image), partial(open_file, image), found, shares=True)


def _label_file(image: Path) -> Path:
    """The text file of an image: with the last folder called images replaced by labels."""
    parts = list(image.parts)
    places = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    found = Path(*parts).with_suffix(".txt")
    capitals = found.with_suffix(".TXT")
    return capitals if not found.is_file() and capitals.is_file() else found


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _SIZE:
            raise UserError(f"{printable(str(path))} has more than {_SIZE:,} bytes")
        return read_file(path).decode("utf-8-sig", "replace")
    except OSError as error:
        raise UserError(f"{printable(str(path))} cannot be read: {error.strerror or error}") from None


def _annotations(path: Path, names: list[str] | None) -> Iterator[Annotation]:
    """The lines of a text file: class, middle and sides of a box; or class and the corners of a polygon. Without names
    a class is called by its number."""
    classes = MOST_CLASSES if names is None else len(names)
    for number, line in enumerate(_text(path).splitlines()[: MOST_BOXES + 1], 1):
        words = line.split()
        if not words:
            continue
        try:
            values = [float(word[:40]) for word in words]
            fits = len(values) == 5 or (7 <= len(values) < MOST_POINTS and len(values) % 2)
            if not fits or values[0] != int(values[0]):
                raise ValueError
        except (ValueError, OverflowError):
            raise UserError(f"{printable(str(path))}, line {number}: it is no class with a box or a polygon") from None
        if not 0 <= values[0] < classes:
            raise UserError(f"{printable(str(path))}, line {number}: class {int(values[0])} of {classes} from 0 on")
        name = str(int(values[0])) if names is None else names[int(values[0])]
        if len(values) == 5:
            x, y, width, height = values[1:]
            yield Annotation((x - width / 2, y - height / 2, x + width / 2, y + height / 2), name)
        else:
            across, down = values[1::2], values[2::2]
            sound = all(map(math.isfinite, values)) and max(map(abs, values[1:])) <= 10
            outline = Outline(polygons=(tuple(values[1:]),)) if sound else None
            yield Annotation((min(across), min(down), max(across), max(down)), name, outline=outline)
