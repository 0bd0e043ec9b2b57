"""One part of a set: some images of a source become a .beton, its images' hashes and, last, a manifest.

The bytes of all three depend on the plan, the source and the settings alone, so that it does not matter which machine
writes a part, how often, or after whom.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.sources.set_index import Shard, shard_of
from fastpmae_loaders.write.images import ImageSettings, StoredImage, prepare_judge
from fastpmae_loaders.write.manifests import (
    HASH,
    HASHES_MAGIC,
    Manifest,
    is_there,
    read_manifest,
)
from fastpmae_loaders.write.pages import PageWriter
from fastpmae_loaders.write.plan import Part
from fastpmae_loaders.write.shards import part_name
from fastpmae_loaders.write.sources import Item, Listing
from fastpmae_loaders.write.targets import Target
from fastpmae_loaders.write.workers import WorkerPool
from fastpmae_loaders.write.write import PAGE_SIZE, TIMEOUT, BadImages, Written, converter, store_items, told_dark


@dataclass(frozen=True)
class PartSettings:
    """How parts are written. force: a part by another plan is replaced; one by this plan never is."""

    images: ImageSettings
    page_size: int = PAGE_SIZE
    timeout: float = TIMEOUT
    skip_bad: bool = False
    force: bool = False


class _NoImages(Exception):
    """A part comes out empty. Never leaves this module."""


def hashing_converter(settings: ImageSettings, base: str = "") -> Callable[[int, Item], StoredImage]:
    """What a worker process calls for each item: as `converter`, and the hash of what is stored."""
    converted = converter(settings, base)

    def hashed(place: int, item: Item) -> StoredImage:
        stored = converted(place, item)
        return replace(stored, digest=hashlib.blake2b(stored.data, digest_size=HASH).digest())

    return hashed


def worker_pool(settings: PartSettings, part: Part, workers: int, tell: Callable[[str], None]) -> WorkerPool:
    """The processes that convert the images of any number of parts like this one: an image that kills its process costs
    itself.
    """
    prepare_judge(settings.images)
    task = "fastpmae_loaders.write.parts:hashing_converter"
    return WorkerPool(task, (settings.images, f"{part.source.base}/"), workers, settings.timeout, tell=tell)


def done_already(part: Part, target: Target, force: bool) -> Manifest | None:
    """The manifest of a part that is whole, by the plan at hand; None where it is to be written.

    Raises:
        UserError: where it is of another plan, which only `force` replaces.
    """
    try:
        manifest = read_manifest(target, part.number)
    except UserError:
        if not force:
            raise
        return None
    if manifest is None:
        return None
    if manifest.plan != part.plan:
        if force:
            return None
        raise UserError(
            f"{target.shown}/{part_name(part.number, 'json')} is of another set, by other settings or of another "
            "source: name another folder, or replace it with --force"
        )
    return manifest if is_there(target, manifest) else None


def write_part(part: Part, target: Target, settings: PartSettings, pool: WorkerPool, progress: Progress) -> Manifest:
    """Writes one part into a target, its manifest last.

    Raises:
        BadImages: after all of its images were tried, when one cannot be stored and `skip_bad` is not set.
        UserError: for anything else that is wrong.
    """
    with part.source.present(part.files()):
        return _written(part, target, settings, pool, progress)


def _written(part: Part, target: Target, settings: PartSettings, pool: WorkerPool, progress: Progress) -> Manifest:
    listing = part.list()
    written = Written(Path(target.shown), class_names=listing.class_names, notes=listing.notes)
    try:
        with target.writing(part_name(part.number, "beton")) as beside:
            shard = _store(listing, beside, written, settings, pool, progress)
    except _NoImages:
        shard = None
    if written.dark:
        written.notes.append(told_dark(written.dark))
    if shard is not None:
        with target.writing(part_name(part.number, "hashes")) as beside:
            beside.write_bytes(HASHES_MAGIC + b"".join(written.hashes))
    names = written.class_names
    manifest = Manifest(
        part.plan,
        part.number,
        shard,
        None if names is None else tuple(names),
        any(item.label != -1 for item in listing.items),
        written.kept,
        tuple(written.bad),
        tuple(written.notes),
    )
    with target.writing(part_name(part.number, "json")) as beside:
        beside.write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _store(
    listing: Listing, beside: Path, written: Written, settings: PartSettings, pool: WorkerPool, progress: Progress
) -> Shard:
    with beside.open("wb") as file:
        pages = PageWriter(file, len(listing.items), settings.page_size)
        store_items(listing, pool, pages, written, settings.skip_bad, progress)
        if written.bad and not settings.skip_bad:
            raise BadImages(written.bad, len(listing.items))
        if not pages.samples:
            raise _NoImages
        pages.finish(listing.class_names)
    return shard_of(beside)  # it opens, by the rules for files of strangers
