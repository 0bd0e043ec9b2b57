"""Where images lie and what they are: of those that a batch asks for, in one file or in many."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Places(NamedTuple):
    """Of m images, as compiled code reads them: int64 [m] each.

    `descriptor` of the open file, `pointer` and `size` of the image's bytes in it, `height` and `width` in pixels, the
    storage `mode`, and the `label` (-1 where there is none).
    """

    descriptor: np.ndarray
    pointer: np.ndarray
    size: np.ndarray
    height: np.ndarray
    width: np.ndarray
    mode: np.ndarray
    label: np.ndarray


class Largest(NamedTuple):
    """What memory must be there for any image: sides and pixels at most, and bytes as it is stored."""

    height: int
    width: int
    pixels: int
    stored: int


class Column:
    """One number of each of n images, found when it is asked for: what stands in for an array of all of them.

    It is indexed as an array is, by a number, by numbers or by a slice; `np.asarray` of it looks at every image.
    """

    def __init__(self, count: int, find: Callable[[np.ndarray], np.ndarray]) -> None:
        self._count, self._find = count, find

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._find(np.arange(*index.indices(self._count)))
        wanted = np.asarray(index)
        if wanted.dtype == np.bool_:
            wanted = np.flatnonzero(wanted)
        # below 0 from the end, as in an array
        wanted = np.where(wanted < 0, wanted + self._count, wanted).astype(np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self._count):
            raise IndexError(f"of {self._count} images none has the number {int(wanted.max())}")
        found = self._find(wanted.reshape(-1))
        return found.reshape(wanted.shape) if wanted.ndim else found[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def by_names(label: np.ndarray, theirs: list[str] | None, names: Sequence[str] | None) -> np.ndarray:
    """Labels [m], which count the names `theirs`, as they count `names`: int64 [m].

    Raises:
        KeyError: for one of theirs that is not among the names.
    """
    if theirs is None or names is None or list(theirs) == list(names[: len(theirs)]):
        return label
    numbers = {name: number for number, name in reversed([*enumerate(names)])}
    # the last is what a label of -1 finds
    return np.array([*(numbers[name] for name in theirs), -1], np.int64)[label]
