"""Duplicates of a set, by the hashes beside its parts: the first of equal images stays, in whatever part it lies."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from fastpmae_loaders.errors import BetonError, UserError
from fastpmae_loaders.sources.duplicates import (
    DUPLICATES,
    are_duplicates,
    count_duplicates,
    duplicates_before,
    duplicates_file,
    read_duplicates,
)
from fastpmae_loaders.sources.set_index import SetIndex, Shard, read_index
from fastpmae_loaders.write.deduplicate import find_duplicates
from fastpmae_loaders.write.finish import finish_set
from fastpmae_loaders.write.manifests import HASHES_MAGIC, Manifest, part_name
from fastpmae_loaders.write.sets import write_set
from fastpmae_loaders.write.targets import FolderTarget
from tests.made import write_tree

DIGEST = "sha256:" + "0" * 64


def made_index(images: int) -> SetIndex:
    return SetIndex((Shard("part-00000.beton", images, 40 * images, 1 << 20, 9, 9, DIGEST),))


def bits_of(flags: np.ndarray) -> np.ndarray:
    return np.packbits(flags, bitorder="little")


def expected(hashes: list[bytes]) -> list[bool]:
    """By a set of what came before."""
    seen: set[bytes] = set()
    return [value in seen or bool(seen.add(value)) for value in hashes]


@pytest.mark.parametrize("together", [1 << 24, 64, 9])
def test_the_first_of_equal_hashes_stays(tmp_path: Path, together: int) -> None:
    """Hashes that agree in their first half alone are none; buckets on the disk give what memory gives."""
    rng = np.random.default_rng(0)
    hashes = [bytes(rng.integers(0, 3, 8, np.uint8) * 85) + bytes([rng.integers(2)] * 8) for _ in range(500)]
    hashes += [bytes(rng.integers(0, 256, 16, np.uint8)) for _ in range(500)]
    hashes += hashes[600:650]
    manifests, begin = [], 0
    for number, count in enumerate([0, 1, 700, 0, 349]):
        own = hashes[begin : begin + count]
        begin += count
        (tmp_path / part_name(number, "hashes")).write_bytes(HASHES_MAGIC + b"".join(own))
        shard = Shard(part_name(number), count, 10**6, 1 << 20, 9, 9, DIGEST) if count else None
        manifests.append(Manifest("plan", number, shard))
    bits = find_duplicates(FolderTarget(tmp_path), manifests, together)
    flags = np.unpackbits(bits, bitorder="little")
    assert flags[: len(hashes)].astype(bool).tolist() == expected(hashes)
    assert not flags[len(hashes) :].any()
    (tmp_path / part_name(2, "hashes")).write_bytes(HASHES_MAGIC)
    with pytest.raises(UserError, match=r"part-00002.hashes does not have the hashes of 700 images"):
        find_duplicates(FolderTarget(tmp_path), manifests)


def test_duplicates_of_a_real_set(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", 15)
    for name in ("class_0/again.jpg", "class_2/0001.jpg"):
        shutil.copy(tree / "class_1" / "0004.jpg", tree / name)
    write_set(tree, tmp_path / "plain", 3, workers=1)
    written = write_set(tree, tmp_path / "set", 3, workers=1, deduplicate=True)
    assert written is not None
    assert written.duplicates == 2
    index = read_index(tmp_path / "set" / "index.json")
    bits = read_duplicates(tmp_path / "set" / DUPLICATES, index)
    names = sorted(f"{path.parent.name}/{path.name}" for path in tree.rglob("*.jpg"))
    left_out = [name for name, bit in zip(names, np.unpackbits(bits, bitorder="little"), strict=False) if bit]
    # class_0 comes first, so its copy is the one that stays
    assert left_out == ["class_1/0004.jpg", "class_2/0001.jpg"]
    # the parts and the index are as without it; a later end of the set, with or without it, has the last word
    assert (tmp_path / "set" / "index.json").read_bytes() == (tmp_path / "plain" / "index.json").read_bytes()
    before = (tmp_path / "set" / DUPLICATES).read_bytes()
    assert finish_set(tmp_path / "plain", deduplicate=True).duplicates == 2
    assert (tmp_path / "plain" / DUPLICATES).read_bytes() == before
    assert finish_set(tmp_path / "plain").duplicates is None
    assert not (tmp_path / "plain" / DUPLICATES).exists()


@pytest.mark.parametrize("images", [1, 7, 8, 9, 64, 1001])
def test_bits_are_counted_and_looked_up(images: int) -> None:
    flags = np.random.default_rng(images).random(images) < 0.4
    flags[0] = False
    index, bits = made_index(images), bits_of(flags)
    read = read_duplicates(duplicates_file(bits, index), index)
    assert np.array_equal(read, bits)
    assert count_duplicates(read) == flags.sum()
    assert np.array_equal(are_duplicates(read, np.arange(images)), flags)
    places = np.arange(images + 1)
    assert np.array_equal(duplicates_before(read, places), np.concatenate([[0], np.cumsum(flags)]))


def test_counting_goes_stretch_by_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpmae_loaders.sources.duplicates._STRETCH", 4)
    flags = np.random.default_rng(0).random(333) < 0.5
    before = duplicates_before(bits_of(flags), np.arange(334))
    assert np.array_equal(before, np.concatenate([[0], np.cumsum(flags)]))
    assert count_duplicates(bits_of(flags)) == flags.sum()


def test_files_of_strangers_are_refused() -> None:
    flags = np.arange(20) % 3 == 1
    index, bits = made_index(20), bits_of(flags)
    sound = duplicates_file(bits, index)
    for place in range(len(sound)):
        hurt = bytearray(sound)
        hurt[place] ^= 0x41
        with pytest.raises(BetonError, match="duplicates"):
            read_duplicates(bytes(hurt), index)
    for cut in range(len(sound)):
        with pytest.raises(BetonError):
            read_duplicates(sound[:cut], index)
    with pytest.raises(BetonError, match="damaged"):
        read_duplicates(sound + b"\0", index)
    with pytest.raises(BetonError, match="another index"):
        read_duplicates(sound, made_index(21))
    with pytest.raises(BetonError, match="leaves no image"):
        read_duplicates(duplicates_file(bits_of(np.ones(20, bool)), index), index)
    with pytest.raises(BetonError, match="damaged"):
        read_duplicates(duplicates_file(np.array([1, 2, 0x1F], np.uint8), index), index)
