"""Kept machine code, when several processes make it at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.made import REPOSITORY


@pytest.mark.slow
def test_processes_that_compile_different_overloads_keep_them_apart(tmp_path: Path):
    """Without a lock both give their code the same number, and a later process loads the wrong one.

    Functions of the loaders and of the kernels, in the same processes.
    """
    script = REPOSITORY / "tests/programs/compile_race.py"
    paths = os.pathsep.join(str(REPOSITORY / part) for part in ("", "kernels", "loaders"))
    environment = {**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    kinds = ["f8", "f4", "i8"]
    for _ in range(2):
        running = [
            subprocess.Popen([sys.executable, script, kind], env=environment, stderr=subprocess.PIPE, text=True)
            for kind in kinds
        ]
        for process in running:
            errors = process.communicate(timeout=400)[1]
            assert process.returncode == 0, errors
    # each overload has a file of its own
    for package in ("loaders", "kernels"):
        assert len(list((tmp_path / "cache").rglob(f"*{package}_total*.nbc"))) == len(kinds)
