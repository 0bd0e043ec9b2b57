"""Boxes and masks as COCO has them: one JSON file for all images of a split."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from fastpmae.evaluate.dense.boxes import Annotation, LabelledFile
from fastpmae.evaluate.dense.outlines import coco_outline
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import on_one_line, printable, short
from fastpmae_loaders.sources.reading import open_below, read_file
from fastpmae_loaders.sources.splits import split_of_folder

Split = tuple[list[LabelledFile], list[str]]


def coco_files(folder: Path) -> dict[str | None, Path] | None:
    """The JSON files of a folder by split: annotations/instances_train2017.json, or train/_annotations.coco.json.

    None where there are none.
    """
    inside = [path for path in sorted((folder / "annotations").glob("[!.]*.json")) if path.is_file()]
    if inside:
        boxes = [path for path in inside if path.stem.startswith("instances")] or inside
        named = {_split_of(path.stem): path for path in boxes}
        return {None: boxes[0]} if named.keys() == {None} and len(boxes) == 1 else _named(named)
    beside = sorted(folder.glob("[!.]*/_annotations.coco.json"))
    if beside:
        return {path.parent.name: path for path in beside}
    own = [path for path in sorted(folder.glob("[!.]*.json")) if path.stem.startswith(("_annotations", "instances"))]
    return {None: own[0]} if len(own) == 1 else None


def _named(found: dict[str | None, Path]) -> dict[str | None, Path] | None:
    return {name: path for name, path in found.items() if name is not None} or None


def _split_of(stem: str) -> str | None:
    rest = stem.removeprefix("instances").strip("_-")
    return rest if split_of_folder(rest) else None


def read_coco(path: Path) -> Split:
    """The images of a JSON file, those without boxes too, and what its categories are called, by their numbers.

    Raises:
        UserError: where it is no such file, or its images are not found.
    """
    where = printable(str(path))
    try:
        said = json.loads(read_file(path))
        images, annotations, categories = (said[part] for part in ("images", "annotations", "categories"))
        if not all(isinstance(part, list) for part in (images, annotations, categories)):
            raise TypeError("images, annotations and categories must be lists")
        if not all(isinstance(each["name"], str) for each in categories):
            raise TypeError("a category has no name")
        names = {_id(each["id"]): printable(each["name"]) for each in categories}
        files = {_id(each["id"]): str(each["file_name"]) for each in images}
        sizes = {_id(each["id"]): (int(each.get("width") or 0), int(each.get("height") or 0)) for each in images}
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from None
    except KeyError as error:
        raise UserError(f"{where} is no JSON of COCO: something in it has no {error}") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{where} is no JSON of COCO: {on_one_line(str(error), 200)}") from None
    if not files or not names:
        raise UserError(f"{where} lists no {'images' if names else 'categories'}")
    if len(files) < len(images) or len(names) < len(categories):
        raise UserError(f"{where} gives two {'images' if len(files) < len(images) else 'categories'} one id")
    found: dict[int | str, list[Annotation]] = {number: [] for number in files}
    for place, each in enumerate(annotations):
        try:
            annotation = _annotation(each, names)
            found[_id(each["image_id"])].append(annotation)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, UserError) as error:
            told = f"lacks {error}, or names an image that is not there" if isinstance(error, KeyError) else str(error)
            number = each.get("id") if isinstance(each, dict) else None
            raise UserError(f"{where}: annotation {place} (id {short(str(number))}) {on_one_line(told, 200)}") from None
    root = _root(path, next(iter(files.values())))
    return [
        LabelledFile(
            str(root / files[number]),
            partial(open_below, root, files[number]),
            tuple(found[number]),
            sizes[number] if min(sizes[number]) > 0 else None,
        )
        for number in sorted(files, key=lambda number: files[number])
    ], [names[number] for number in sorted(names, key=lambda number: (isinstance(number, str), number))]


def _id(number: Any) -> int | str:
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise TypeError(f"an id is {short(repr(number))}")
    return number


def _annotation(each: dict[str, Any], names: dict[int | str, str]) -> Annotation:
    category = _id(each["category_id"])
    if category not in names:
        raise UserError(f"is of the category {short(str(category))}, which is none of the {len(names)} in the file")
    left, top, width, height = map(float, each["bbox"])
    area = each.get("area")
    return Annotation(
        (left, top, left + width, top + height),
        names[category],
        bool(each.get("iscrowd", 0)),
        coco_outline(each.get("segmentation")),
        float(area) if isinstance(area, int | float) and math.isfinite(area) else None,
    )


def _root(path: Path, first: str) -> Path:
    """The folder that the names of images start from."""
    stem = path.stem.removeprefix("instances").strip("_-")
    parent, above = path.parent, path.parent.parent
    folders = [parent, parent / "images", above / stem, above / "images" / stem, above / "images", above]
    for folder in folders:
        try:
            if (folder / first).is_file():
                return folder
        except (OSError, ValueError):
            break
    looked = ", ".join(printable(str(folder)) for folder in folders)
    raise UserError(f"{printable(str(path))}: its image {short(first)} is in none of {looked}")
