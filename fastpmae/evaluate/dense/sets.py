"""Opening images with dense labels: which files a user's folder holds, which split of them, and what is checked first.

Every label is looked at before anything is computed: what does not fit is a sentence now, not in the middle of a run.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from fastpmae.evaluate.datasets import VAL_SPLITS
from fastpmae.evaluate.dense.classes import (
    MOST_ID,
    MaskClasses,
    Said,
    as_they_are,
    cityscapes,
    known_classes,
    mask_classes,
    read_classes,
)
from fastpmae.evaluate.dense.labelled import IGNORE, Masked, Segmentation
from fastpmae.evaluate.dense.masks import Contents, Pair, contents, read_pair
from fastpmae.evaluate.dense.pairs import Pairs, pairs_in
from fastpmae.evaluate.dense.tables import pairs_in_tables
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import loader_threads
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.sources.splits import TRAIN_SPLITS, split_of_folder
from fastpmae_loaders.values import checked

Given = TypeVar("Given")
Found = TypeVar("Found")

SEGMENTATION_LAYOUTS = (
    "images/ beside masks/, annotations/ or labels/ (with or without split folders), leftImg8bit/ beside gtFine/, "
    "JPEGImages/ beside SegmentationClass/, or parquet files with a column of images and one of masks"
)


@checked
def open_segmentation(
    train: Path,
    val: Path | None = None,
    classes: Path | None = None,
    ignore: tuple[int, ...] = (),
    threads: int = 0,
) -> tuple[Segmentation, Segmentation | None]:
    """The images with masks to learn from and those to test on, of the same classes.

    Where `val` is None and `train` has a training and a validation split, those are taken.

    Args:
        classes: the file of `--classes`; without it the numbers mean what the layout says, or are classes themselves.
        ignore: numbers in the masks that are to be left out.
        threads: that look at the files; 0 takes all cores.

    Raises:
        UserError: for folders of no known layout, files that are not sound, and numbers that are no class.
    """
    for number in ignore:
        if not 0 <= number <= MOST_ID:
            raise UserError(f"--ignore {short(str(number))}: a number of a mask is between 0 and {MOST_ID}")
    said = None if classes is None else read_classes(classes)
    first, second = _split_pairs(train, val)
    coloured = _coloured(said, first, ignore)
    parts = [(path, found, pairs) for path, found, pairs in (first, second) if pairs]
    looked = [over_all(partial(contents, coloured=coloured), pairs, threads) for _, _, pairs in parts]
    table, notes = _mask_classes(said, first[1], [held for part in looked for held in part], ignore)
    sets = []
    for (path, found, pairs), held in zip(parts, looked, strict=True):
        for pair, of_mask in zip(pairs, held, strict=True):
            if strange := set(of_mask.ids) - table.places.keys():
                raise UserError(f"{printable(pair.mask_name)} {table.unknown(strange)}")
        if all(table.places[number] == IGNORE for of_mask in held for number in of_mask.ids):
            raise UserError(f"{printable(str(path))}: its {len(held):,} masks hold nothing but what is ignored")
        entries = tuple(
            Masked(pair.image_name, partial(read_pair, pair, table), of_mask.digest)
            for pair, of_mask in zip(pairs, held, strict=True)
        )
        sets.append(Segmentation(path, table.names, entries, tuple(dict.fromkeys([*found.notes, *notes]))))
    return sets[0], sets[1] if len(sets) > 1 else None


def _split_pairs(
    train: Path, val: Path | None
) -> tuple[tuple[Path, Pairs, list[Pair]], tuple[Path, Pairs, list[Pair]]]:
    found = _pairs(train)
    own, other = split_names(found.splits, train, val is None)
    others = found if val is None else _pairs(val)
    if val is not None:
        other = tested_split(others.splits, val)
    tested = [] if other == "" else others.splits[other]
    return (train, found, found.splits[own]), (val or train, others, tested)


def _pairs(folder: Path) -> Pairs:
    if not folder.is_dir():
        word = "is a file; name the folder that it lies in" if folder.exists() else "does not exist"
        raise UserError(f"{printable(str(folder))} {word}")
    found = pairs_in_tables(folder) or pairs_in(folder)
    if found is None:
        raise UserError(f"{printable(str(folder))} holds no images with masks: {SEGMENTATION_LAYOUTS}")
    return found


def split_names(splits: Iterable[str | None], path: Path, both: bool) -> tuple[str | None, str | None]:
    """The split to train on, and the one to test on: "" where there is none or it is not asked for.

    Raises:
        UserError: where there is no telling which to train on.
    """
    names = list(splits)
    if names == [None]:
        return None, ""
    own = [name for name in names if name is not None and split_of_folder(name) in TRAIN_SPLITS]
    if len(own) != 1 and len(names) == 1:
        own = [name for name in names if name is not None]
    if len(own) != 1:
        shown = ", ".join(printable(str(name)) for name in names)
        raise UserError(f"{printable(str(path))} has the splits {shown}: name the one to train on")
    if not both:
        return own[0], ""
    return own[0], next((name for word in VAL_SPLITS for name in names if _is(name, word) and name != own[0]), "")


def tested_split(splits: Iterable[str | None], path: Path) -> str | None:
    """The split of a folder that is given to test on: its validation split, or the only one.

    Raises:
        UserError: where there is no telling which.
    """
    names = list(splits)
    found = next((name for word in VAL_SPLITS for name in names if _is(name, word)), names[0])
    if len(names) > 1 and not any(_is(found, word) for word in VAL_SPLITS):
        raise UserError(f"{printable(str(path))} has the splits {', '.join(map(str, names))}: name the one to test on")
    return found


def _is(name: str | None, word: str) -> bool:
    return name is not None and split_of_folder(name) == word


def _coloured(said: Said | None, first: tuple[Path, Pairs, list[Pair]], ignore: Sequence[int]) -> bool:
    """Whether the masks are read as colours."""
    if said is None and first[1].names:
        said = tuple(first[1].names)
    return said is not None and mask_classes(said).coloured


def _mask_classes(
    said: Said | None, found: Pairs, held: list[Contents], ignore: tuple[int, ...]
) -> tuple[MaskClasses, list[str]]:
    """What the masks' numbers mean: as the user says, as the layout does, or each a class."""
    if said is not None:
        return mask_classes(said, ignore), []
    match found.kind:
        case "cityscapes":
            return cityscapes(ignore), []
        case "ade20k":
            return known_classes([str(name) for _, name in found.names], 1, ignore, (0, 255)), []
        case _ if found.names:
            table = mask_classes(tuple(found.names), () if _has_colours(found) else ignore)
            if table.coloured:
                return table, []
            return known_classes(table.names, 0, ignore), []
    ids = {number for mask in held for number in mask.ids}
    return as_they_are(ids, ignore)


def _has_colours(found: Pairs) -> bool:
    return mask_classes(tuple(found.names)).coloured


def over_all(function: Callable[[Given], Found], given: Sequence[Given], threads: int) -> list[Found]:
    """What a function makes of each, by threads (0: one a core); the first error ends it."""
    with ThreadPoolExecutor(loader_threads(threads), "labels") as pool:
        try:
            return list(pool.map(function, given))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
