"""What a set's writers leave for each other: the plan that all follow, and a manifest for each part that is done.

A manifest is put last, so a part that has one is whole, and who comes to it again passes it over. They come from a
folder or bucket that others write to, and are taken for hostile until they prove sound.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from fastpmae_loaders.errors import BetonError, UserError
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.sources.set_index import Shard, shard_from
from fastpmae_loaders.write.shards import MOST_SHARDS, number_of, part_name
from fastpmae_loaders.write.targets import Target

PLAN = "plan.json"
_PLAN_FORMAT, _PART_FORMAT, _VERSION = "fastpmae-plan", "fastpmae-part", 1


@dataclass(frozen=True)
class Manifest:
    """What became of one part. `shard` is None where it has no image, and no file.

    classes: names of the labels in this part's file, by number, where they are words; labelled: whether any image has
    a label. bad: (name, reason) of each image that was left out.
    """

    plan: str
    number: int
    shard: Shard | None
    classes: tuple[str, ...] | None = None
    labelled: bool = False
    kept: int = 0
    bad: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        """The file's text; `read_manifest` reads it."""
        found = {
            "format": _PART_FORMAT,
            "version": _VERSION,
            "plan": self.plan,
            "number": self.number,
            "shard": None if self.shard is None else self.shard.entry(),
            "classes": self.classes,
            "labelled": self.labelled,
            "kept": self.kept,
            "bad": self.bad,
            "notes": self.notes,
        }
        return json.dumps(found, sort_keys=True) + "\n"


def read_manifest(target: Target, number: int) -> Manifest | None:
    """The manifest of a part; None where there is none.

    Raises:
        UserError: where one is there and not as a writer leaves it.
    """
    name = part_name(number, "json")
    found = _read(target, name, _PART_FORMAT)
    if found is None:
        return None
    where = f"{target.shown}/{name}"
    try:
        shard = None if found["shard"] is None else shard_from(found["shard"])
        classes = None if found["classes"] is None else tuple(map(printable, _texts(found["classes"])))
        bad = tuple((printable(name), printable(reason)) for name, reason in map(_texts, found["bad"]))
        notes = tuple(map(printable, _texts(found["notes"])))
        plan, at, labelled, kept = (found[key] for key in ("plan", "number", "labelled", "kept"))
        if type(plan) is not str or type(labelled) is not bool or type(kept) is not int:
            raise TypeError
        if shard is not None and (shard.name != part_name(number, "beton") or not 0 <= kept <= shard.images):
            raise ValueError
        if at != number:
            raise ValueError
    except BetonError as error:
        raise UserError(f"{where}: {error}; remove it and run the same command again") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where} is no manifest of this part; remove it and run the same command again") from None
    return Manifest(plan, number, shard, classes, labelled, kept, bad, notes)


def is_there(target: Target, manifest: Manifest) -> bool:
    """Whether the files that a manifest speaks of are there, by their sizes."""
    if manifest.shard is None:
        return True
    number = manifest.number
    sizes = target.size(part_name(number, "beton")), target.size(part_name(number, "hashes"))
    return sizes == (manifest.shard.bytes, hashes_size(manifest.shard.images))


def follow(target: Target, plan: str, parts: int, force: bool = False) -> None:
    """See that all who write to this target follow one plan: the first leaves it, the others compare.

    Args:
        force: a set by another plan is replaced.

    Raises:
        UserError: where another source or other settings are being written there.
    """
    known = read_plan(target)
    if known != (plan, parts):
        if known is not None and not force:
            raise UserError(
                f"{target.shown} holds a set, or parts of one, of {known[1]:,} parts with other settings or of a "
                "source with other files: name another folder, or replace it with --force"
            )
        names = sorted(target.names())
        if known is None and not force:
            # a set whose plan is lost, or was never copied along; or another process has begun this one just now
            strange = _strange(target, plan, parts, names)
            if strange is not None and read_plan(target) != (plan, parts):
                raise UserError(
                    f"{target.shown} holds a set, or parts of one, of which no {PLAN} tells that it is this one "
                    f"({strange}): name another folder, or replace it with --force"
                )
        target.remove("index.json")
        if force:
            for name in names:
                if (number_of(name) or 0) >= parts:
                    target.remove(name)
        found = {"format": _PLAN_FORMAT, "version": _VERSION, "plan": plan, "parts": parts}
        with target.writing(PLAN) as beside:
            beside.write_text(json.dumps(found, sort_keys=True) + "\n", encoding="utf-8")
        if read_plan(target) != (plan, parts):
            raise UserError(f"somebody else began another set in {target.shown} at the same time: name another folder")


def _strange(target: Target, plan: str, parts: int, names: list[str]) -> str | None:
    """A file of a set that no manifest of this plan speaks of; None where there is none."""
    ours = set[int]()
    for name in names:
        number = number_of(name)
        if number is not None and name.endswith(".json"):
            manifest = read_manifest(target, number)
            if number >= parts or manifest is None or manifest.plan != plan:
                return name
            ours.add(number)
    strange = (name for name in names if number_of(name) is not None and number_of(name) not in ours)
    return next(strange, None) or ("index.json" if "index.json" in names and not ours else None)


def read_plan(target: Target) -> tuple[str, int] | None:
    """(plan, number of parts) of the set in a target; None where none was begun.

    Raises:
        UserError: for what is no plan.
    """
    found = _read(target, PLAN, _PLAN_FORMAT)
    if found is None:
        return None
    plan, parts = found.get("plan"), found.get("parts")
    if type(plan) is not str or type(parts) is not int or not 1 <= parts <= MOST_SHARDS:
        raise UserError(f"{target.shown}/{PLAN} is no plan of a set; remove it and run the same command again")
    return plan, parts


HASH = 16
"""Bytes of an image's hash: BLAKE2b of the bytes that the part stores of it."""
HASHES_MAGIC = b"fastpmae hashes\x01"


def hashes_size(images: int) -> int:
    """Bytes of the file of hashes of a part with so many images."""
    return len(HASHES_MAGIC) + HASH * images


def _read(target: Target, name: str, kind: str) -> dict[str, Any] | None:
    blob = target.read(name)
    if blob is None:
        return None
    where = f"{target.shown}/{name}"
    try:
        found = json.loads(blob)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != kind:
        raise UserError(f"{where} was not written by fastpmae-write: remove it, or name another folder")
    if found.get("version") != _VERSION or type(found["version"]) is not int:
        raise UserError(
            f"{where} is of version {short(str(found.get('version')))}, and {_VERSION} is the only one that is read: "
            "update fastpmae"
        )
    return found


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError
    return values
