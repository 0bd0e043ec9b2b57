"""`fastpmae-write`: a folder of images, tar shards or a Hugging Face data set becomes one .beton file."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from fastpmae_loaders.cli.outputs import check_no_run_file, check_output
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.machine import usable_cores
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.beton import Beton
from fastpmae_loaders.stores.address import Address, place_of
from fastpmae_loaders.values import NAME_MAX, check_replaceable, checked, local_path
from fastpmae_loaders.write.images import ImageSettings, StoredImage, prepare_judge, store
from fastpmae_loaders.write.pages import LARGEST_PAGE, PageWriter
from fastpmae_loaders.write.sources import (
    Item,
    Listing,
    SourceSettings,
    list_found,
    look_into,
    name_in,
    read_item,
    spread,
)
from fastpmae_loaders.write.store_target import StoreTarget
from fastpmae_loaders.write.table_reader import confine
from fastpmae_loaders.write.workers import Failure, WorkerPool

PAGE_SIZE = 8 << 20
SMALLEST_PAGE = 2 << 20  # FFCV's own limit
MOST_WORKERS = 1024
TIMEOUT = 60.0


class BadImages(UserError):
    """Some images are not sound and none may be left out. `bad`: (name, reason) of each."""

    def __init__(self, bad: list[tuple[str, str]], total: int, sentence: str | None = None):
        super().__init__(
            sentence
            or f"{len(bad):,} of {total:,} images cannot be stored, so nothing was written; "
            "--skip-bad writes the file without them"
        )
        self.bad = bad


@dataclass
class Written:
    """What became of a source. `bad`: (name, reason) of each image that was left out.

    `dark`: (name, the white that would suit it) of gray of 16 bits that came out nearly black. `hashes`: of the stored
    bytes of each image, where the converter makes them.
    """

    path: Path | Address
    samples: int = 0
    kept: int = 0
    converted: int = 0
    passed_over: int = 0
    file_size: int = 0
    class_names: list[str] | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dark: list[tuple[str, int]] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)


@checked
def write_beton(
    source: str | os.PathLike[str] | Address,
    out: str | os.PathLike[str] | Address,
    *,
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
) -> Written:
    """Writes the images of `source` into the .beton file `out`, which appears whole or not at all.

    The bytes of the file depend on the source and the settings, never on `workers` (default: one a core).
    Samples are in the order of their names; `limit` takes that many, spread evenly. Settings of
    `ImageSettings` may be given by name, as in write_beton("photos", "photos.beton", max_size=512).

    Raises BadImages when images cannot be stored, after all of them were tried, unless `skip_bad` leaves
    them out and lists them in `out` + ".bad.txt"; UserError for anything else that is wrong.
    """
    images = replace(images or ImageSettings(), **settings)
    count = workers if workers is not None else min(usable_cores(), MOST_WORKERS)
    check_numbers(count, limit, page_size, timeout)
    place = place_of(out)
    target = target_of(source, place, force)
    progress = progress or Progress()
    progress.phase(f"Looking for images in {printable(str(source))}")
    found = look_into(source, listing)
    listed = list_found(found)
    spread(listed, limit)
    prepare_judge(images)
    setup = ("fastpmae_loaders.write.write:converter", (images, f"{found.base}/"), count, timeout)
    with found.brought(listed):
        return write_there(place, target, listed, source, setup, skip_bad, force, page_size, progress)


def target_of(source: str | os.PathLike[str], place: Path | Address, force: bool) -> StoreTarget | None:
    """The folder in a store that a file is put in; None for one of this machine. UserError where it may not be written,
    as where it is there already and not to be replaced."""
    origin = place_of(source)
    if isinstance(place, Path):
        if isinstance(origin, Address):
            check_output(place, force=force)
        else:
            check_out(origin, place, force)
        return None
    if not place.name:
        raise UserError(f"{place} names a bucket and no file: write {place}/NAME.beton")
    if place == origin:
        raise UserError(f"{place} is the source itself; name another file to write")
    target = StoreTarget(place.parent)
    for name in () if force else (place.name, bad_list_path(Path(place.name)).name):
        if target.size(name) is not None:
            raise UserError(f"{place.parent / name} exists already; --force replaces it")
    return target


def write_there(
    place: Path | Address,
    target: StoreTarget | None,
    found: Listing,
    source: str | os.PathLike[str],
    setup: tuple[str, tuple[Any, ...], int, float],
    skip_bad: bool,
    force: bool,
    page_size: int,
    progress: Progress,
) -> Written:
    """`write_listed` to a file of this machine, or to one that is then put in the store."""
    if target is None or isinstance(place, Path):
        return write_listed(found, source, Path(place), setup, skip_bad, force, page_size, progress)
    with target.writing(place.name) as beside:
        written = write_listed(found, source, beside, setup, skip_bad, force, page_size, progress)
        bad = bad_list_path(Path(place.name)).name
        if written.bad:
            with target.writing(bad) as copy:
                copy.write_bytes(bad_list_path(beside).read_bytes())
        elif force and target.size(bad) is not None:
            target.remove(bad)  # of a file that is being replaced
    return replace(written, path=place)


def write_listed(
    found: Listing,
    source: str | os.PathLike[str],
    out: Path,
    setup: tuple[str, tuple[Any, ...], int, float],
    skip_bad: bool,
    force: bool,
    page_size: int,
    progress: Progress,
) -> Written:
    """Writes what a worker's function makes of each item into `out`, as `write_beton` does.

    `setup` is a WorkerPool's: the function's maker, its arguments, how many workers, and seconds for an item.
    """
    for note in found.notes:
        progress.tell(note)
    written = Written(out, passed_over=found.passed_over, class_names=found.class_names, notes=found.notes)
    maker, arguments, workers, timeout = setup
    workers = max(1, min(workers, len(found.items)))
    with atomic_write(out, force) as beside, beside.open("wb") as file:
        pages = PageWriter(file, len(found.items), page_size)
        with WorkerPool(maker, arguments, workers, timeout, tell=progress.tell) as pool:
            store_items(found, pool, pages, written, skip_bad, progress)
        if written.bad and not skip_bad:
            raise BadImages(written.bad, len(found.items))
        if not pages.samples:
            name, reason = written.bad[0]
            raise UserError(
                f"{printable(str(source))}: none of {len(found.items):,} images can be stored (the first: {name}: "
                f"{printable(reason)})"
            )
        written.file_size = pages.finish(found.class_names)
        file.flush()
        Beton(file.name)  # what is about to take its place opens, by the rules for files of strangers
        _list_bad(out, written.bad, force)
    if written.dark:
        written.notes.append(told_dark(written.dark))
        progress.tell(written.notes[-1])
    return written


def store_items(
    found: Listing, pool: WorkerPool, pages: PageWriter, written: Written, skip_bad: bool, progress: Progress
) -> None:
    """Adds what the pool makes of each item to the pages, in order, and counts it in `written`."""
    with progress.count(len(found.items), "images"):
        for place, result in pool.in_order(found.items, _same_group, _group_size(found)):
            _take(found.items[place], result, pages, written, skip_bad)
            progress.advance()


def told_dark(dark: list[tuple[str, int]]) -> str:
    """A note on gray of 16 bits that comes out nearly black."""
    white = max(better for _, better in dark)
    images = "image of 16-bit gray is" if len(dark) == 1 else "images of 16-bit gray are"
    return (
        f"{len(dark):,} {images} nearly black (the first: {dark[0][0]}): 65535 counts as white, and no value is above "
        f"{white}. If {white} is white in them, write them anew with --white {white}"
    )


def converter(settings: ImageSettings, base: str = ""):
    """What a worker process calls for each item: read it, make it what is stored. `base` is as of `name_in`."""
    Image.MAX_IMAGE_PIXELS = None  # ours is asked in its place, before anything is decoded
    prepare_judge(settings)

    def converted(place: int, item: Item) -> StoredImage:
        if item.kind in ("parquet", "arrow"):
            confine(item.path, settings.max_pixels)
        return store(read_item(item), settings, name_in(base, item))

    return converted


def _take(item: Item, result: StoredImage | Failure, pages: PageWriter, written: Written, skip_bad: bool) -> None:
    if isinstance(result, Failure):
        written.bad.append((item.name, result.reason))
        return
    if written.bad and not skip_bad:
        return  # there will be no file: the rest is only tried
    try:
        pages.add(result.mode, result.width, result.height, item.label, result.data)
    except UserError as error:
        written.bad.append((item.name, str(error)))
        return
    written.hashes.append(result.digest)
    if result.better_white is not None:
        written.dark.append((item.name, result.better_white))
    written.samples += 1
    written.kept += result.kept
    written.converted += not result.kept


def _same_group(a: Item, b: Item) -> bool:
    """Rows of one row group go together, since a worker has to read the whole of it for any of them."""
    return a.kind != "parquet" or (b.kind == "parquet" and a.path == b.path and a.where[0] == b.where[0])


def _group_size(found: Listing) -> int:
    return 64 if any(item.kind == "parquet" for item in found.items[:1]) else 8


def check_numbers(workers: int, limit: int | None, page_size: int, timeout: float) -> None:
    if not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"--workers is {workers}; it must lie between 1 and {MOST_WORKERS}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; it must be positive")
    if page_size & (page_size - 1) or not SMALLEST_PAGE <= page_size <= LARGEST_PAGE:
        raise UserError(
            f"--page-size is {page_size}; it must be a power of two between {SMALLEST_PAGE} and {LARGEST_PAGE}"
        )
    if not timeout > 0:
        raise UserError(f"--timeout is {timeout:g}; it must be a positive number of seconds")


def check_out(source: Path, out: Path, force: bool) -> None:
    """UserError where `out` may not be written, or is the source."""
    for path in (source, out):
        local_path(path)
    name = printable(str(out))
    try:
        check_replaceable(out)
        _check_bad_list(source, out)
        if os.path.lexists(out):
            if not force:
                raise UserError(f"{name} exists already; --force replaces it")
            if source.exists() and out.exists() and out.samefile(source):
                raise UserError(f"{name} is the source itself; name another file to write")
            if source.is_dir() and out.suffix != ".beton" and out.resolve().is_relative_to(source.resolve()):
                raise UserError(f"{name} is a file of the source; name another file to write")
        elif not force and os.path.lexists(bad_list_path(out)):
            raise UserError(f"{printable(str(bad_list_path(out)))} exists already; --force replaces it")
        if not out.parent.is_dir():
            raise UserError(f"the folder {printable(str(out.parent))} does not exist; make it first")
        check_no_run_file(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _check_bad_list(source: Path, out: Path) -> None:
    """See that bad images could be listed beside `out`, and that no source lies where the list would be."""
    path, name = bad_list_path(out), printable(str(bad_list_path(out)))
    if len(os.fsencode(path.name)) > NAME_MAX:
        raise UserError(f"{name}, the list of bad images, would have too long a name: name another file to write")
    if path.is_dir():
        raise UserError(f"{name} is a folder, where bad images would be listed; name another file to write")
    if source.exists() and path.exists() and path.samefile(source):
        raise UserError(f"{name} is the source itself; name another file to write")


def bad_list_of(out: Path | Address) -> str:
    """Where the bad images of a file are listed, as a sentence says it."""
    if isinstance(out, Address):
        return str(out.parent / bad_list_path(Path(out.name)).name)
    return str(bad_list_path(out))


def bad_list_path(out: Path) -> Path:
    """Where the images that were left out of `out` are listed."""
    return out.with_name(out.name + ".bad.txt")


def _list_bad(out: Path, bad: list[tuple[str, str]], force: bool) -> None:
    path = bad_list_path(out)
    if bad:
        lines = "".join(f"{name}\t{printable(reason)}\n" for name, reason in bad)
        # A link of that name is replaced, as `out` is, and not what it points to.
        with atomic_write(path, force) as beside:
            beside.write_text(lines, encoding="utf-8")
    else:
        path.unlink(missing_ok=True)  # of a file that is being replaced
