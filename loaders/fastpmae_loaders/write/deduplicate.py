"""Which images of a set have the bytes of one before them, by the hashes that lie beside its parts.

Memory stays within bounds: more hashes than `_TOGETHER` go through files on this machine's disk, 24 bytes an image, in
buckets of equal hashes, one of which is looked at at a time.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.write.manifests import HASH, HASHES_MAGIC, Manifest, hashes_size
from fastpmae_loaders.write.shards import part_name
from fastpmae_loaders.write.targets import Target

_TOGETHER = 1 << 24
"""Hashes that are sorted at a time, in about 1 GB."""
_HASH = np.dtype([("first", ">u8"), ("rest", ">u8")])
_PLACED = np.dtype([("first", "<u8"), ("rest", "<u8"), ("place", "<i8")])


def find_duplicates(target: Target, manifests: Sequence[Manifest], together: int = _TOGETHER) -> np.ndarray:
    """One bit for each image of these parts, in their order: uint8 [ceil(n / 8)], 1 where its bytes came before.

    Raises:
        UserError: where a part's hashes are missing or not what its manifest says.
    """
    images = sum(manifest.shard.images for manifest in manifests if manifest.shard is not None)
    bits = np.zeros(-(-images // 8), np.uint8)
    buckets = 1
    while images / buckets > together:
        buckets *= 2
    if buckets == 1:
        _mark(bits, np.concatenate(list(_hashes(target, manifests))))
        return bits
    with tempfile.TemporaryDirectory(prefix="fastpmae-hashes-") as folder:
        files = [Path(folder) / str(bucket) for bucket in range(buckets)]
        shift = np.uint64(64 - (buckets - 1).bit_length())
        for hashes in _hashes(target, manifests):
            bucket = hashes["first"] >> shift
            hashes = hashes[np.argsort(bucket, kind="stable")]
            edges = np.searchsorted(np.sort(bucket), np.arange(buckets + 1, dtype=np.uint64))
            for file, start, stop in zip(files, edges[:-1], edges[1:], strict=True):
                with file.open("ab") as spool:
                    spool.write(hashes[start:stop].tobytes())
        for file in files:
            _mark(bits, np.fromfile(file, _PLACED))
            file.unlink()
    return bits


def _hashes(target: Target, manifests: Sequence[Manifest]) -> Iterator[np.ndarray]:
    """The hashes of each part with the places of its images in the set: _PLACED [images of the part]."""
    begin = 0
    for manifest in manifests:
        if manifest.shard is None:
            continue
        name, images = part_name(manifest.number, "hashes"), manifest.shard.images
        blob = target.read(name)
        if blob is None or len(blob) != hashes_size(images) or not blob.startswith(HASHES_MAGIC):
            raise UserError(
                f"{target.shown}/{name} does not have the hashes of {images:,} images: remove it, run the command that "
                "wrote the part again, and then --finish --deduplicate"
            )
        read = np.frombuffer(blob, _HASH, offset=len(blob) - HASH * images)
        placed = np.empty(images, _PLACED)
        placed["first"], placed["rest"] = read["first"], read["rest"]
        placed["place"] = np.arange(begin, begin + images)
        begin += images
        yield placed


def _mark(bits: np.ndarray, hashes: np.ndarray) -> None:
    """Sets the bits of all hashes, by ascending place, that are there before."""
    if not len(hashes):
        return
    first = np.ascontiguousarray(hashes["first"])
    order = np.argsort(first, kind="stable")
    first = first[order]
    alike = first[1:] == first[:-1]
    # nearly all are alone; the others are told apart by the rest of their hashes
    shared = order[np.append(alike, False) | np.append(False, alike)]
    found = hashes[shared]
    found = found[np.lexsort((found["place"], found["rest"], found["first"]))]
    same = (found["first"][1:] == found["first"][:-1]) & (found["rest"][1:] == found["rest"][:-1])
    places = found["place"][1:][same]
    np.bitwise_or.at(bits, places >> 3, (1 << (places & 7)).astype(np.uint8))
