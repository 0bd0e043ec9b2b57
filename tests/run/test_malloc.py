"""On the CPU what a run's tensors leave behind when they are freed is not given back to the system at once."""

import os
import subprocess
import sys

import pytest

from tests.made import REPOSITORY


def faults(argument: str, **variables: str) -> tuple[int, int]:
    """Page faults of ten tensors of 20 MB, and of four of 64 MB, where as many have just been freed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "THP", "GLIBC"))}
    environment |= {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}:{REPOSITORY / 'loaders'}", **variables}
    command = [sys.executable, "-m", "tests.programs.page_faults", argument]
    text = subprocess.run(command, env=environment, text=True, capture_output=True, check=True, timeout=120).stdout
    medium, large = map(int, text.split())
    return medium, large


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept_for_the_next_tensors():
    kept, given_back = faults("with"), faults("without")
    assert kept[0] < given_back[0] / 4
    assert kept[1] < given_back[1] / 4
    # a user's own setting stays
    own = faults("with", MALLOC_TRIM_THRESHOLD_=str(1 << 20))
    assert own[0] > 4 * kept[0]
