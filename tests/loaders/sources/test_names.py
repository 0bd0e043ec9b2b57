"""Names of many files: the list that they stand for, in a tenth of its memory."""

import sys

import numpy as np
import pytest

from fastpmae_loaders.sources import names as names_module
from fastpmae_loaders.sources.names import Folder, Names

ODD = ("ü.jpg", "写真.png", "a\udcffb.jpg", "with space.jpg", "\x1b.jpg")
"""The third is what a name in no valid UTF-8 becomes."""


def listed(folders: dict[str, list[str]]) -> list[str]:
    return [f"{folder}/{name}" if folder else name for folder, names in folders.items() for name in names]


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_they_are_the_list(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(names_module, "_BLOCK", block)
    folders = {"": [*ODD], "b": ["1.jpg"], "b/c": [], "a": [f"{n:02d}.jpg" for n in range(20)], "b/d": ["x", "y"]}
    names = Names()
    for folder, own in folders.items():
        names.add(folder, own)
    expected = listed(folders)
    assert list(names) == expected
    assert [names[place] for place in range(len(names))] == expected
    assert [names[place - len(names)] for place in range(len(names))] == expected
    assert names[3:9] == expected[3:9]
    assert names.folders == [Folder("", 5), Folder("b", 1), Folder("a", 20), Folder("b/d", 2)]
    noise = np.random.default_rng(0)
    for _ in range(50):
        start, stop = sorted(noise.integers(0, len(names) + 1, 2).tolist())
        assert list(names.between(start, stop)) == expected[start:stop]
        place = int(noise.integers(len(names)))
        assert names[place] == expected[place]
    with pytest.raises(IndexError, match="none has the number 28"):
        names[28]


def test_no_names() -> None:
    names = Names()
    names.add("a", [])
    assert (len(names), list(names), names.folders) == (0, [], [])


def test_in_the_order_of_a_walk() -> None:
    """A folder's own files, then the folders in it; a store tells them by turns."""
    told = ["a/1.jpg", "a/b/2.jpg", "a/b-c/3.jpg", "a/z.jpg", "a-b/4.jpg", "0.jpg", "a/0.jpg", "z.jpg"]
    names = Names()
    for name in told:
        folder, _, own = name.rpartition("/")
        names.add(folder, [own])
    expected = ["0.jpg", "z.jpg", "a/0.jpg", "a/1.jpg", "a/z.jpg", "a/b/2.jpg", "a/b-c/3.jpg", "a-b/4.jpg"]
    assert list(names.in_folder_order()) == expected
    assert [folder.count for folder in names.in_folder_order().folders] == [2, 3, 1, 1, 1]


def test_a_name_takes_its_bytes() -> None:
    names = Names()
    for folder in range(40):
        names.add(f"n{folder:08d}", [f"n{folder:08d}_{number:05d}.JPEG" for number in range(1300)])
    held = sum(sys.getsizeof(block) for _, block in names._blocks) + sum(map(sys.getsizeof, names._ends))
    assert held / len(names) < 22
    assert sum(1 for _ in names) == 52_000
    assert len(names._split) <= 4
