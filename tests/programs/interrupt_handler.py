"""What answers ctrl-C in a program that imports ours: `python -m tests.programs.interrupt_handler`."""

import signal

import fastpmae  # noqa: F401
import fastpmae_loaders.cli.exits  # noqa: F401

if __name__ == "__main__":
    handler = signal.getsignal(signal.SIGINT)
    print(getattr(handler, "__name__", handler))
