"""Which images of a sorted listing go into which part of a set, and what the files of a part are called."""

import re

from fastpmae_loaders.errors import UserError

MOST_SHARDS = 100_000
"""Parts of one set: their names keep five digits."""


def shard_ranges(images: int, shards: int) -> list[range]:
    """The places of the listing that each part holds: contiguous, in order, and of sizes that differ by one at most.

    Raises:
        UserError: where there would be parts without an image, or more of them than MOST_SHARDS.
    """
    check_shards(shards)
    if shards > images:
        raise UserError(f"{images:,} images do not fill {shards:,} shards: lower --shards")
    return [range(images * part // shards, images * (part + 1) // shards) for part in range(shards)]


def check_shards(shards: int) -> None:
    """Raise UserError where a set cannot have so many parts."""
    if not 1 <= shards <= MOST_SHARDS:
        raise UserError(f"--shards {shards} must be between 1 and {MOST_SHARDS:,}")


def part_name(number: int, suffix: str = "beton") -> str:
    """The file name of a set's part, counted from 0; of its hashes (`hashes`) or its manifest (`json`)."""
    return f"part-{number:05d}.{suffix}"


def number_of(name: str) -> int | None:
    """The number of the part that a file of this name is of, however many digits it has; None where it is of none."""
    found = re.fullmatch(r"part-([0-9]{1,9})\.(?:beton|hashes|json)", name)
    return int(found[1]) if found else None
