"""The short form of `python -m tests.kills`."""

from pathlib import Path

import pytest

from tests.kills import differences, storm


@pytest.mark.slow
def test_runs_that_are_killed_and_resumed_equal_one_that_was_not(tmp_path: Path):
    seen, different = storm(tmp_path, runs=2, signals=6, busy=0)  # other tests are busy enough
    assert seen.total() == 6
    assert different == []
    # The comparison itself: 16 and 24 prototypes are not the same run.
    assert len(differences(tmp_path / "straight-16", tmp_path / "straight-24")) > 1
