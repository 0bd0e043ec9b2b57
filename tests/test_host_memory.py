"""On the CPU a run's large tensors come in huge pages and are given back when they are freed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import ctypes, sys, torch, resource
from fastpmae.host_memory import give_back_at_once
if sys.argv[1] == "with":
    give_back_at_once()
class Info(ctypes.Structure):  # of glibc's malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks u f k".split()]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
torch.ones(7 << 20)  # 28 MB: once freed, glibc keeps what is as large, unless it is told otherwise
before = mallinfo().hblks
tensors = [torch.ones(5 << 20) for _ in range(20)]
print(mallinfo().hblks - before)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


def blocks_and_faults(argument: str, **variables: str) -> tuple[int, int]:
    """How many of 20 tensors of 20 MB have pages of their own, and page faults of one of 64 MB."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "THP", "GLIBC"))}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'loaders'}", **variables}
    command = [sys.executable, "-c", PROGRAM, argument]
    text = subprocess.run(command, env=environment, text=True, capture_output=True, check=True, timeout=120).stdout
    blocks, faults = map(int, text.split())
    return blocks, faults


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_large_tensors_have_huge_pages_of_their_own():
    blocks, few = blocks_and_faults("with")
    none, many = blocks_and_faults("without")
    assert blocks >= 20
    assert none < 20
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.exists() and "[madvise]" in huge.read_text():
        assert few < many / 2
    blocks, _ = blocks_and_faults("with", MALLOC_MMAP_THRESHOLD_=str(32 << 20))
    assert blocks < 20  # a user's own setting stays
