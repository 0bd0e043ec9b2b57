"""Which folders and files are splits (train, val, ...), by their names, and which of them is taken.

What is not taken is said, and so is everything that could be a split and is taken for a class.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable

TRAIN_SPLITS = frozenset(("train", "training", "trn"))
_OTHERS = frozenset((
    "val", "valid", "validation", "validate", "dev", "devel", "test", "testing", "tst", "eval", "evaluation",
    "evaluate", "holdout", "heldout", "unlabeled", "unlabelled",
))  # fmt: skip
# What may stand beside the word in a split folder's name: val2017, train_64x64, test-images, ILSVRC2012_img_val
_BESIDE = frozenset((
    "set", "split", "data", "dataset", "images", "image", "imgs", "img", "pictures", "photos", "jpg", "jpeg", "png",
    "x", "px", "v", "ilsvrc", "coco", "part", "fold", "new", "old", "final", "full", "small", "mini",
))  # fmt: skip
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(TRAIN_SPLITS | _OTHERS, key=len, reverse=True))})(?![a-z])")
_PIECES = re.compile(r"[a-z]+|[0-9]+")
_JOINED = re.compile(r"(hold|held)[-_ ]?out")

EVERYTHING = ("all", "none")
"""Instead of a split's name: every split; or no name means a split, so that folders called train are classes."""


@lru_cache(maxsize=4096)
def split_of_folder(name: str) -> str | None:
    """The split that a folder's whole name says: "val" of val2017, nothing of train_station."""
    pieces = _PIECES.findall(_JOINED.sub(r"\1out", name.lower()))
    words = [piece for piece in pieces if piece in TRAIN_SPLITS or piece in _OTHERS]
    for piece in pieces:
        for end in ("set", "images", "data"):  # testset
            if piece.removesuffix(end) in TRAIN_SPLITS | _OTHERS and piece not in words:
                words.append(piece.removesuffix(end))
                break
        else:
            if not (piece in words or piece in _BESIDE or piece.isdigit()):
                return None
    return words[0] if len(words) == 1 else None


def are_splits(names: Iterable[str]) -> bool:
    """Whether these folders leave no doubt: one to train on, and another split beside it."""
    found = {split_of_folder(name) for name in names} - {None}
    return bool(found & TRAIN_SPLITS) and bool(found - TRAIN_SPLITS)


def splits_of_files(paths: Sequence[str]) -> Callable[[str], str | None]:
    """Says of each of these shards or tables which split its name or one of its folders names.

    Folders above all of them say nothing.
    """
    folders = [path.split("/")[:-1] for path in paths]
    shared = 0
    while folders and all(len(parts) > shared and parts[shared] == folders[0][shared] for parts in folders):
        shared += 1

    def split(path: str) -> str | None:
        words = _WORD.findall(_JOINED.sub(r"\1out", "/".join(path.lower().split("/")[shared:])))
        return words[0] if words else None

    return split


Entry = TypeVar("Entry")


def choose_split(
    entries: Sequence[Entry],
    split_of: Callable[[Entry], str | None],
    wanted: str | None,
    root: Path,
    files_of: Callable[[Sequence[Entry]], int] = len,
) -> tuple[list[Entry], list[str]]:
    """The entries of the split that is wanted, and notes; train where none is named and there are several.

    Args:
        files_of: how many files some entries are.

    Raises:
        UserError: for a split that is not there, or several without one to train on.
    """
    splits: dict[str | None, list[Entry]] = {}
    for entry in entries:
        splits.setdefault(split_of(entry), []).append(entry)
    names = sorted(name for name in splits if name is not None)
    shown = ", ".join(map(printable, names))
    if wanted in EVERYTHING or (wanted is None and (not names or len(splits) == 1)):
        return list(entries), []
    if wanted is None:
        if None in splits and not are_splits(names):  # a word like "test" in some names may mean nothing
            return list(entries), [f"Taking every file, those named {shown} too; --split {names[0]} takes them alone."]
        train = [name for name in names if split_of_folder(name) in TRAIN_SPLITS]
        if len(train) != 1:
            raise UserError(f"{printable(str(root))} has the splits {shown}: choose with --split NAME (or all)")
        left = [f"{printable(name)} ({files_of(splits[name]):,} files)" for name in names if name not in train]
        left += [f"{files_of(splits[None]):,} files of no split"] if None in splits else []
        return splits[train[0]], [
            f"Taking the split {printable(train[0])}; not taken: {', '.join(left)}. --split chooses another."
        ]
    if wanted not in splits:  # "val" may say val2017
        alike = [name for name in names if wanted.lower() in (name, split_of_folder(name))]
        if len(alike) != 1:
            what = f"it has {shown}" if names else "it has no splits"
            raise UserError(f"{printable(str(root))} has no split {printable(wanted)!r}: {what}")
        wanted = alike[0]
    return splits[wanted], []


class Named(NamedTuple):
    """The images of a folder: the parts of its path below the source that are yet to be understood; how many; and which
    they are among all folders.

    Attributes:
        path: the parts of its whole path; `parts` are the last of them.
    """

    path: tuple[str, ...]
    parts: tuple[str, ...]
    images: int
    number: int

    def within(self) -> "Named":
        """The same with the first folder understood."""
        return self._replace(parts=self.parts[1:])


def count_images(folders: Iterable[Named]) -> int:
    """How many images lie in some folders."""
    return sum(folder.images for folder in folders)


def below_splits(
    folders: list[Named], tops: AbstractSet[str], wanted: str | None, root: Path
) -> tuple[list[Named], list[str]] | None:
    """The images of the split that is wanted where some of the folders `tops`, which are all there are, are splits.

    None where they are classes. Images elsewhere are left out where there is a training split and another; they are
    named in the notes.

    Raises:
        UserError: where there is no telling splits from classes.
    """
    splits = {top for top in tops if split_of_folder(top)}
    others = sorted(tops - splits)
    loose = count_images(folder for folder in folders if not folder.parts)
    if not splits or wanted == "none":
        return None
    certain = are_splits(splits) or not (others or loose)
    named = {top for top in splits if wanted is not None and wanted.lower() in (top.lower(), split_of_folder(top))}
    if not certain and not named:
        first, rest = sorted(splits)[0], ", ".join(map(printable, others[:3])) + (", ..." if len(others) > 3 else "")
        if wanted is None and any(len(parts) > 1 and parts[0] in splits for _, parts, _, _ in folders) and others:
            raise UserError(
                f"{printable(str(root))} holds the folder {printable(first)} beside {rest}: is it a split or a class? "
                f"name {printable(f'{root}/{first}')} to take it alone; fastpmae-write --split none takes every folder "
                "for a class"
            )
        return None
    inside = [folder for folder in folders if folder.parts and folder.parts[0] in splits]
    taken, notes = choose_split(inside, lambda folder: folder.parts[0].lower(), wanted, root, count_images)
    if len(inside) < len(folders):
        count = {top: count_images(folder for folder in folders if folder.parts[:1] == (top,)) for top in others[:5]}
        where = [f"{printable(top)} ({files:,} files)" for top, files in count.items()]
        where += [f"{len(others) - 5:,} more folders"] if len(others) > 5 else []
        where += [f"{loose:,} images beside the folders"] if loose else []
        notes.append(f"Not taken, since they lie in no split: {', '.join(where)}.")
    return taken, notes


def within_classes(folders: list[Named], wanted: str | None, root: Path) -> tuple[list[Named], list[str]]:
    """The images of the split that is wanted where each class has splits of its own (cat/train, cat/val).

    Raises:
        UserError: where one folder among others holds splits, so that validation images would be trained on unseen.
    """
    below: dict[tuple[str, ...], set[str]] = {}
    for path, parts, _, _ in folders:
        above = path[: len(path) - len(parts)]
        for depth in range(1, len(parts)):  # a folder below its class's
            if split_of_folder(parts[depth]):
                below.setdefault((*above, *parts[:depth]), set()).add(parts[depth])
    holding = sorted(folder for folder, splits in below.items() if are_splits(splits))
    if not holding or wanted in EVERYTHING:
        return folders, []
    if all(len(parts) > 1 and split_of_folder(parts[1]) for _, parts, _, _ in folders):
        return choose_split(folders, lambda folder: folder.parts[1].lower(), wanted, root, count_images)
    where, splits = "/".join(holding[0]), ", ".join(sorted(map(printable, below[holding[0]])))
    raise UserError(
        f"{printable(str(root))} holds the splits {splits} in {printable(where)} and images elsewhere: "
        f"name {printable(f'{root}/{where}')}, or take all of them with --split all"
    )


def doubtful_classes(classes: Sequence[str]) -> list[str]:
    """A note where a class has the name of a split."""
    found = [name for name in classes if split_of_folder(name)]
    if not found or len(classes) < 2:
        return []
    return [
        f"The folder {printable(found[0])} is taken for a class like the {len(classes) - 1:,} beside it; "
        f"--split {printable(found[0].lower())} takes it alone."
    ]
