"""A test on whole images, which the ranks share: read ahead of their turn, judged one by one, ended by a signal."""

import contextlib
from collections.abc import Callable
from typing import TypeVar

from fastpmae.distributed.ranks import Ranks
from fastpmae.evaluate.dense.order import fetched
from fastpmae.run.signals import Stop
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.machine import loader_threads

Example = TypeVar("Example")


def judge_images(
    count: int,
    read: Callable[[int], Example],
    judge: Callable[[int, Example], None],
    ranks: Ranks,
    progress: Progress,
    stop: Stop | None = None,
    *,
    workers: int = 0,
) -> bool:
    """Judge this rank's share of `count` images. Returns whether all ranks came to the end of theirs.

    Args:
        read: an image by its number; called by several threads.
        judge: what is done with it, in the order of the numbers.
        stop: ends it on every rank where any of them has heard a signal.
        workers: threads that read; 0 takes all cores.
    """
    mine, stopped = range(ranks.rank, count, ranks.size), False
    wanted = ([(0, number)] for number in mine)
    examples = fetched(lambda place: read(place[1]), wanted, loader_threads(workers, ranks.local_size))
    with contextlib.closing(examples), progress.count(len(mine), "test images"):
        for places, (example,) in examples:
            stopped = stop is not None and bool(stop.signal)
            if stopped:
                break
            judge(places[0][1], example)
            progress.advance()
    return not ranks.max_over_ranks(stopped)[0]
