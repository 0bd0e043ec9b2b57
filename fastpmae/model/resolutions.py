"""Sizes of the views over a run, of which earlier ones are smaller where `--progressive-resolution` asks for it."""

import math
import re
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from fastpmae.config import Config
from fastpmae_loaders import ViewSettings
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import short

ENTRY = re.compile(r"(?P<size>[1-9][0-9]{0,3})(?::(?P<share>(?:[0-9]+\.?|[0-9]*\.[0-9]+)(?:e-[0-9]+)?))?", re.ASCII)
"""SIZE or SIZE:SHARE, with a share as Python writes a float."""
LONGEST = 40
"""Letters of an entry."""


@dataclass(frozen=True)
class Resolution:
    """Epochs of a run whose views have one size.

    Attributes:
        size: side of the views in pixels.
        first_epoch: of the run.
        last_epoch: the epoch of the run before which it ends.
    """

    size: int
    first_epoch: int
    last_epoch: int


def resolutions_of(config: Config) -> tuple[Resolution, ...]:
    """The sizes of a run's views in their order, which share out its epochs.

    Raises:
        UserError: for sizes and shares that make none.
    """
    epochs, entries = config.optimizer.epochs, _entries(config)
    ends = [round(share * epochs) for share in accumulate(share for _, share in entries[:-1])]
    spans = pairwise([0, *ends, epochs])
    found = [Resolution(size, first, last) for (size, _), (first, last) in zip(entries, spans, strict=True)]
    for each in found:
        if each.first_epoch >= each.last_epoch:
            raise _refused(
                config, f"of {epochs} (--epochs) no epoch is left for {each.size} pixels: shares are of whole epochs"
            )
    return tuple(found)


def describe_epochs(first_epoch: int, last_epoch: int) -> str:
    """Epochs counted from 0, without the last, as who reads a log counts them: from 1, with the last."""
    first = first_epoch + 1
    return f"epochs {first} to {last_epoch}" if first < last_epoch else f"epoch {last_epoch}"


def describe_resolution(resolution: Resolution) -> str:
    """How large the views are, and when."""
    epochs = describe_epochs(resolution.first_epoch, resolution.last_epoch)
    return f"{epochs}: views of {resolution.size} pixels"


def at_size(config: Config, resolution: Resolution) -> Config:
    """The settings with the size that the views have for some epochs: a loader's, and never those of the networks."""
    size = resolution.size
    return config if size == config.views.image_size else config.using(image_size=size, progressive_resolution=())


def check_resolutions(config: Config, settings: ViewSettings) -> None:
    """Whether every size of a run's views makes views, patches and folds.

    Args:
        settings: of the views of --image-size.

    Raises:
        UserError: where one does not, as `resolutions_of` does.
    """
    patch, folds, last = settings.patch_size, settings.folds, settings.image_size
    # of pixels alone there are no folds, and who has uneven ones at the last size has asked for them
    even = config.teacher.teachers != "none" and folds_evenly(settings, last)
    for resolution in resolutions_of(config)[:-1]:
        size = resolution.size
        if size % patch:
            raise _refused(config, f"{size} is no multiple of the patches' {patch} pixels")
        try:
            replace(settings, image_size=size)
        except UserError as error:
            raise _refused(config, f"{size} pixels are too few ({error})") from None
        if even and not folds_evenly(settings, size):
            fitting = ", ".join(str(each) for each in range(patch, last, patch) if folds_evenly(settings, each))
            raise _refused(
                config,
                f"the masked patches of {size} pixels make no {folds} equal folds (--folds); of the sizes below {last} "
                f"these do: {fitting or 'none'}",
            )


def folds_evenly(settings: ViewSettings, size: int) -> bool:
    """Whether the masked patches of views of a size, a multiple of the patches', make equal folds."""
    try:
        return len(set(replace(settings, image_size=size).fold_sizes)) == 1
    except UserError:
        return False


def canonical(config: Config) -> tuple[str, ...]:
    """`--progressive-resolution` as a run's folder records it, each share written in one way."""
    *smaller, (last, _) = _entries(config)
    if not config.views.progressive_resolution:
        return ()
    return (*(f"{size}:{share!r}" for size, share in smaller), str(last))


def _entries(config: Config) -> list[tuple[int, float]]:
    """Sizes with their shares of the epochs; the last one's is what the others leave."""
    last = config.views.image_size
    given = config.views.progressive_resolution or (str(last),)
    found: list[tuple[int, float]] = []
    for place, entry in enumerate(given):
        parts = ENTRY.fullmatch(entry) if len(entry) <= LONGEST else None
        if parts is None and len(entry.split()) > 1:
            raise _refused(config, f"{short(entry)} is one word: leave out the quotes, or the comma")
        if parts is None:
            raise _refused(
                config, f"{short(entry) or repr(entry)} is neither SIZE:SHARE nor a last SIZE, such as 128:0.5 224"
            )
        is_last = place == len(given) - 1
        if is_last and parts["share"]:
            raise _refused(config, f"the last size takes what is left of the epochs: {parts['size']} without a share")
        if not is_last and not parts["share"]:
            raise _refused(
                config, f"{entry} needs a share of the epochs, as in {entry}:0.5; the last size alone has none"
            )
        found.append((int(parts["size"]), float(parts["share"] or 0)))
    sizes, shares = zip(*found, strict=True)
    if sizes[-1] != last:
        raise _refused(config, f"the last size must be --image-size, which is {last}")
    if max(sizes) > last or any(one == other for one, other in pairwise(sizes)):
        raise _refused(config, f"each size must be another than the one before it, and at most the last one's {last}")
    if not all(share > 0 for share in shares[:-1]) or not math.fsum(shares) < 1:
        raise _refused(config, "shares of the epochs must be above 0 and leave some for the last size")
    return found


def _refused(config: Config, why: str) -> UserError:
    return UserError(f"--progressive-resolution {short(' '.join(config.views.progressive_resolution))}: {why}")
