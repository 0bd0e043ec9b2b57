"""The end of writing a set: the manifests of all parts become one `index.json`, which makes it a set to train on."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sources.duplicates import DUPLICATES, count_duplicates, duplicates_file
from fastpmae_loaders.sources.set_index import INDEX, SetIndex
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.values import checked
from fastpmae_loaders.write.deduplicate import find_duplicates
from fastpmae_loaders.write.manifests import Manifest, is_there, read_manifest, read_plan
from fastpmae_loaders.write.shards import part_name
from fastpmae_loaders.write.targets import Target, open_target

BAD = "bad.txt"
"""Lists the images that were left out of a set, if there are any."""
_SHOWN = 5


@dataclass(frozen=True)
class WrittenSet:
    """What is in a finished set. `bad`: (name, reason) of each image that was left out.

    `duplicates`: images whose bytes another before them has; None where they were not asked about.
    """

    path: str
    index: SetIndex
    kept: int
    duplicates: int | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)

    @property
    def file_size(self) -> int:
        """Bytes of all parts."""
        return sum(shard.bytes for shard in self.index.shards)


@checked
def finish_set(out: str | os.PathLike[str] | Address, deduplicate: bool = False) -> WrittenSet:
    """Writes the index of a set whose parts are all there; again, if it is there already, to the same bytes.

    Labels that are words are numbered in each part by itself. The index has the names of all, in the parts' own order
    where that is the same in all of them, else sorted; who reads a part goes by its names.

    Args:
        deduplicate: note which images have the bytes of one before them, in `duplicates.bits`: no epoch shows them.

    Raises:
        UserError: where parts are missing, which it names, or have labels that do not go together.
    """
    target = open_target(out)
    found = read_plan(target)
    if found is None:
        raise UserError(f"{target.shown} has no plan.json: it is no folder that parts of a set were written to")
    return finish(target, *found, deduplicate)


def finish(target: Target, plan: str, parts: int, deduplicate: bool = False) -> WrittenSet:
    """As `finish_set`, for the set of this plan."""
    manifests = whole_manifests(target, plan, parts)
    shards = tuple(manifest.shard for manifest in manifests if manifest.shard is not None)
    bad = [entry for manifest in manifests for entry in manifest.bad]
    if not shards:
        first = f" (the first: {bad[0][0]}: {bad[0][1]})" if bad else ""
        raise UserError(f"{target.shown}: none of the parts has an image{first}")
    index = SetIndex(shards, vocabulary(target, manifests))
    if bad:
        with target.writing(BAD) as beside:
            beside.write_text("".join(f"{name}\t{reason}\n" for name, reason in bad), encoding="utf-8")
    else:
        target.remove(BAD)
    duplicates = None
    if deduplicate:
        bits = find_duplicates(target, manifests)
        duplicates = count_duplicates(bits)
        with target.writing(DUPLICATES) as beside:
            beside.write_bytes(duplicates_file(bits, index))
    else:
        target.remove(DUPLICATES)
    # last: it makes of the parts a set
    with target.writing(INDEX) as beside:
        beside.write_text(index.to_json(), encoding="utf-8")
    return WrittenSet(target.shown, index, sum(manifest.kept for manifest in manifests), duplicates, bad)


def whole_manifests(target: Target, plan: str, parts: int) -> list[Manifest]:
    """Those of all parts. UserError names the parts that are missing, or not whole."""
    manifests, missing = [], []
    for number in range(parts):
        manifest = read_manifest(target, number)
        if manifest is None or manifest.plan != plan or not is_there(target, manifest):
            missing.append(part_name(number, "beton"))
        else:
            manifests.append(manifest)
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN:,} more" if len(missing) > _SHOWN else "")
        raise UserError(
            f"{target.shown}: {len(missing):,} of {parts:,} parts are missing or not whole: {shown}; write them first "
            "with the command that wrote the others"
        )
    return manifests


def vocabulary(target: Target, manifests: Sequence[Manifest]) -> tuple[str, ...] | None:
    """The names of the labels of all parts; None where labels are numbers, or there are none.

    Raises:
        UserError: where they are words in one part and numbers in another.
    """
    named = [manifest for manifest in manifests if manifest.classes is not None]
    numbered = next((manifest for manifest in manifests if manifest.classes is None and manifest.labelled), None)
    if not named:
        return None
    if numbered is not None:
        raise UserError(
            f"{target.shown}: labels are words in {part_name(named[0].number, 'beton')} and numbers in "
            f"{part_name(numbered.number, 'beton')}: make them the same in all of the source and write it anew"
        )
    lists = {manifest.classes for manifest in named if manifest.classes is not None}
    return lists.pop() if len(lists) == 1 else tuple(sorted({name for names in lists for name in names}))
