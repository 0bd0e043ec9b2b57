"""What worker processes are asked to do in the tests of the pool: also what no decoder should."""

import ctypes
import os
import signal
import time

from fastpmae_loaders.errors import UserError


def behaviour(folder: str = ""):
    """A worker's function: does what the item says."""

    def act(place: int, item: str):
        if item == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if item == "null":
            ctypes.string_at(0)
        if item == "exit":
            os._exit(3)
        if item == "hang":
            time.sleep(600)
        if item == "spin":
            while True:
                pass
        if item == "refuse":
            raise UserError("no thanks")
        if item == "raise":
            raise ValueError("what is this")
        if item == "interrupt":
            raise KeyboardInterrupt
        if item == "once":  # killed at its first try alone, as when memory was short for a moment
            try:
                os.mkdir(f"{folder}/{place}")  # noqa: PTH102
            except FileExistsError:
                return place, "second try"
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "large":
            return place, bytes(3_000_000)
        return place, item

    return act


def broken():
    """A task that no worker can even start."""
    raise RuntimeError("this never starts")
