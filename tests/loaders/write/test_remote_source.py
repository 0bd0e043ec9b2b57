"""A source in a store: its files by their names alone are what they are on a disk, and come when they are asked for."""

import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sources.listing import Files, Item, list_folder
from fastpmae_loaders.sources.names import Names
from fastpmae_loaders.stores.address import parse_address
from fastpmae_loaders.write import remote_source
from fastpmae_loaders.write.remote_source import RemoteSource

TREES = {
    "classes": ["b/2.jpg", "b/sub/1.jpg", "b/sub.jpg", "a/x.PNG", "a/y.jpeg", "a-b/z.webp", "b/10.jpg"],
    "splits": ["train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "readme.txt"],
    "programs' own": ["a/1.jpg", "a/._1.jpg", ".git/x.jpg", "a/.cache/deep/y.jpg", "a/@eaDir/t.jpg", "a/.cache/no.txt"],
    "shards and others": ["s/1.tar", "s/0.tar", "t.parquet", "x.zip", "notes.md", "jpg", "noise.bin", ".hidden.jpg"],
}


def names_of(folder: Path) -> Names:
    """As a store tells them, in any order."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    random.Random(0).shuffle(found)
    names = Names()
    for name in found:
        above, _, own = name.rpartition("/")
        names.add(above, [own])
    return names


@pytest.mark.parametrize("tree", TREES)
def test_names_alone_tell_what_files_are(tmp_path: Path, tree: str) -> None:
    for name in TREES[tree]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")
    here, there = Files(tmp_path), Files(tmp_path, names_of(tmp_path))
    assert list(there.images) == list(here.images)
    for kind in ("tars", "tables", "packed", "others", "bad"):
        assert getattr(there, kind) == getattr(here, kind), kind
    assert +there.helpers == +here.helpers
    assert there.notes() == here.notes()
    if tree != "shards and others":
        ours, theirs = list_folder(tmp_path, here), list_folder(tmp_path, there)
        assert list(theirs[0].items) == list(ours[0].items)
        assert (theirs[0].class_names, theirs[1]) == (ours[0].class_names, ours[1])


@dataclass(frozen=True)
class Nearby(RemoteSource):
    """A store that is a folder of this machine."""

    store: Path = Path()

    def bring(self, names: Iterable[str]) -> None:
        for name in names:
            if not (self.store / name).exists():
                raise UserError(f"there is no {name}")
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.store / name, self.folder / name)


def test_images_come_some_at_a_time_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_source, "_TOGETHER", 4)
    (tmp_path / "store").mkdir()
    names = [f"{number:03d}.jpg" for number in range(50)]
    for name in names:
        (tmp_path / "store" / name).write_text(name)
    here = tmp_path / "here"
    here.mkdir()
    source = Nearby(parse_address("s3://bucket/raw"), here, tmp_path / "store")
    items = [Item("file", f"{here}/{name}", (), -1) for name in names]
    items.insert(20, Item("bad", f"{here}/broken", ("a link to nothing",), -1))
    behind = 7
    with source.in_turn(items, behind) as turn:
        assert len(turn) == 51
        for place in range(51):
            # who stores goes on up to so many behind who hands out
            for asked in (place, max(0, place - behind)):
                item = turn[asked]
                assert item == items[asked]
                assert item.kind == "bad" or Path(item.path).read_text() == Path(item.path).name
            assert len(list(here.iterdir())) <= behind + 3 * 4
    assert list(here.iterdir()) == []


def test_what_cannot_be_brought_is_told_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_source, "_TOGETHER", 2)
    for name in ("store", "here"):
        (tmp_path / name).mkdir()
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / "store" / name).write_text(name)
    source = Nearby(parse_address("s3://bucket/raw"), tmp_path / "here", tmp_path / "store")
    items = [Item("file", f"{tmp_path}/here/{number}.jpg", (), -1) for number in range(4)]
    with source.in_turn(items, 8) as turn:
        assert (turn[0], turn[1]) == (items[0], items[1])
        with pytest.raises(UserError, match=r"there is no 2\.jpg"):
            turn[2]
    assert list((tmp_path / "here").iterdir()) == []
