"""The names of many files as the bytes that they are: some tens for each, where a list of texts takes hundreds."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

_BLOCK = 1024
"""Names that are kept, and looked up, together."""
_KEPT = 4
"""Blocks that stay split up: who looks up one name after another is within few of them."""


class Folder(NamedTuple):
    """A folder that holds files, by its name relative to the root ("" for that itself), and how many it holds."""

    name: str
    count: int


class Names(Sequence[str]):
    """Names of files relative to a root, folder by folder, in the order in which they were added.

    `folders` are those that hold any, in that order; one whose files were added by turns is there more than once.
    """

    def __init__(self) -> None:
        self.folders: list[Folder] = []
        self._blocks: list[tuple[int, bytes]] = []
        self._ends: list[int] = []
        self._split: dict[int, list[str]] = {}

    def add(self, folder: str, names: Sequence[str]) -> None:
        """Files of a folder, by their names in it."""
        if not names:
            return
        if self.folders and self.folders[-1].name == folder:
            self.folders[-1] = Folder(folder, self.folders[-1].count + len(names))
        else:
            self.folders.append(Folder(folder, len(names)))
        for start in range(0, len(names), _BLOCK):
            some = names[start : start + _BLOCK]
            self._blocks.append((len(self.folders) - 1, os.fsencode("\0".join(some))))
            self._ends.append(len(self) + len(some))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        place = place + len(self) if place < 0 else place
        if not 0 <= place < len(self):
            raise IndexError(f"of {len(self)} names none has the number {place}")
        block = bisect_right(self._ends, place)
        names = self._names(block)
        return names[place - self._ends[block]]

    def __iter__(self) -> Iterator[str]:
        return self.between(0, len(self))

    def between(self, start: int, stop: int) -> Iterator[str]:
        """The names of these numbers, one after another."""
        while start < stop:
            block = bisect_right(self._ends, start)
            names = self._names(block)
            first = start - self._ends[block]
            yield from names[first : min(0, stop - self._ends[block]) or None]
            start = self._ends[block]

    def in_folder_order(self) -> "Names":
        """The same names, a folder before those below it, those side by side and the files in each by their names."""
        blocks: dict[str, list[bytes]] = {}
        for number, names in self._blocks:
            blocks.setdefault(self.folders[number].name, []).append(names)
        ordered = Names()
        for folder in sorted(blocks, key=lambda name: name.split("/") if name else []):
            ordered.add(folder, sorted(os.fsdecode(b"\0".join(blocks.pop(folder))).split("\0")))
        return ordered

    def _names(self, block: int) -> list[str]:
        """Whole names of a block's files."""
        found = self._split.get(block)
        if found is None:
            number, names = self._blocks[block]
            folder = self.folders[number].name
            above = f"{folder}/" if folder else ""
            found = [above + name for name in os.fsdecode(names).split("\0")]
            while len(self._split) >= _KEPT:
                self._split.pop(next(iter(self._split)), None)
            self._split[block] = found
        return found
