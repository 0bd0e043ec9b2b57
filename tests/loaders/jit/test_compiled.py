"""Kept machine code, when several processes make it at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.made import REPOSITORY


@pytest.mark.slow
@pytest.mark.parametrize("package", ["loaders", "kernels"])
def test_processes_that_compile_different_overloads_keep_them_apart(package: str, tmp_path: Path):
    """Without a lock both give their code the same number, and a later process loads the wrong one."""
    script = REPOSITORY / "tests/programs/compile_race.py"
    paths = os.pathsep.join(str(REPOSITORY / part) for part in ("", "kernels", "loaders"))
    environment = {**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    kinds = ["f8", "f4", "i8", "i4", "u1"]
    for _ in range(2):
        running = [
            subprocess.Popen(
                [sys.executable, script, package, kind], env=environment, stderr=subprocess.PIPE, text=True
            )
            for kind in kinds
        ]
        for process in running:
            errors = process.communicate(timeout=120)[1]
            assert process.returncode == 0, errors
    # each overload has a file of its own
    assert len(list((tmp_path / "cache").rglob("*total*.nbc"))) == len(kinds)
