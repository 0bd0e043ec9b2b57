"""Whose a lock is, and what happens where nothing can be locked."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastpmae_loaders import locks
from fastpmae_loaders.locks import lock
from tests.made import REPOSITORY


def test_a_lock_is_one_files_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as one, path.open("w") as other:
        assert lock(one) is True
        assert lock(other) is False
        one.close()
        assert lock(other) is True


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_where_nothing_can_be_locked_nobody_is_busy(number: int, tmp_path: Path, monkeypatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuses)
    with (tmp_path / "lock").open("w") as file:
        assert lock(file) is None
        assert lock(file, wait=True) is None


@pytest.mark.slow
def test_kept_code_needs_no_locks(tmp_path: Path) -> None:
    """Without them each process names its files for itself, and takes those that another has kept."""
    module = tmp_path / "made.py"
    module.write_text(
        textwrap.dedent("""
            import errno, fcntl, sys
            def refuses(*_):
                raise OSError(errno.ENOSYS, "no locks")
            fcntl.flock = refuses
            from fastpmae_loaders.jit.compiled import kernel
            @kernel
            def double(number):
                return 2 * number
            assert double(int(sys.argv[1])) == 2 * int(sys.argv[1])
            assert double(float(sys.argv[1])) == 2.0 * float(sys.argv[1])
            print(sum(double.stats.cache_hits.values()))
        """)
    )
    folders = os.pathsep.join(str(REPOSITORY / part) for part in (".", "loaders"))
    environment = {**os.environ, "PYTHONPATH": folders, "NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    said = [
        subprocess.run(
            [sys.executable, str(module), "21"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert said == ["0\n", "2\n"]
    kept = [path.name for path in (tmp_path / "kept").rglob("*.nbc")]
    assert len(kept) == 2
    assert all(name.split(".")[-2].count("-") == 2 for name in kept)
