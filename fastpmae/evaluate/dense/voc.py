"""Boxes as Pascal VOC has them: an XML file an image, and lists of names for the splits."""

import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

from fastpmae.evaluate.dense.boxes import Annotation, LabelledFile
from fastpmae.evaluate.dense.pairs import IMAGES, names_listed, visible
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import on_one_line, printable, short
from fastpmae_loaders.sources.reading import open_file, read_file

_SIZE = 1 << 24  # bytes
_LISTS = ("ImageSets", "Main")


def voc_splits(
    folder: Path, only: Path | None = None, notes: list[str] | None = None
) -> dict[str | None, list[LabelledFile]] | None:
    """The images of a folder with JPEGImages and Annotations in it, or with XML files beside the images; by split.

    None where it is neither.

    Args:
        only: the list of names to take, instead of all that lie in ImageSets/Main.
        notes: gets a sentence where images are left out.

    Raises:
        UserError: for files that are not sound, or that belong to no image.
    """
    annotations, images = folder / "Annotations", folder / "JPEGImages"
    if not (annotations.is_dir() and images.is_dir()):
        annotations = images = folder
    files = {path.stem: path for path in visible(annotations, (".xml",))}
    if images == folder and not files:
        return None
    pictures = {path.stem: path for path in visible(images, IMAGES)}
    known: dict[str, LabelledFile] = {}  # an image may stand in several lists

    def labelled(name: str, where: Path) -> LabelledFile:
        if name not in pictures or name not in files:
            raise UserError(f"{printable(str(where))} names {short(name)}, whose image or XML file is not there")
        if name not in known:
            known[name] = read_voc(files[name], pictures[name])
        return known[name]

    if only is not None:
        return {None: [labelled(name, only) for name in names_listed(only, pictures)]}
    lists = [path for path in visible(folder.joinpath(*_LISTS), (".txt",)) if "_" not in path.stem]
    found: dict[str | None, list[LabelledFile]] = {}
    for path in lists:
        found[path.stem] = [labelled(name, path) for name in names_listed(path, pictures)]
    found = {split: named for split, named in found.items() if named}
    if not found and (lonely := sorted(pictures.keys() - files.keys())) and notes is not None:
        first = printable(str(pictures[lonely[0]]))
        notes.append(f"warning: {len(lonely):,} images without an XML file are left out (the first: {first})")
    return found or {None: [labelled(name, annotations) for name in files]}


def read_voc(path: Path, image: Path) -> LabelledFile:
    """One XML file. Its pixels are counted from 1, and a box's last one belongs to it: 1 1 10 10 is 0 0 10 10 here.

    Objects that it calls difficult are taken for crowds: neither training nor figures count them.

    Raises:
        UserError: where it is no such file.
    """
    try:
        if path.stat().st_size > _SIZE:
            raise ValueError(f"it has more than {_SIZE:,} bytes")
        data = read_file(path)
        if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
            raise ValueError("it declares entities, which no such file needs")
        root = ElementTree.fromstring(data)
        found = []
        for each in root.iter("object"):
            corners = each.find("bndbox")
            if corners is None:
                raise ValueError("an object in it has no bndbox")
            left, top, right, bottom = (_number(corners, side) for side in ("xmin", "ymin", "xmax", "ymax"))
            crowd = (each.findtext("difficult") or "0").strip() == "1"
            # a box without extent stays one, so that it is left out and said
            empty = right <= left or bottom <= top
            box = (left, top, right, bottom) if empty else (left - 1, top - 1, right, bottom)
            found.append(Annotation(box, _name(each), crowd))
        size = root.find("size")
        sides = (0, 0) if size is None else (int(_number(size, "width")), int(_number(size, "height")))
    except OSError as error:
        raise UserError(f"{printable(str(path))} cannot be read: {error.strerror or error}") from None
    except (ValueError, OverflowError, UserError, ElementTree.ParseError) as error:
        raise UserError(f"{printable(str(path))} is no XML of Pascal VOC: {on_one_line(str(error), 200)}") from None
    return LabelledFile(str(image), partial(open_file, image), tuple(found), sides if min(sides) > 0 else None)


def _name(each: ElementTree.Element) -> str:
    name = printable((each.findtext("name") or "").strip())
    if not 0 < len(name) <= 200:
        raise ValueError("an object in it has no name")
    return name


def _number(of: ElementTree.Element, name: str) -> float:
    text = of.findtext(name)
    if text is None:
        raise ValueError(f"it has no {name}")
    return float(text[:50])
