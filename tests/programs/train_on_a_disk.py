"""`fastpmae-train` on a disk that is "slow", "full" at step 6, or in the middle of whose work it "dies" there.

`python -m tests.programs.train_on_a_disk KIND FLAGS`.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import safetensors.torch

import fastpmae.run.checkpoint
import fastpmae.train

write = safetensors.torch.save_file


def save_file(kind: str, tensors: dict[str, Any], beside: Path, header: dict[str, str]) -> None:
    step = int(Path(beside).stem[5:])
    if kind == "slow":
        time.sleep(1)
    if kind == "dies" and step == 6:
        Path(beside).write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "full" and step == 6:
        raise OSError(28, os.strerror(28))
    write(tensors, beside, header)


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    fastpmae.run.checkpoint.save_file = lambda *arguments: save_file(kind, *arguments)
    sys.exit(fastpmae.train.main())
