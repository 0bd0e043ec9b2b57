"""The command line of `fastpmae-write`."""

import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Annotated, Any, Literal

import tyro

from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.help_texts import HELP_TEXTS
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.cli.terminal import say, tell
from fastpmae_loaders.errors import BetonError, UserError
from fastpmae_loaders.folders import open_beton
from fastpmae_loaders.machine import usable_cores
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.sources.beton_set import BetonSet
from fastpmae_loaders.write.check import check_beton, digest_of
from fastpmae_loaders.write.finish import BAD, WrittenSet, finish_set
from fastpmae_loaders.write.images import ImageSettings
from fastpmae_loaders.write.jpegs import write_jpegs
from fastpmae_loaders.write.sets import write_set
from fastpmae_loaders.write.sources import SourceSettings
from fastpmae_loaders.write.write import (
    MOST_WORKERS,
    PAGE_SIZE,
    TIMEOUT,
    BadImages,
    bad_list_of,
    check_numbers,
    write_beton,
)

Positional = tyro.conf.Positional


@dataclass(frozen=True)
class Source:
    """Which images of SRC are taken."""

    limit: int | None = None
    """Take so many images, spread evenly over the source."""
    split: str | None = None
    """Which split to take, 'all' or 'none' (names mean no splits); by default train where there are several."""
    flat: bool = False
    """Take every image below SRC, without labels."""
    source: Literal["folder", "tar", "hf"] | None = None
    """What SRC is, where it could be several."""
    image_column: str | None = None
    """Column of a Hugging Face data set that holds the images, where the types do not tell; of shards, the one field of
    each sample to take, such as jpg."""
    label_column: str | None = None
    """Column of a Hugging Face data set that holds the labels, where the types do not tell."""


@dataclass(frozen=True)
class Writing:
    """How the file is written."""

    workers: int | None = None
    """Processes that convert or check images; by default one for each CPU core."""
    skip_bad: bool = False
    """Leave bad images out and list them in OUT.beton.bad.txt, or OUT/bad.txt."""
    force: bool = False
    """Replace OUT.beton, and the list of bad images beside it, if they exist; or a set of other settings."""
    page_size: int = PAGE_SIZE
    """Size of the file's pages in bytes, a power of two."""
    timeout: float = TIMEOUT
    """Give up on an image after so many seconds."""


@dataclass(frozen=True)
class Parts:
    """Several files instead of one: a set, which is a folder, written by any number of machines."""

    shards: int | None = None
    """Write a set of so many parts into the folder OUT. The same command again finishes one that was interrupted."""
    part: Annotated[str | None, tyro.conf.arg(metavar="I/N")] = None
    """Write the share of one of N processes, which count from 0, as in a SLURM array; then comes --finish."""
    finish: bool = False
    """Make the parts in the folder SRC a set, when all of them are there."""
    deduplicate: bool = False
    """Note which images have the bytes of one before them: no epoch shows them."""
    on: Annotated[str, tyro.conf.arg(metavar="local|ray|ray://HEAD")] = "local"
    """Where the parts are written: here, by the Ray cluster that this machine belongs to, or by the one at an address.
    There --workers is the cores of a task, by default one."""


@dataclass(frozen=True)
class Command:
    """What stands on the command line."""

    src: Annotated[str | None, Positional, tyro.conf.arg(metavar="SRC")] = None
    """Where the images are."""
    out: Annotated[str | None, Positional, tyro.conf.arg(metavar="OUT.beton")] = None
    """The file to write; with --shards a folder."""
    check: Annotated[str | None, tyro.conf.arg(metavar="F.beton")] = None
    """Read a .beton file or a set, here or in a store, back and decode every image in it, instead of writing one."""
    to_jpeg: bool = False
    """Write SRC, a .beton of coefficients, as a .beton of JPEGs: the same coefficients and pixels, for any reader."""
    images: Annotated[ImageSettings, tyro.conf.arg(name="")] = field(default_factory=ImageSettings)
    listing: Annotated[Source, tyro.conf.arg(name="")] = field(default_factory=Source)
    writing: Annotated[Writing, tyro.conf.arg(name="")] = field(default_factory=Writing)
    parts: Annotated[Parts, tyro.conf.arg(name="")] = field(default_factory=Parts)


DESCRIPTION = """Write images into one .beton file for training (fastpmae-write SRC OUT.beton) or into a set of them
(fastpmae-write SRC OUT/ --shards N), check such a file (fastpmae-write --check F.beton), or make coefficients JPEGs
again (fastpmae-write --to-jpeg F.beton OUT.beton).

Either may lie in a store (s3://, gs://, az://).

SRC is a folder with a folder for each class (split folders such as train and val may lie above them), a folder of
images, a .tar file or a folder of them in WebDataset's layout, or the folder of a Hugging Face data set (parquet,
arrow; needs pip install 'fastpmae[hf]'). Plain RGB JPEGs keep their bytes; everything else is turned upright, made
8-bit RGB (transparency on white, first frame of animations, colour profiles not applied) and re-encoded."""


def read_command(arguments: Sequence[str] | None = None) -> Command:
    """What a command line asks for; tyro ends the process with status 2 for flags it does not know.

    Raises:
        UserError: for settings out of their range, and where it is not told what to write or to check.
    """
    command = tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Command),
        prog="fastpmae-write",
        description=DESCRIPTION,
        args=arguments,
        registry=HELP_TEXTS,
    )
    if command.check is not None and (command.src is not None or command.to_jpeg):
        raise UserError("--check takes a .beton file and nothing else")
    kept = replace(command.writing, workers=None, timeout=TIMEOUT)
    if command.check is not None and (command.images, command.listing, kept) != (ImageSettings(), Source(), Writing()):
        raise UserError("--check decodes every image as it is stored: of the settings it takes --workers and --timeout")
    _check_mode(command.images)
    if command.to_jpeg and (command.images != ImageSettings() or command.listing != Source()):
        raise UserError(
            "--to-jpeg takes every image of a .beton as it is: leave out what says which images to take, and how to "
            "store them"
        )
    _check_parts(command)
    if command.check is None and (command.src is None or (command.out is None and not command.parts.finish)):
        raise UserError("SRC and OUT.beton are needed (or --check F.beton)")
    return command


def _check_mode(images: ImageSettings) -> None:
    """Refuse flags that the mode makes no use of."""
    plain = ImageSettings()
    if images.mode != "proportion":
        for flag in ("proportion", "seed"):
            if getattr(images, flag) != getattr(plain, flag):
                raise UserError(f"--{flag} is of --mode proportion, and the mode is {images.mode}: leave one out")
    if images.mode == "raw" and images.quality != plain.quality:
        raise UserError("--quality is of JPEGs, and --mode raw stores none: leave one out")


def _check_parts(command: Command) -> None:
    parts = command.parts
    if (command.check is not None or command.to_jpeg) and parts != Parts():
        raise UserError(
            "--check and --to-jpeg write no set: leave out --shards, --part, --finish, --deduplicate and --on"
        )
    if parts.finish and (
        command.out is not None
        or replace(command, src=None, parts=Parts()) != Command()
        or replace(parts, finish=False, deduplicate=False) != Parts()
    ):
        raise UserError("--finish takes the folder of the parts and nothing else: fastpmae-write OUT/ --finish")
    if parts.shards is None and not parts.finish and parts != Parts():
        raise UserError("--part, --on and --deduplicate are of sets: say with --shards how many parts there are")
    if parts.part is not None and not _PART.fullmatch(parts.part):
        raise UserError(f"--part is {short(parts.part)}; expected I/N, such as 0/64 of the first of 64 processes")


_PART = re.compile(r"\d{1,9}/\d{1,9}", re.ASCII)


def _write_set(source: str, out: str, command: Command) -> int:
    part = command.parts.part
    share = None if part is None else (int(part.split("/")[0]), int(part.split("/")[1]))
    progress = Progress(live=True)
    assert command.parts.shards is not None
    try:
        written = write_set(
            source,
            out,
            command.parts.shards,
            part=share,
            on=command.parts.on,
            deduplicate=command.parts.deduplicate,
            images=command.images,
            listing=_source_settings(command.listing),
            limit=command.listing.limit,
            **_ways(command.writing, progress),
        )
    except BadImages as error:
        _print_bad(error.bad)
        raise
    if written is None:
        tell(f"{printable(out)}: the parts of {part} are there; when all are, fastpmae-write {_quoted(out)} --finish")
        return 0
    return _describe_set(written)


def _describe_set(written: WrittenSet) -> int:
    index = written.index
    _print_bad(written.bad)
    parts = "1 part" if len(index.shards) == 1 else f"{len(index.shards):,} parts"
    tell(f"{written.path}: {index.images:,} images in {parts}, {_bytes(written.file_size)}")
    tell(f"  {written.kept:,} with their own bytes, {index.images - written.kept:,} converted")
    _tell_classes(index.classes)
    if written.duplicates is not None:
        tell(f"  {written.duplicates:,} of them have the bytes of one before them: no epoch shows those")
    if written.bad:
        bad = "bad image was" if len(written.bad) == 1 else "bad images were"
        tell(f"  {len(written.bad):,} {bad} left out, listed in {written.path}/{BAD}")
    return 0


def _quoted(path: str) -> str:
    return printable(shlex.quote(path))


def _source_settings(told: Source) -> SourceSettings:
    return SourceSettings(told.source, told.split, told.flat, told.image_column, told.label_column)


def _ways(writing: Writing, progress: Progress) -> dict[str, Any]:
    return {
        "workers": writing.workers,
        "skip_bad": writing.skip_bad,
        "force": writing.force,
        "page_size": writing.page_size,
        "timeout": writing.timeout,
        "progress": progress,
    }


def _write(source: str, out: str, command: Command) -> int:
    told = command.listing
    listing = _source_settings(told)
    progress = Progress(live=True)
    ways = _ways(command.writing, progress)
    try:
        if command.to_jpeg:
            written = write_jpegs(source, out, **ways)
        else:
            written = write_beton(source, out, images=command.images, listing=listing, limit=told.limit, **ways)
    except BadImages as error:
        _print_bad(error.bad)
        raise
    _print_bad(written.bad)
    tell(f"{printable(str(written.path))}: {written.samples:,} images, {_bytes(written.file_size)}")
    how = "made JPEGs of coefficients" if command.to_jpeg else "converted"
    tell(f"  {written.kept:,} with their own bytes, {written.converted:,} {how}; {progress.rate()}")
    _tell_classes(written.class_names)
    if written.passed_over:
        other = "other file was" if written.passed_over == 1 else "other files were"
        tell(f"  {written.passed_over:,} {other} passed over")
    if written.bad:
        bad = "bad image was" if len(written.bad) == 1 else "bad images were"
        tell(f"  {len(written.bad):,} {bad} left out, listed in {printable(bad_list_of(written.path))}")
    return 0


def _tell_classes(classes: Sequence[str] | None) -> None:
    if classes is not None:
        shown = ", ".join(map(short, classes[:5])) + (", ..." if len(classes) > 5 else "")
        tell(f"  {len(classes):,} {'class' if len(classes) == 1 else 'classes'}: {shown}")


def _print_bad(bad: list[tuple[str, str]]) -> None:
    for name, reason in bad:
        say(f"bad: {name}: {printable(reason)}")


def _check(file: str, options: Writing) -> int:
    count = options.workers if options.workers is not None else min(usable_cores(), MOST_WORKERS)
    check_numbers(count, None, PAGE_SIZE, options.timeout)
    progress = Progress(live=True)
    samples = open_beton(file)
    if isinstance(samples, BetonSet):
        return _check_set(samples, count, options.timeout, progress)
    checked = check_beton(file, workers=count, timeout=options.timeout, progress=progress)
    for index, reason in checked.bad:
        say(f"bad: sample {index}: {printable(reason)}")
    tell(checked.describe())
    if checked.bad:
        raise UserError(f"{printable(file)}: {len(checked.bad):,} of {checked.samples:,} samples are bad")
    tell(f"  every image decodes; {progress.rate()}")
    return 0


def _check_set(samples: BetonSet, workers: int, timeout: float, progress: Progress) -> int:
    """Every part against the index, its digest too, and every image in it."""
    folder, shards, wrong = str(samples.path), samples.index.shards, 0
    for number, shard in enumerate(shards):
        try:
            part = samples.part(number)
            if digest_of(part) != shard.digest:
                raise BetonError(f"{part.path}: its bytes are not those that the index was made for")
            bad = check_beton(part, workers=workers, timeout=timeout, progress=progress).bad
        except BetonError as error:
            say(f"bad: {error}")
            wrong += 1
            continue
        for index, reason in bad:
            say(f"bad: sample {index} of {shard.name}: {printable(reason)}")
        wrong += bool(bad)
    tell(f"{printable(folder)}: {len(samples):,} images in {len(shards):,} parts")
    if wrong:
        raise UserError(f"{printable(folder)}: {wrong:,} of {len(shards):,} parts are bad")
    tell("  every part is what the index says, and every image decodes")
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
    command = read_command()
    if command.check is not None:
        return _check(command.check, command.writing)
    assert command.src is not None
    if command.parts.finish:
        return _describe_set(finish_set(command.src, command.parts.deduplicate))
    assert command.out is not None
    if command.parts.shards is not None:
        return _write_set(command.src, command.out, command)
    return _write(command.src, command.out, command)


def main() -> int:
    """The command line. Exit status: 0, 2 for bad input (one sentence), 130 or 143 when interrupted."""
    # what nohup started stays deaf to SIGHUP
    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _terminate) for number in heard}
    try:
        return exit_with_sentence("fastpmae-write", _command)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
