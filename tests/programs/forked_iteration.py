"""A process that is forked in the middle of an iteration: `python -m tests.programs.forked_iteration BETON`.

A thread of the parent's holds the iteration's lock at that moment.
"""

import os
import sys
import threading

from fastpmae_loaders import PairedViews, UserError, mae_view

if __name__ == "__main__":
    views = PairedViews(sys.argv[1], 2, "torch", views=[mae_view(32)], ahead=1)
    taken = iter(views)
    next(taken)
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with taken._stream._lock:
            held.set()
            free.wait()

    threading.Thread(target=hold).start()
    held.wait()
    child = os.fork()
    if child == 0:
        try:
            next(taken)
        except UserError as error:
            print(error, flush=True)
        taken.close()
        print("batches", sum(1 for _ in views), flush=True)
        sys.exit(0)
    free.set()
    print("status", os.waitpid(child, 0)[1], "rest", sum(1 for _ in taken), flush=True)
