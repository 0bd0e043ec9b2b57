"""What goes into which part of a set: decided by the source's files, the same on every machine.

A folder's images are listed, since their labels come of all folders together, and cut into parts of equal numbers. Tar
shards and tables are cut without being opened: whole files where the parts divide them, else a share of one, so that
100 files make 8 parts or 4,096. A set would lose images of one that grows between two parts, so their sizes are part of
the plan.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable
from fastpmae_loaders.write.images import ImageSettings
from fastpmae_loaders.write.shards import check_shards, shard_ranges
from fastpmae_loaders.write.sources import (
    Found,
    Item,
    Listing,
    SourceSettings,
    list_files,
    list_found,
    look_into,
    name_in,
    spread,
)


@dataclass(frozen=True)
class Stretch:
    """A share of a file's n images: from `first` n / `parts` on to before `last` n / `parts`, both rounded down.

    size: of the file in bytes, as it was planned with.
    """

    name: str
    size: int
    first: int
    last: int
    parts: int

    def holds(self, place: int, count: int) -> bool:
        """Whether it holds the image at this place of `count`."""
        return self.first * count // self.parts <= place < self.last * count // self.parts


@dataclass(frozen=True)
class Part:
    """What one part is made of: images that are listed already, or stretches of files that are yet to be.

    `source`: the source without the names of its files; `bad`: what was found unusable where files were looked for.
    """

    number: int
    plan: str
    listing: Listing | None
    source: Found
    stretches: tuple[Stretch, ...] = ()
    bad: tuple[Item, ...] = ()

    def files(self) -> set[str]:
        """The paths of the files that its images are in."""
        if self.listing is not None:
            return {item.path for item in self.listing.items if item.kind != "bad"}
        return {str(self.source.base / stretch.name) for stretch in self.stretches}

    def list(self) -> Listing:
        """Its images, in order. UserError where the files cannot be understood, or are not those of the plan."""
        if self.listing is not None:
            return self.listing
        if not self.stretches:
            return Listing(list(self.bad))
        with self.source.named():
            return self._listed()

    def _listed(self) -> Listing:
        listing = list_files(self.source, [stretch.name for stretch in self.stretches])
        of_file = {str(self.source.base / stretch.name): stretch for stretch in self.stretches}
        for path, stretch in of_file.items():
            if Path(path).stat().st_size != stretch.size:
                raise UserError(
                    f"{printable(path)} has changed since the set was begun: its parts would lose images, or hold some "
                    "twice; write the set anew when the source stays as it is"
                )
        counts = Counter(item.path for item in listing.items if item.kind != "bad")
        places: Counter[str] = Counter()
        taken: list[Item] = []
        for item in listing.items:
            stretch = of_file[item.path]
            if item.kind == "bad":  # what a file lost at its end, told by the part that has the end
                if stretch.last == stretch.parts:
                    taken.append(item)
            else:
                if stretch.holds(places[item.path], counts[item.path]):
                    taken.append(item)
                places[item.path] += 1
        listing.items = [*taken, *self.bad]
        return listing


@dataclass(frozen=True)
class Plan:
    """How a source becomes a set of `parts`.

    digest: of all that decides about the bytes of the set but the images themselves: names in the source, sizes of its
        tar shards and tables, and settings.
    passed_over: files that are none of the images.
    """

    parts: int
    digest: str
    passed_over: int
    notes: list[str]
    _source: Found
    _listing: Listing | None
    _ranges: list[range]
    _sizes: list[int]

    def part(self, number: int) -> Part:
        """What the part of this number, from 0, is made of."""
        # a task that travels to another machine takes no names of files with it that are not its own
        source = self._source.without_files()
        if self._listing is not None:
            own = [self._listing.items[place] for place in self._ranges[number]]
            return Part(number, self.digest, Listing(own, self._listing.class_names), source)
        stretches = tuple(_stretches(self._source.names, self._sizes, number, number + 1, self.parts))
        bad = tuple(self._source.files.bad) if number + 1 == self.parts else ()
        return Part(number, self.digest, None, source, stretches, bad)


def _stretches(names: list[str], sizes: list[int], first: int, last: int, parts: int) -> Iterable[Stretch]:
    """The share from first/parts to last/parts of all files, each of which counts as much as another."""
    begin, end = first * len(names), last * len(names)
    for place in range(begin // parts, -(-end // parts)):
        share = max(begin - place * parts, 0), min(end - place * parts, parts)
        if share[0] < share[1]:
            yield Stretch(names[place], sizes[place], *share, parts)


def plan_set(
    source: str | os.PathLike[str],
    parts: int,
    images: ImageSettings,
    listing: SourceSettings | None = None,
    limit: int | None = None,
    page_size: int = 0,
) -> Plan:
    """The plan of a set of `parts`; with `limit`, of so many images spread evenly over the source.

    Raises:
        UserError: where the source cannot be understood, or has fewer files or images than there should be parts.
    """
    check_shards(parts)
    found = look_into(source, listing)
    whole = list_found(found) if found.kind == "folder" or limit is not None or not found.names else None
    if whole is not None:
        spread(whole, limit)
    ranges = shard_ranges(len(whole.items), parts) if whole is not None else []
    settings = {
        "images": asdict(images),
        "listing": asdict(found.settings),
        "limit": limit,
        "page_size": page_size,
        "parts": parts,
        "source": found.kind,
        "classes": whole.class_names if whole else None,
    }
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    sizes = [found.size_of(name) for name in found.names] if whole is None else []
    for entry in _entries(found, sizes, whole):
        digest.update(entry + b"\0\0")
    notes = whole.notes if whole else found.files.notes() + found.notes
    passed_over = whole.passed_over if whole else found.others
    return Plan(parts, digest.hexdigest(), passed_over, notes, found, whole, ranges, sizes)


def _entries(found: Found, sizes: list[int], whole: Listing | None) -> Iterable[bytes]:
    """What there is in a source, by names relative to it: it may lie elsewhere on another machine."""
    if whole is None:
        yield from (b"%b\0%d" % (os.fsencode(name), size) for name, size in zip(found.names, sizes, strict=True))
        return
    base = f"{found.base}/"
    for item in whole.items:
        yield b"%b\0%d" % (name_in(base, item), item.label)
