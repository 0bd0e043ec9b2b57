"""On the CPU a run's large tensors come in huge pages and are given back when they are freed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What is freed lies below something that is still in use, so only pages of its own can be given back.
PROGRAM = """
import sys, torch, resource
from fastpmae.host_memory import give_back_at_once
if sys.argv[1] == "with":
    give_back_at_once()
def held():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) // 1024
torch.ones(7 << 20)  # 28 MB: from here on glibc keeps what is as large
below = [torch.ones(5 << 20) for _ in range(20)]
above = torch.ones(1000)
before = held()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
del below
print(before - held())
"""


def given_back(argument: str, **variables: str) -> tuple[int, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "THP", "GLIBC"))}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'loaders'}", **variables}
    command = [sys.executable, "-c", PROGRAM, argument]
    text = subprocess.run(command, env=environment, text=True, capture_output=True, check=True, timeout=120).stdout
    faults, megabytes = map(int, text.split())
    return faults, megabytes


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_large_tensors_come_in_huge_pages_and_are_given_back():
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    few, returned = given_back("with")
    many, kept = given_back("without")
    assert returned >= 390  # of 400
    assert kept < 200
    if huge.exists() and "[never]" not in huge.read_text():
        assert few < many / 2
    _, returned = given_back("with", MALLOC_MMAP_THRESHOLD_=str(32 << 20))
    assert returned < 200  # a user's own setting stays
