"""The learning rate by its two settings, `blr` for 256 images and `lr` itself: one of them is set."""

from typing import Any

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable


def peak_rate(blr: float | None, lr: float | None, batch_size: int) -> float:
    """The peak learning rate: `lr` where it is set, else the base rate for so many images a step."""
    if lr is not None:
        return lr
    assert blr is not None
    return blr * batch_size / 256


def check_one_rate(blr: float | None, lr: float | None) -> None:
    """Raise UserError unless exactly one of a base rate and a peak rate is set."""
    if blr is not None and lr is not None:
        raise UserError(
            f"--blr {blr} and --lr {lr} are both set: --blr is the learning rate for 256 images, --lr the peak rate "
            "whatever the batch size; leave one out"
        )
    if blr is None and lr is None:
        raise UserError("no learning rate is set: name one with --blr (for 256 images) or --lr (the peak rate itself)")


def with_one_rate(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that change others, with `blr` taken back where they set `lr` alone, and the reverse."""
    for name, other in (("lr", "blr"), ("blr", "lr")):
        if settings.get(name) is not None and other not in settings:
            return settings | {other: None}
    return settings


def rate_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is different about the learning rate of two records of settings, a phrase or none.

    Nothing is where the peak is the same, whichever setting says so, or the batch size alone makes it another.

    Args:
        before: may be a stranger's.
    """
    names = [name for name in ("blr", "lr") if now[name] is not None]
    same = all(before.get(name) == now[name] for name in ("blr", "lr"))
    peak_before, peak = _peak_in(before), _peak_in(now)
    if same or peak_before == peak:
        return []
    for name in names:
        if before.get(name) is not None:
            return [f"--{name} was {printable(str(before[name]))} and is now {now[name]}"]
    return [f"the peak learning rate was {peak_before} and is now {peak}"]


def _peak_in(record: dict[str, Any]) -> float | None:
    """The peak learning rate of a record of settings; None where it tells none."""
    blr, lr, batch_size = (record.get(name) for name in ("blr", "lr", "batch_size"))
    if isinstance(lr, int | float):
        return lr
    if isinstance(blr, int | float) and isinstance(batch_size, int):
        return peak_rate(blr, None, batch_size)
    return None
