"""The command line of `fastpmae-write`."""

import argparse
import signal
import sys
from types import FrameType

from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.cli.terminal import say, tell
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import usable_cores
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.write.check import check_beton
from fastpmae_loaders.write.images import ImageSettings
from fastpmae_loaders.write.sources import SourceSettings
from fastpmae_loaders.write.write import (
    MOST_WORKERS,
    PAGE_SIZE,
    TIMEOUT,
    BadImages,
    bad_list_path,
    check_numbers,
    write_beton,
)


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
    progress = Progress(live=True)
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
            progress=progress,
        )
    except BadImages as error:
        _print_bad(error.bad)
        raise
    _print_bad(written.bad)
    tell(f"{printable(str(written.path))}: {written.samples:,} images, {_bytes(written.file_size)}")
    tell(f"  {written.kept:,} with their own bytes, {written.converted:,} converted; {progress.rate()}")
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
    check_numbers(count, None, PAGE_SIZE, options.timeout)
    progress = Progress(live=True)
    checked = check_beton(options.check, workers=count, timeout=options.timeout, progress=progress)
    for index, reason in checked.bad:
        say(f"bad: sample {index}: {printable(reason)}")
    tell(checked.describe())
    if checked.bad:
        raise UserError(f"{printable(options.check)}: {len(checked.bad):,} of {checked.samples:,} samples are bad")
    tell(f"  every image decodes; {progress.rate()}")
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
