"""The ranks of an attempt find each other, whatever earlier attempts have left in the store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from fastpmae.distributed.rendezvous import meet
from fastpmae_loaders.errors import RunError

LONG, SHORT = timedelta(seconds=60), timedelta(seconds=0.2)


def attempt(store: dist.Store, size: int) -> set[str]:
    """Every rank writes its own number in the part that it was given; what each then reads of all."""

    def rank(number: int) -> str:
        part = dist.PrefixStore(meet(store, number, size, LONG), store)
        part.set(str(number), f"{number} of {size}")
        return " ".join(part.get(str(other)).decode() for other in range(size))

    with ThreadPoolExecutor(size) as pool:
        return set(pool.map(rank, range(size)))


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2, 2), (4, 3, 5)])
def test_every_attempt_has_a_part_of_its_own(sizes):
    store = dist.HashStore()
    for size in sizes:
        assert attempt(store, size) == {" ".join(f"{number} of {size}" for number in range(size))}


@pytest.mark.slow
def test_an_attempt_in_which_ranks_never_came_leaves_no_trace():
    store = dist.HashStore()
    for alone in (0, 2):
        with pytest.raises(RunError, match=rf"rank {alone} of 3 has waited .* for the others to start"):
            meet(store, alone, 3, SHORT)
    assert len(attempt(store, 3)) == 1
    with pytest.raises(RunError):  # nor does one that met answer for the dead
        meet(store, 1, 3, SHORT)
    assert len(attempt(store, 3)) == 1
