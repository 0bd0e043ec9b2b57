"""`fastpmae-write SRC OUT/ --shards N`: a source becomes a set of .beton files, by one process, by many, or on Ray."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import usable_cores
from fastpmae_loaders.printable import printable
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.values import checked
from fastpmae_loaders.write.finish import WrittenSet, finish
from fastpmae_loaders.write.images import ImageSettings
from fastpmae_loaders.write.manifests import Manifest, follow
from fastpmae_loaders.write.on_ray import check_place, write_on_ray
from fastpmae_loaders.write.parts import PartSettings, done_already, worker_pool, write_part
from fastpmae_loaders.write.plan import Part, plan_set
from fastpmae_loaders.write.shards import part_name
from fastpmae_loaders.write.sources import SourceSettings
from fastpmae_loaders.write.targets import Target, check_target, open_target
from fastpmae_loaders.write.write import MOST_WORKERS, PAGE_SIZE, TIMEOUT, BadImages, check_numbers


@checked
def write_set(
    source: str | os.PathLike[str] | Address,
    out: str | os.PathLike[str] | Address,
    shards: int,
    *,
    part: tuple[int, int] | None = None,
    on: str = "local",
    deduplicate: bool = False,
    images: ImageSettings | None = None,
    listing: SourceSettings | None = None,
    workers: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    force: bool = False,
    page_size: int = PAGE_SIZE,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
    **settings: Any,
) -> WrittenSet | None:
    """Writes the images of `source` into a set of `shards` parts in the folder `out`.

    What is there already by the same plan is kept, so that the same call finishes one that was interrupted. With
    `part=(i, n)`, i from 0, it writes the i-th of n shares of the parts and returns None: processes on any machines do
    the others, and `finish_set` ends it. `on="ray"` hands the parts to this machine's Ray cluster, or to one that is
    started for the time, and "ray://HEAD" to the one at that address; a task takes `workers` cores, by default one. The
    bytes depend on the source and the settings alone. `deduplicate` is as of
    `finish_set`, other arguments are as of `write_beton`; `force` replaces a set by another plan.

    Raises BadImages when images cannot be stored, after all were tried: the parts that hold none of them are written.
    """
    images = replace(images or ImageSettings(), **settings)
    check_place(on)
    if part is not None and (on != "local" or deduplicate):
        raise UserError("--part is a share of the work of many: leave out --on, and give --deduplicate to --finish")
    count = workers if workers is not None else min(usable_cores(), MOST_WORKERS) if on == "local" else 1
    check_numbers(count, limit, page_size, timeout)
    progress = progress or Progress()
    check_target(source, out)
    progress.phase(f"Looking for images in {printable(str(source))}")
    plan = plan_set(source, shards, images, listing, limit, page_size)
    for note in plan.notes:
        progress.tell(note)
    numbers = share(shards, part)
    target = open_target(out)
    follow(target, plan.digest, shards, force)
    how = PartSettings(images, page_size, timeout, skip_bad, force)
    failures: list[BadImages] = []
    kept: list[Manifest] = []

    def keep(manifest: Manifest) -> None:
        kept.append(manifest)
        if on != "local":  # where parts are counted, and not their images
            progress.advance()

    parts = _not_there(map(plan.part, numbers), target, force, keep)
    told = set(plan.notes)
    if on == "local":
        done = _write_here(parts, target, how, count, progress, failures)
    else:
        done = _counted(write_on_ray(on, parts, str(out), how, count, failures), shards, progress)
    for manifest in chain(done, kept):
        for note in manifest.notes:
            if note not in told:
                progress.tell(note)
                told.add(note)
    raise_bad(failures, len(numbers))
    if kept:
        progress.tell(_told_kept(target, len(kept), len(numbers)))
    return None if part is not None else finish(target, plan.digest, shards, deduplicate)


def share(shards: int, part: tuple[int, int] | None) -> range:
    """The numbers of the parts that the i-th of n processes writes, i from 0; all of them where it is the only one.

    Raises:
        UserError: where there is no such process.
    """
    number, of = part or (0, 1)
    if of < 1 or not 0 <= number < of:
        raise UserError(f"--part is {number}/{of}; of n processes the first is 0/n and the last (n - 1)/n")
    return range(number * shards // of, (number + 1) * shards // of)


def _not_there(parts: Iterator[Part], target: Target, force: bool, keep: Callable[[Manifest], None]) -> Iterator[Part]:
    """The parts that are to be written; `keep` takes the manifests of the others."""
    for part in parts:
        manifest = done_already(part, target, force)
        if manifest is None:
            yield part
        else:
            keep(manifest)


def _told_kept(target: Target, kept: int, parts: int) -> str:
    """That parts were kept: a part is known by names, and an image that was replaced under its name is not seen."""
    which = "The part was" if parts == 1 else "1 part was" if kept == 1 else f"{kept:,} of {parts:,} parts were"
    return (
        f"{which} in {target.shown} already, from files of the same names with the same settings, and kept. Where "
        "images were replaced under their names, write the set into another folder."
    )


def _write_here(
    parts: Iterator[Part],
    target: Target,
    settings: PartSettings,
    workers: int,
    progress: Progress,
    failures: list[BadImages],
) -> Iterator[Manifest]:
    """Writes parts by this process and its workers, one after another; those with bad images go to `failures`."""
    pool = None
    try:
        for part in parts:
            pool = pool or worker_pool(settings, part, workers, progress.tell)
            try:
                manifest = write_part(part, target, settings, pool, progress)
            except BadImages as bad:
                failures.append(bad)
                continue
            progress.tell(describe(manifest))
            yield manifest
    finally:
        if pool is not None:
            pool.close()


def _counted(manifests: Iterator[Manifest], parts: int, progress: Progress) -> Iterator[Manifest]:
    with progress.count(parts, "parts"):
        for manifest in manifests:
            progress.advance()
            yield manifest


def describe(manifest: Manifest) -> str:
    """A line about a part that is done."""
    shard, name = manifest.shard, part_name(manifest.number, "beton")
    return f"{name}: no images" if shard is None else f"{name}: {shard.images:,} images, {shard.bytes:,} bytes"


def raise_bad(failures: Sequence[BadImages], parts: int) -> None:
    """BadImages of all parts together, where there are any."""
    if failures:
        bad = [entry for failure in failures for entry in failure.bad]
        images = "1 image cannot" if len(bad) == 1 else f"{len(bad):,} images cannot"
        raise BadImages(
            bad,
            len(bad),
            f"{images} be stored, so {len(failures):,} of {parts:,} parts were not written; the same command with "
            "--skip-bad writes these without them",
        )
