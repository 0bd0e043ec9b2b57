"""The split of a listing into parts."""

from itertools import chain

import pytest

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.write.shards import part_name, shard_ranges


@pytest.mark.parametrize(("images", "shards"), [(1, 1), (10, 3), (10, 10), (1_000_003, 4096)])
def test_parts_are_contiguous_and_nearly_equal(images: int, shards: int) -> None:
    ranges = shard_ranges(images, shards)
    assert len(ranges) == shards
    assert list(chain.from_iterable(ranges)) == list(range(images))
    assert {len(part) for part in ranges} <= {images // shards, -(-images // shards)}


@pytest.mark.parametrize(("images", "shards"), [(10, 0), (10, -1), (10, 11), (10**9, 100_001)])
def test_parts_that_cannot_be_are_refused(images: int, shards: int) -> None:
    with pytest.raises(UserError, match="shards"):
        shard_ranges(images, shards)


def test_names_sort_as_they_are_counted() -> None:
    names = [part_name(number) for number in (0, 9, 10, 99_999)]
    assert names == sorted(names)
    assert names[0] == "part-00000.beton"
