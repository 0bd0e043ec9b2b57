"""On the CPU a run's large tensors come in huge pages, and what smaller ones leave behind is not given back at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import resource, sys, torch
from fastpmae.host_memory import tune_allocator
if sys.argv[1] == "with":
    tune_allocator()
def faults(count, millions):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(millions << 20) for _ in range(count)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
large = faults(1, 16)  # first: later the heap may have room for it, and no page is new
faults(10, 5)
print(faults(10, 5), large)
"""


def faults(argument: str, **variables: str) -> tuple[int, int]:
    """Page faults of ten tensors of 20 MB where ten have just been freed, and of one of 64 MB."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "THP", "GLIBC"))}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'loaders'}", **variables}
    command = [sys.executable, "-c", PROGRAM, argument]
    text = subprocess.run(command, env=environment, text=True, capture_output=True, check=True, timeout=120).stdout
    again, large = map(int, text.split())
    return again, large


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept_and_large_tensors_have_huge_pages():
    again, large = faults("with")
    given_back, small_pages = faults("without")
    assert again < given_back / 4
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.exists() and "[madvise]" in huge.read_text():
        assert large < small_pages / 2
    # a user's own setting stays
    assert faults("with", MALLOC_TRIM_THRESHOLD_=str(1 << 20), THP_MEM_ALLOC_ENABLE="0")[0] > 4 * again
