"""The images of a run: opened, identified, and what a user should know of them."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from fastpmae.config import Config
from fastpmae_loaders import Samples, open_samples
from fastpmae_loaders.engines.base import shown
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.folders import EncodedImages
from fastpmae_loaders.mixture import Mixture, split_weight

_STRETCH = 1 << 20


def open_images(config: Config) -> Samples:
    """The run's images. Raises UserError without --beton, or when what it names is not sound."""
    if not config.data.beton:
        raise UserError("--beton FILE is missing: name the images to train on (fastpmae-write makes the file)")
    return open_samples(config.data.beton, cache=config.data.cached)


def sources(config: Config) -> tuple[str, ...]:
    """What --beton names, each as it is written."""
    beton = config.data.beton
    return beton if isinstance(beton, tuple) else () if beton is None else (str(beton),)


def absolute(config: Config, images: Samples) -> dict[str, Any]:
    """The settings that name files to read, from the root on, so that a run can be taken up from any folder."""
    data, run = config.data, config.run
    beton = data.beton
    if not isinstance(beton, tuple):
        assert isinstance(images.path, Path)  # an address stands in a tuple
        beton = images.path
    return {
        "beton": _absolute(beton),
        "eval_train": _absolute(run.eval_train),
        "eval_val": _absolute(run.eval_val),
        # as it is called: each machine of a run may have another disk behind that name
        "cache": data.cache and data.cache.absolute(),
        "init": run.init if run.init is None or "://" in run.init else str(Path(run.init).resolve()),
    }


def _absolute(images: Path | tuple[str, ...] | None) -> Path | tuple[str, ...] | None:
    """Where images lie, from the root on; weights stay behind the sources."""
    if not isinstance(images, tuple):
        return images and images.resolve()
    paths = [split_weight(source)[0] for source in images]
    return tuple(
        source if "://" in path else str(Path(path).resolve()) + source[len(path) :]
        for source, path in zip(images, paths, strict=True)
    )


def source_notes(images: Samples) -> list[str]:
    """What a user should know of how a folder, tar shards or a set in a store were understood; of others nothing."""
    if isinstance(images, Mixture):
        return [note for source in images.sources for note in source_notes(source)]
    notes: list[str] = list(getattr(images, "notes", ()))
    if not isinstance(images, EncodedImages):
        return notes
    left_out = images.left_out
    if left_out:
        name, reason = left_out[0]
        notes.append(f"warning: {len(left_out):,} images are left out (the first: {name}: {reason})")
    return notes


def counted(images: Samples) -> str:
    """How many images there are, in words, with the duplicates of a set that no epoch shows."""
    duplicates = len(images) - shown(images)
    left_out = f", {duplicates} of them duplicates that are left out" if duplicates else ""
    return f"{len(images)} images{left_out}"


def fingerprint(images: Samples) -> str:
    """A digest that tells one set of images from another wherever they lie."""
    told = getattr(images, "identity", None)
    if told is not None:  # of a set, whose parts need not be opened for it
        return told[:16]
    total = hashlib.sha256()
    for column in (images.width, images.height, images.mode, images.size, images.label):
        for start in range(0, len(images), _STRETCH):
            part = np.asarray(column[start : start + _STRETCH])
            total.update(part.tobytes() if part.dtype == np.uint8 else part.astype(np.int64).tobytes())
    return total.hexdigest()[:16]
