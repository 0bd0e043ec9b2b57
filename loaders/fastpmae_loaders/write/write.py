"""`fastpmae-write`: a folder of images, tar shards or a Hugging Face data set becomes one .beton file."""

import argparse
import os
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from PIL import Image

from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.outputs import check_no_run_file
from fastpmae_loaders.cli.progress import Tally
from fastpmae_loaders.cli.terminal import say, tell
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import appearing
from fastpmae_loaders.machine import usable_cores
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.sources.beton import Beton
from fastpmae_loaders.values import NAME_MAX, checked, local_path
from fastpmae_loaders.write.check import check_beton
from fastpmae_loaders.write.images import ImageSettings, StoredImage, store
from fastpmae_loaders.write.pages import LARGEST_PAGE, PageWriter
from fastpmae_loaders.write.sources import Item, Listing, SourceSettings, find_images, read_item
from fastpmae_loaders.write.table_reader import confine
from fastpmae_loaders.write.workers import Failure, WorkerPool

PAGE_SIZE = 8 << 20
SMALLEST_PAGE = 2 << 20  # FFCV's own limit
MOST_WORKERS = 1024
TIMEOUT = 60.0


class BadImages(UserError):
    """Some images are not sound and none may be left out. `bad`: (name, reason) of each."""

    def __init__(self, bad: list[tuple[str, str]], total: int):
        super().__init__(
            f"{len(bad):,} of {total:,} images cannot be stored, so nothing was written; "
            "--skip-bad writes the file without them"
        )
        self.bad = bad


@dataclass
class Written:
    """What became of a source. `bad`: (name, reason) of each image that was left out.

    `dark`: (name, the white that would suit it) of gray of 16 bits that came out nearly black.
    """

    path: Path
    samples: int = 0
    kept: int = 0
    converted: int = 0
    passed_over: int = 0
    file_size: int = 0
    class_names: list[str] | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dark: list[tuple[str, int]] = field(default_factory=list)


@checked
def write_beton(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    images: ImageSettings | None = None,
    listing: SourceSettings | None = None,
    workers: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    force: bool = False,
    page_size: int = PAGE_SIZE,
    timeout: float = TIMEOUT,
    tally: Tally | None = None,
    **settings: Any,
) -> Written:
    """Writes the images of `source` into the .beton file `out`, which appears whole or not at all.

    The bytes of the file depend on the source and the settings, never on `workers` (default: one a core).
    Samples are in the order of their names; `limit` takes that many, spread evenly. Settings of
    `ImageSettings` may be given by name, as in write_beton("photos", "photos.beton", max_size=512).

    Raises BadImages when images cannot be stored, after all of them were tried, unless `skip_bad` leaves
    them out and lists them in `out` + ".bad.txt"; UserError for anything else that is wrong.
    """
    out = Path(out)
    images = replace(images or ImageSettings(), **settings)
    count = workers if workers is not None else min(usable_cores(), MOST_WORKERS)
    _check_numbers(count, limit, page_size, timeout)
    _check_out(Path(source), out, force)
    tally = tally or Tally()
    tally.phase(f"Looking for images in {printable(str(source))}")
    found = find_images(source, listing)
    if limit is not None and limit < len(found.items):
        every = len(found.items) / limit
        found.items = [found.items[int((place + 0.5) * every)] for place in range(limit)]
    for note in found.notes:
        tally.tell(note)
    written = Written(out, passed_over=found.passed_over, class_names=found.class_names, notes=found.notes)
    with appearing(out, force) as beside, beside.open("wb") as file:
        pages = PageWriter(file, len(found.items), page_size)
        setup = ("fastpmae_loaders.write.write:converter", (images,), max(1, min(count, len(found.items))), timeout)
        with WorkerPool(*setup, tell=tally.tell) as pool, tally.count(len(found.items), "images"):
            for place, result in pool.in_order(found.items, _same_group, _group_size(found)):
                _take(found.items[place], result, pages, written, skip_bad)
                tally.advance()
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
        written.notes.append(_told_dark(written.dark))
        tally.tell(written.notes[-1])
    return written


def _told_dark(dark: list[tuple[str, int]]) -> str:
    white = max(better for _, better in dark)
    images = "image of 16-bit gray is" if len(dark) == 1 else "images of 16-bit gray are"
    return (
        f"{len(dark):,} {images} nearly black (the first: {dark[0][0]}): 65535 counts as white, and no value is above "
        f"{white}. If {white} is white in them, write them anew with --white {white}"
    )


def converter(settings: ImageSettings):
    """What a worker process calls for each item: read it, make it what is stored."""
    Image.MAX_IMAGE_PIXELS = None  # ours is asked in its place, before anything is decoded

    def converted(place: int, item: Item) -> StoredImage:
        if item.kind in ("parquet", "arrow"):
            confine(item.path, settings.max_pixels)
        return store(read_item(item), settings, place)

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


def _check_numbers(workers: int, limit: int | None, page_size: int, timeout: float) -> None:
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


def _check_out(source: Path, out: Path, force: bool) -> None:
    for path in (source, out):
        local_path(path)
    name = printable(str(out))
    try:
        if out.is_dir():
            raise UserError(f"{name} is a folder; name the file to write")
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


def bad_list_path(out: Path) -> Path:
    """Where the images that were left out of `out` are listed."""
    return out.with_name(out.name + ".bad.txt")


def _list_bad(out: Path, bad: list[tuple[str, str]], force: bool) -> None:
    path = bad_list_path(out)
    if bad:
        lines = "".join(f"{name}\t{printable(reason)}\n" for name, reason in bad)
        # A link of that name is replaced, as `out` is, and not what it points to.
        with appearing(path, force) as beside:
            beside.write_text(lines, encoding="utf-8")
    else:
        path.unlink(missing_ok=True)  # of a file that is being replaced


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastpmae-write",
        usage="fastpmae-write SRC OUT.beton [options]\n       fastpmae-write --check F.beton [--workers N]",
        description="Write images into one .beton file for training, or check such a file.",
        epilog="SRC is a folder with a folder for each class (split folders such as train and val may lie above "
        "them), a folder of images, a .tar file or a folder of them in WebDataset's layout, or the folder of a "
        "Hugging Face data set (parquet, arrow; needs pip install 'fastpmae[hf]'). Plain RGB JPEGs keep their "
        "bytes; everything else is turned upright, made 8-bit RGB (transparency on white, first frame of "
        "animations, colour profiles not applied) and encoded anew.",
    )
    add = parser.add_argument
    add("source", metavar="SRC", nargs="?", help="where the images are")
    add("out", metavar="OUT.beton", nargs="?", help="the file to write")
    add("--check", metavar="F.beton", help="read a .beton file back and decode every image in it")
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--max-size", type=int, metavar="N", help="scale images down whose longer side is above N pixels")
    add("--quality", type=int, default=95, metavar="Q", help="of JPEGs encoded here, 1 to 100 (default: 95)")
    add(
        "--mode",
        choices=("jpg", "raw", "proportion"),
        default="jpg",
        help="store JPEGs, raw pixels (large and fast to read), or some of each (default: jpg)",
    )
    add("--proportion", type=float, default=0.5, metavar="P", help="share of JPEGs in that mode (default: 0.5)")
    add("--seed", type=int, default=0, help="draws which ones those are (default: 0)")
    add(
        "--max-pixels",
        type=int,
        default=ImageSettings.max_pixels,
        metavar="N",
        help=f"refuse larger source images as decompression bombs (default: {ImageSettings.max_pixels:,})",
    )
    add(
        "--white",
        type=float,
        metavar="V",
        help="the white of gray of more than 8 bits where the file does not say, as 4095 (default: 65535)",
    )
    group = parser.add_argument_group("source")
    add = group.add_argument
    add("--limit", type=int, metavar="N", help="take N images, spread evenly over the source")
    add("--split", metavar="NAME", help="which split, 'all' or 'none' (default: train where there are several)")
    add("--flat", action="store_true", help="take every image below SRC, without labels")
    add("--source", dest="kind", choices=("folder", "tar", "hf"), help="what SRC is, where it could be several")
    add("--image-column", metavar="NAME", help="of a Hugging Face data set, or the field of a shard's samples (jpg)")
    add("--label-column", metavar="NAME", help="of a Hugging Face data set (default: found by its type)")
    group = parser.add_argument_group("writing")
    add = group.add_argument
    add("--workers", type=int, metavar="N", help="processes that convert (default: one for each CPU core)")
    add("--skip-bad", action="store_true", help="leave bad images out and list them in OUT.beton.bad.txt")
    add("--force", action="store_true", help="replace OUT.beton if it exists")
    add("--page-size", type=int, default=PAGE_SIZE, metavar="B", help="in bytes (default: 8 MiB)")
    add(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help="give up on an image after S seconds (default: 60)",
    )
    return parser


def _write(options: argparse.Namespace) -> int:
    images = ImageSettings(
        options.max_size,
        options.quality,
        options.mode,
        options.proportion,
        options.seed,
        options.max_pixels,
        options.white,
    )
    kind = options.kind
    listing = SourceSettings(kind, options.split, options.flat, options.image_column, options.label_column)
    tally = Tally(live=True)
    try:
        written = write_beton(
            options.source,
            options.out,
            images=images,
            listing=listing,
            workers=options.workers,
            limit=options.limit,
            skip_bad=options.skip_bad,
            force=options.force,
            page_size=options.page_size,
            timeout=options.timeout,
            tally=tally,
        )
    except BadImages as error:
        _print_bad(error.bad)
        raise
    _print_bad(written.bad)
    tell(f"{printable(str(written.path))}: {written.samples:,} images, {_bytes(written.file_size)}")
    tell(f"  {written.kept:,} with their own bytes, {written.converted:,} converted; {tally.rate()}")
    classes = written.class_names
    if classes is not None:
        shown = ", ".join(map(short, classes[:5])) + (", ..." if len(classes) > 5 else "")
        tell(f"  {len(classes):,} {'class' if len(classes) == 1 else 'classes'}: {shown}")
    if written.passed_over:
        other = "other file was" if written.passed_over == 1 else "other files were"
        tell(f"  {written.passed_over:,} {other} passed over")
    if written.bad:
        bad = "bad image was" if len(written.bad) == 1 else "bad images were"
        tell(f"  {len(written.bad):,} {bad} left out, listed in {printable(str(bad_list_path(written.path)))}")
    return 0


def _print_bad(bad: list[tuple[str, str]]) -> None:
    for name, reason in bad:
        say(f"bad: {name}: {printable(reason)}")


def _check(options: argparse.Namespace) -> int:
    count = options.workers if options.workers is not None else min(usable_cores(), MOST_WORKERS)
    _check_numbers(count, None, PAGE_SIZE, options.timeout)
    tally = Tally(live=True)
    checked = check_beton(options.check, workers=count, timeout=options.timeout, tally=tally)
    for index, reason in checked.bad:
        say(f"bad: sample {index}: {printable(reason)}")
    tell(checked.describe())
    if checked.bad:
        raise UserError(f"{printable(options.check)}: {len(checked.bad):,} of {checked.samples:,} samples are bad")
    tell(f"  every image decodes; {tally.rate()}")
    return 0


def _bytes(size: int) -> str:
    number = float(size)
    for unit in ("bytes", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}" if unit != "bytes" else f"{size} bytes"
        number /= 1000
    return f"{number:.4g} TB"


def _terminate(number: int, frame: FrameType | None) -> None:
    # an ordinary way out, so that every `finally` on it runs: processes end, the temporary file goes
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _command() -> int:
    parser = _parser()
    options = parser.parse_args()
    if options.check is not None:
        if options.source is not None:
            parser.error("--check takes a .beton file and nothing else")
        return _check(options)
    if options.source is None or options.out is None:
        parser.error("SRC and OUT.beton are needed (or --check F.beton)")
    return _write(options)


def main() -> int:
    """The command line. Exit status: 0, 2 for bad input (one sentence), 130 or 143 when interrupted."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _terminate)
    return exit_with_sentence("fastpmae-write", _command)


if __name__ == "__main__":
    sys.exit(main())
