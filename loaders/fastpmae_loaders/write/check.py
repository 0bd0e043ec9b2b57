"""Reads a .beton file back: its tables, and every image in it, decoded by all decoders there are."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import BetonError, UserError
from fastpmae_loaders.folders import open_beton
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.beton import COEFFICIENTS, JPG, RAW, Beton
from fastpmae_loaders.sources.jpeg import turbo_available, turbo_decode
from fastpmae_loaders.sources.set_index import file_digest
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.write.workers import Failure, WorkerPool


@dataclass
class Checked:
    """What is in a file, and (sample index, reason) of each image that is not as it should be."""

    path: Path | Address
    samples: int
    bad: list[tuple[int, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """A few lines for a person."""
        return "\n".join([f"{printable(str(self.path))}: {self.samples:,} samples", *self.lines])


def check_beton(
    path: Beton | str | os.PathLike[str], workers: int = 1, timeout: float = 60.0, progress: Progress | None = None
) -> Checked:
    """Decodes every image of a file, whatever is in it. BetonError when its header or tables are unsound.

    A file in a store that is not open yet is fetched first, so that a store that fails is no image's damage: UserError
    says so.
    """
    beton, progress = path if isinstance(path, Beton) else open_file(path), progress or Progress()
    if isinstance(beton.path, Address) and beton is not path:
        digest_of(beton)
    checked = Checked(beton.path, len(beton), lines=_describe(beton))
    named = str(beton.path)
    setup = ("fastpmae_loaders.write.check:sample_checker", (named,), max(1, min(workers, len(beton))), timeout)
    with WorkerPool(*setup, tell=progress.tell) as pool, progress.count(len(beton), "images"):
        for index, result in pool.in_order(range(len(beton)), group_size=32):
            if isinstance(result, Failure):
                checked.bad.append((index, result.reason))
            progress.advance()
    return checked


def open_file(path: str | os.PathLike[str]) -> Beton:
    """A single .beton file, here or in a store. UserError for a set."""
    beton = open_beton(path)
    if not isinstance(beton, Beton):
        raise UserError(f"{printable(str(path))} is a set of .beton files: name one of its parts")
    return beton


def digest_of(beton: Beton) -> str:
    """ "sha256:…" of a file's bytes. UserError where it cannot be read."""
    digest = getattr(beton, "digest", None)
    return file_digest(beton.path) if digest is None else digest()


def sample_checker(path: str):
    """What a worker process calls for each index: None for a sound sample, UserError otherwise."""
    beton = open_file(path)
    prefix = f"{beton.path}: "

    def check(place: int, index: int) -> None:
        try:
            beton.decode(index)
        except BetonError as error:
            reason = str(error).removeprefix(prefix).removeprefix(f"sample {index}: ")
            raise BetonError(reason) from None
        height, width = int(beton.height[index]), int(beton.width[index])
        if beton.mode[index] == COEFFICIENTS:
            # with numba, which nothing else here needs
            from fastpmae_loaders.native.coefficients import is_whole
            from fastpmae_loaders.native.damage import IMPOSSIBLE, OTHER_DIGEST
            from fastpmae_loaders.native.jpeg_writer import to_jpeg

            packed = beton.payload(index).tobytes()
            if not is_whole(packed):
                raise BetonError(OTHER_DIGEST)
            if to_jpeg(packed, height, width) is None:
                raise BetonError(IMPOSSIBLE)
        if beton.mode[index] == JPG:
            from fastpmae_loaders.native.decoder import is_sound

            payload = beton.payload(index)
            if is_sound(payload, height, width) is False:
                raise BetonError("the JPEG is damaged: its codes make no sense, or end too soon")
            if turbo_available() and turbo_decode(payload, width, height) is None:
                raise BetonError("libjpeg-turbo, FFCV's decoder, reports damage in the JPEG")

    return check


def _describe(beton: Beton) -> list[str]:
    modes = Counter(beton.mode.tolist())
    longer = np.maximum(beton.width, beton.height)
    smallest, largest = int(np.argmin(longer)), int(np.argmax(longer))
    if beton.class_names is not None:
        count = len(beton.class_names)
        labels = f"{count:,} named {'class' if count == 1 else 'classes'}"
    else:
        labels = f"labels {beton.label.min()} to {beton.label.max()}, no class names"
    shapes = ", ".join(f"{beton.width[i]}x{beton.height[i]}" for i in (smallest, largest))
    coded = f", {modes[COEFFICIENTS]:,} coefficients" if modes[COEFFICIENTS] else ""
    return [
        f"  {labels}; {modes[JPG]:,} JPEG, {modes[RAW]:,} raw{coded}",
        f"  smallest and largest image: {shapes}; median of the longer side {int(np.median(longer))}",
        f"  {beton.nbytes:,} bytes, {int(beton.size.sum()):,} of them images; pages of {beton.page_size:,} bytes",
    ]
