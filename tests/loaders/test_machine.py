"""What a process may use, read from made-up trees of /proc and /sys/fs/cgroup in the forms that machines have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastpmae_loaders import machine
from fastpmae_loaders.machine import MOST_THREADS, loader_threads, usable_cores, usable_memory
from tests.made import REPOSITORY

GIB = 1 << 30
TOTAL = 512 * GIB
UNIFIED = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_CPU = "32 24 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:10 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "33 24 0:30 / /sys/fs/cgroup/memory rw,relatime shared:11 - cgroup cgroup rw,memory"
DISK = "24 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro"


@pytest.fixture(autouse=True)
def sixty_four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)


def tree(root: Path, groups: str, mounts: list[str], files: dict[str, str], total: int = TOTAL) -> Path:
    """A root with this process's groups, the mounts, and files below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text("\n".join([DISK, *mounts]) + "\n")
    (root / "proc/meminfo").write_text(f"MemTotal:       {total // 1024} kB\nMemFree:        1000 kB\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_no_limit_is_the_affinity_and_all_of_the_memory(tmp_path):
    files = {"job/cpu.max": "max 100000", "job/memory.max": "max", "job/memory.high": "max"}
    root = tree(tmp_path, "0::/job\n", [UNIFIED], files)
    assert usable_cores(root) == 64
    assert usable_memory(root) == TOTAL


def test_version_2(tmp_path):
    files = {"job/cpu.max": "200000 100000", "job/memory.max": str(16 * GIB)}
    root = tree(tmp_path, "0::/job\n", [UNIFIED], files)
    assert usable_cores(root) == 2
    assert usable_memory(root) == 16 * GIB


def test_version_1(tmp_path):
    files = {
        "cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "600000",
        "cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
        "memory/slurm/job_7/memory.limit_in_bytes": str(24 * GIB),
        "memory/memory.limit_in_bytes": "9223372036854771712",
    }
    groups = "5:memory:/slurm/job_7\n4:cpu,cpuacct:/slurm/job_7\n1:name=systemd:/user.slice\n0::/user.slice\n"
    root = tree(tmp_path, groups, [V1_CPU, V1_MEMORY], files)
    assert usable_cores(root) == 6
    assert usable_memory(root) == 24 * GIB


def test_both_versions_side_by_side(tmp_path):
    """As systemd's hybrid layout has them: the controllers in version 1, an empty version 2 elsewhere."""
    unified = UNIFIED.replace("/sys/fs/cgroup rw", "/sys/fs/cgroup/unified rw")
    files = {"memory/job/memory.limit_in_bytes": str(GIB), "unified/job/cgroup.procs": ""}
    root = tree(tmp_path, "5:memory:/job\n0::/job\n", [unified, V1_MEMORY], files)
    assert usable_memory(root) == GIB
    assert usable_cores(root) == 64


@pytest.mark.parametrize("tightest", range(4))
def test_every_group_up_to_the_root_counts(tmp_path, tightest):
    files = {}
    for level, folder in enumerate(("", "a/", "a/b/", "a/b/c/")):
        cores, gib = (3, 5) if level == tightest else (20 + level, 100 + level)
        files[f"{folder}cpu.max"], files[f"{folder}memory.max"] = f"{cores}00000 100000", str(gib * GIB)
    root = tree(tmp_path, "0::/a/b/c\n", [UNIFIED], files)
    assert usable_cores(root) == 3
    assert usable_memory(root) == 5 * GIB


def test_memory_that_is_taken_back_at_once_is_not_usable(tmp_path):
    root = tree(tmp_path, "0::/job\n", [UNIFIED], {"job/memory.max": str(9 * GIB), "job/memory.high": str(7 * GIB)})
    assert usable_memory(root) == 7 * GIB


def test_a_limit_beyond_the_machine_is_none(tmp_path):
    files = {"job/cpu.max": "9900000 100000", "job/memory.max": str(2 * TOTAL)}
    root = tree(tmp_path, "0::/job\n", [UNIFIED], files)
    assert usable_cores(root) == 64
    assert usable_memory(root) == TOTAL


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("50000 100000", 1), ("100000 100000", 1), ("199999 100000", 1), ("250000 100000", 2), ("30000 10000", 3)],
)
def test_whole_cores_of_a_quota(tmp_path, quota, cores):
    root = tree(tmp_path, "0::/job\n", [UNIFIED], {"job/cpu.max": quota})
    assert usable_cores(root) == cores


def test_fewer_cores_by_affinity_than_by_quota(tmp_path, monkeypatch):
    root = tree(tmp_path, "0::/job\n", [UNIFIED], {"job/cpu.max": "800000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 9, 11})
    assert usable_cores(root) == 3


@pytest.mark.parametrize(
    ("mounted", "path"),
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/abc", "/docker/abc"),  # the host's path, of which the container's group alone is mounted
        ("/docker/abc", "/docker/abc/inner"),  # and a group within it
        ("/", "/docker/abc"),  # the host's path, and nothing says where the mount begins
        ("/", "/../abc"),  # moved in from outside of the namespace
    ],
)
def test_a_containers_own_group_lies_at_the_mount(tmp_path, mounted, path):
    mount = UNIFIED.replace(" / /sys", f" {mounted} /sys")
    files = {"cpu.max": "400000 100000", "memory.max": str(32 * GIB), "inner/cpu.max": "max 100000"}
    root = tree(tmp_path, f"0::{path}\n", [mount], files)
    assert usable_cores(root) == 4
    assert usable_memory(root) == 32 * GIB


def test_a_group_within_a_container(tmp_path):
    mount = UNIFIED.replace(" / /sys", " /docker/abc /sys")
    root = tree(
        tmp_path, "0::/docker/abc/inner\n", [mount], {"cpu.max": "400000 100000", "inner/cpu.max": "100000 50000"}
    )
    assert usable_cores(root) == 2


def test_what_is_missing_or_not_understood_limits_nothing(tmp_path):
    assert usable_cores(tmp_path / "nothing") == 64
    mounts = ["", "nonsense", "31 23 0:28 /", UNIFIED.replace("cgroup2 cgroup2 rw,nsdelegate", "cgroup2")]
    files = {"job/cpu.max": "", "job/memory.max": "plenty", "cpu.max": "0 100000", "memory.max": "0"}
    root = tree(tmp_path / "odd", "\nnonsense\n7:\n0::/job\n", [*mounts, UNIFIED], files)
    assert usable_cores(root) == 64
    assert usable_memory(root) == TOTAL


def test_without_meminfo_the_system_is_asked(tmp_path, monkeypatch):
    root = tree(tmp_path, "0::/job\n", [UNIFIED], {})
    (root / "proc/meminfo").unlink()
    assert usable_memory(root) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", unknown)
    assert usable_memory(root) is None
    (root / "sys/fs/cgroup/job").mkdir(parents=True)
    (root / "sys/fs/cgroup/job/memory.max").write_text(str(GIB))
    assert usable_memory(root) == GIB


def test_this_machine():
    assert 1 <= usable_cores() <= 64
    memory = usable_memory()
    assert memory is None or memory > 1 << 20


def test_a_loaders_threads_are_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 32)
    assert loader_threads() == 32
    assert loader_threads(sharers=3) == 10
    assert loader_threads(sharers=64) == 1
    assert loader_threads(5, sharers=3) == 5
    monkeypatch.setattr(machine, "usable_cores", lambda: 384)
    assert loader_threads() == MOST_THREADS


def test_it_needs_neither_torch_nor_numba():
    words = [sys.executable, REPOSITORY / "tests/programs/loaded.py", "fastpmae_loaders.machine"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "loaders")}
    loaded = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    assert {"torch", "numba", "numpy"} & set(json.loads(loaded)) == set()
