"""A writer that is in the middle of its file: `python -m tests.programs.slow_writer FILE`."""

import sys
import time
from pathlib import Path

from fastpmae_loaders.files import atomic_write

if __name__ == "__main__":
    with atomic_write(Path(sys.argv[1])) as beside:
        beside.write_text("half")
        print("writing", flush=True)
        time.sleep(600)
