"""A daemon thread that would begin an iteration while the process ends: `python -m tests.programs.daemon_thread BETON`.

It would be ended within compiled code, which aborts the process.
"""

import atexit
import sys
import threading
import time

going = threading.Event()


def last() -> None:
    going.set()
    time.sleep(0.5)


def main(beton: str) -> None:
    from fastpmae_loaders import PairedViews

    def work() -> None:
        going.wait()
        for _ in views:
            print("a batch", flush=True)

    views = PairedViews(beton, 8, "torch", workers=1)
    list(views)  # compiles
    threading.Thread(target=work, daemon=True).start()


if __name__ == "__main__":
    atexit.register(last)  # what is registered first is called last: nothing else has been imported
    main(sys.argv[1])
