"""Which numbers, colours or names in label files are which class: by the file of `--classes` or by custom."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from fastpmae.evaluate.dense.labelled import IGNORE
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import on_one_line, printable, short
from fastpmae_loaders.sources.reading import read_file

MOST_CLASSES = 10_000
MOST_ID = 2**24 - 1
"""Of a mask's numbers, and of a colour that is written as one."""
VOID = 255
"""What most masks write for pixels of no class."""
VOID_16 = 65535
"""The same of masks of 16 bits."""
_COLOUR = re.compile(r"#([0-9a-fA-F]{6})|(\d{1,3})[ ,]+(\d{1,3})[ ,]+(\d{1,3})", re.ASCII)
_SIZE = 1 << 24

VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
CITYSCAPES_IDS = range(34)
"""All that a `labelIds` file may hold; those that are no class above are void. -1, a licence plate, comes as 255."""
ADE20K = 150

Said = tuple[tuple[str, str | None], ...]
"""A number, a colour or a name in the label files, and the class that it is; None is to be ignored."""


@dataclass(frozen=True)
class MaskClasses:
    """What the numbers or the colours of masks mean.

    Attributes:
        names: of the classes 0, 1, ...
        places: number in the masks (of a colour: red · 65536 + green · 256 + blue) -> class, or IGNORE.
        coloured: whether they are colours.
    """

    names: tuple[str, ...]
    places: dict[int, int]
    coloured: bool = False

    def apply(self, ids: Int[np.ndarray, "height width"]) -> Int[np.ndarray, "height width"]:
        """A mask's numbers as classes, in int16.

        Raises:
            UserError: for a number that is no class.
        """
        keys = np.array(sorted(self.places), np.int64)
        values = np.array([self.places[key] for key in keys.tolist()], np.int16)
        place = np.searchsorted(keys, ids).clip(max=len(keys) - 1)
        strange = keys[place] != ids
        if strange.any():
            raise UserError(self.unknown([int(ids[strange].min())]))
        return values[place]

    def unknown(self, ids: Iterable[int]) -> str:
        """The end of a sentence about a mask that holds these."""
        shown = self.shown(min(ids))
        ignored = "" if self.coloured else f", or --ignore {shown} leaves it out"
        return f"holds {shown}, which is none of the {len(self.names)} classes: --classes FILE says what it is{ignored}"

    def shown(self, number: int) -> str:
        """A number as masks are spoken of."""
        return f"the colour #{number:06x}" if self.coloured else str(number)


def read_classes(path: Path) -> Said:
    """The file of `--classes`: JSON, an object of number, colour ("#804000" or "128 64 0") or name in the label files
    -> name of the class, or a list of names for 0, 1, ...

    Those with the same name are one class; null is ignored. The classes have the order of the file.

    Raises:
        UserError: when it cannot be read or says nothing of that kind.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise UserError(f"{printable(str(path))} names {short(min(twice))!r} twice")
        return dict(pairs)

    try:
        if path.stat().st_size > _SIZE:
            raise UserError(f"{printable(str(path))}: a file of classes has no more than {_SIZE:,} bytes")
        said = json.loads(read_file(path), object_pairs_hook=once)
    except OSError as error:
        raise UserError(f"{printable(str(path))} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{printable(str(path))} is no JSON: {on_one_line(str(error), 200)}") from None
    if isinstance(said, list):
        said = {str(number): name for number, name in enumerate(said)}
    if not isinstance(said, dict) or not 0 < len(said) <= MOST_CLASSES or not all(map(_is_name, said.values())):
        raise UserError(
            f"{printable(str(path))} must hold an object such as "
            '{"0": "sky", "#804080": "road", "11": null}, or a list of names'
        )
    if not any(said.values()):
        raise UserError(f"{printable(str(path))} names no class: everything in it is ignored")
    return tuple((key, None if name is None else printable(name.strip())) for key, name in said.items())


def _is_name(name: Any) -> bool:
    return name is None or (isinstance(name, str) and 0 < len(name.strip()) <= 200)


def numbered(said: Said) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes that a file of classes names, in its order, and what each of its keys is: a class, or IGNORE."""
    names = tuple(dict.fromkeys(name for _, name in said if name is not None))
    place = {name: number for number, name in enumerate(names)}
    return names, {key: IGNORE if name is None else place[name] for key, name in said}


def mask_classes(said: Said, ignore: Sequence[int] = ()) -> MaskClasses:
    """What a file of classes says of masks, and of the numbers that `--ignore` leaves out.

    Raises:
        UserError: for a key that is neither a number nor a colour, or for both kinds beside each other.
    """
    names, places = numbered(said)
    keys = {key: _colour(key) for key in places}
    coloured = any(colour is not None for colour in keys.values())
    found = {}
    for key, colour in keys.items():
        number = colour if coloured else _number(key)
        if number is None:
            raise UserError(
                f"--classes: {short(key)!r} is no {'colour' if coloured else 'number'} of a mask; write "
                f"{'colours as #804080, all of them' if coloured else 'numbers such as 7, or colours such as #804080'}"
            )
        if number in found:
            raise UserError(f"--classes: {short(key)!r} stands there twice")
        found[number] = places[key]
    if coloured and ignore:
        raise UserError("--ignore takes numbers, and --classes names colours: write null beside a colour instead")
    return MaskClasses(names, found | dict.fromkeys(ignore, IGNORE), coloured)


def _colour(key: str) -> int | None:
    found = _COLOUR.fullmatch(key.strip())
    if found is None:
        return None
    if found[1]:
        return int(found[1], 16)
    red, green, blue = (int(part) for part in found.groups()[1:])
    return red << 16 | green << 8 | blue if max(red, green, blue) <= 255 else None


def _number(key: str) -> int | None:
    return int(key) if key.isdecimal() and key.isascii() and len(key) < 9 and int(key) <= MOST_ID else None


def as_they_are(ids: Iterable[int], ignore: Sequence[int] = ()) -> tuple[MaskClasses, list[str]]:
    """The numbers that masks hold as classes, 255 and 65535 as void; and what a user should know of that.

    Raises:
        UserError: where 255 may as well be a class, or nothing is left.
    """
    found = sorted(set(ids) - set(ignore))
    void = [number for number in found if number in (VOID, VOID_16)]
    if void and set(found) <= {0, *void}:
        raise UserError(
            f"the masks hold no numbers but 0 and {void[0]}: say what {void[0]} is, with --classes FILE "
            f'({{"0": "background", "{void[0]}": "object"}}) or --ignore {void[0]}'
        )
    notes = [f"{number} in the masks is taken for void; --classes FILE says otherwise" for number in void]
    classes = [number for number in found if number not in void]
    if not classes:
        raise UserError("the masks hold nothing but what is ignored")
    if len(classes) > MOST_CLASSES:
        raise UserError(f"the masks hold {len(classes):,} numbers, more than {MOST_CLASSES:,} classes: name them")
    places = {number: place for place, number in enumerate(classes)}
    names = tuple(map(str, classes))
    return MaskClasses(names, places | dict.fromkeys((VOID, *void, *ignore), IGNORE)), notes


def known_classes(names: Sequence[str], first: int, ignore: Sequence[int] = (), void: Iterable[int] = (VOID,)) -> (
    MaskClasses
):  # fmt: skip
    """Classes that masks number from `first` on."""
    places = dict.fromkeys(void, IGNORE) | {first + place: place for place in range(len(names))}
    return MaskClasses(tuple(map(printable, names)), places | dict.fromkeys(ignore, IGNORE))


def cityscapes(ignore: Sequence[int] = ()) -> MaskClasses:
    """The 19 classes that Cityscapes is evaluated on, of its 34 labels."""
    places = dict.fromkeys((*CITYSCAPES_IDS, VOID), IGNORE)
    places |= {number: place for place, number in enumerate(CITYSCAPES)}
    return MaskClasses(tuple(CITYSCAPES.values()), places | dict.fromkeys(ignore, IGNORE))
