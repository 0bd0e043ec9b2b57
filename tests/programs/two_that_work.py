"""Two processes of one group that do not rest and hold 32 MiB each: `python -m tests.programs.two_that_work`."""

import os

if __name__ == "__main__":
    os.setpgid(0, 0)
    os.fork()
    held = bytearray(b"x" * (32 << 20))
    while True:
        held[0] ^= 1
