"""How the ranks of one attempt find each other in a store that has outlived earlier attempts."""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from fastpmae_loaders.errors import RunError


def meet(store: dist.Store, rank: int, size: int, patience: timedelta) -> str:
    """The name of this attempt, which no other has, once all ranks have come: the prefix of its part of the store.

    torchrun restarts the ranks beside the same store, in which the addresses of the dead ones still stand; whoever
    connects to one of those waits for nobody. The number of restarts cannot tell attempts apart, since each machine
    counts its own. So every rank shows a word that nobody has used before, rank 0 repeats all of them, and its own is
    the name of the attempt: an answer that holds my word is no older than I am.

    Raises:
        RunError: when a rank has not come after `patience`.
    """
    deadline = time.monotonic() + patience.total_seconds()
    mine, others = uuid.uuid4().hex, range(size)
    store.set(f"fastpmae/word/{rank}", mine)
    while time.monotonic() < deadline:
        if rank == 0:
            shown = [f"fastpmae/word/{other}" for other in others]
            if store.check(shown):
                store.set("fastpmae/words", " ".join(store.get(key).decode() for key in shown))
            heard = [f"fastpmae/heard/{other}" for other in others[1:]]
            if store.check(heard) and all(store.get(key).decode() == mine for key in heard):
                return mine
        elif store.check(["fastpmae/words"]):
            words = store.get("fastpmae/words").decode().split()
            if len(words) == size and words[rank] == mine:
                store.set(f"fastpmae/heard/{rank}", words[0])
                return words[0]
        time.sleep(0.02)
    minutes = patience.total_seconds() / 60
    raise RunError(f"rank {rank} of {size} has waited {minutes:g} minutes for the others to start")
