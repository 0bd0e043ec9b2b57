"""Which images a step trains on, and what is drawn for them: a function of (seed, epoch, sample) alone."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastpmae.distributed.ranks import to_device
from fastpmae.evaluate.augment import DropPath
from fastpmae.evaluate.dense.upernet import ChannelDropout

ORDER, CROP, DROPOUT, PROPOSALS = range(100, 104)
"""What is drawn for: the first part of a key."""
AHEAD = 3
"""Micro-batches that are made before they are asked for."""

Place = tuple[int, int]
"""An epoch, and the number of an image in its set."""
Example = TypeVar("Example")


def drawn(purpose: int, seed: int, place: Place, *more: int) -> np.random.Generator:
    """A generator of one purpose for one image in one epoch."""
    return np.random.default_rng(np.random.SeedSequence((purpose, seed, *place, *more)))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence((ORDER, seed, epoch))).permutation(images)


def places_of(
    step: int, part: int, *, images: int, batch_size: int, accumulate: int, seed: int, rank: int = 0, ranks: int = 1
) -> list[Place]:
    """The images of one micro-batch of a step that are a rank's.

    An epoch is a permutation of all images; the next one begins where it ends, in the middle of a step where need be.
    """
    size = batch_size // accumulate
    first = step * batch_size + part * size
    places = (divmod(number, images) for number in range(first + rank, first + size, ranks))
    return [(epoch, int(_permutation(seed, epoch, images)[number])) for epoch, number in places]


def fetched(
    draw: Callable[[Place], Example], wanted: Iterable[list[Place]], workers: int
) -> Generator[tuple[list[Place], list[Example]], None, None]:
    """Micro-batches in order, made by threads a few ahead of the one that is asked for."""
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        begun: deque[tuple[list[Place], list]] = deque()
        for places in wanted:
            begun.append((places, [pool.submit(draw, place) for place in places]))
            if len(begun) > AHEAD:
                yield _ended(*begun.popleft())
        while begun:
            yield _ended(*begun.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _ended(places: list[Place], futures: list) -> tuple[list[Place], list]:
    return places, [future.result() for future in futures]


def set_dropped(
    modules: Iterable[DropPath | ChannelDropout], seed: int, places: list[Place], device: torch.device
) -> None:
    """Draw the next pass's stochastic depth and dropped channels, for each image on its own: 0, or 1 / (1 - rate)."""
    modules = list(modules)
    sizes = [module.channels if isinstance(module, ChannelDropout) else 1 for module in modules]
    numbers = np.stack([drawn(DROPOUT, seed, place).random(sum(sizes), np.float32) for place in places])
    each: tuple[Tensor, ...] = torch.from_numpy(numbers).split(sizes, dim=1)
    for module, uniform in zip(modules, each, strict=True):
        scale = to_device((uniform >= module.rate).float() / (1 - module.rate), device)
        module.scale = scale if isinstance(module, ChannelDropout) else scale[:, 0]
