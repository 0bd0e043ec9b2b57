"""The fuzzer: that it sees what goes wrong, and that nothing does with what strangers' files are read by."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.case import KINDS, stream_of
from tests.fuzz.harness import fuzz
from tests.fuzz.worker import replay
from tests.made import REPOSITORY

SECONDS = 5.0
SEED = 20261128


@pytest.mark.slow
def test_every_end_of_a_case_is_counted_kept_and_found_again(tmp_path: Path):
    report = fuzz("known", 5, 4.0, tmp_path / "made", tmp_path / "kept", limit=2.0)
    failed = ("crash", "hang", "traceback", "unprintable", "memory")
    known = {"crash": 1, "hang": 1, "traceback": 2, "unprintable": 2, "memory": 1}
    rounds = report.outcomes["crash"]
    assert rounds >= 1
    # a stream that the time has cut short has some of them
    assert all(known[end] * (rounds - 1) <= report.outcomes[end] <= known[end] * rounds for end in failed)
    assert report.outcomes["ok"] >= 1
    assert report.outcomes["refused"] >= 1
    assert len(report.failures) == sum(report.outcomes[end] for end in failed)
    kept = tmp_path / "kept" / "known-5-0-2"
    assert (kept / "case.txt").read_text().startswith("crash: crashes\nexit status -11\n")
    (again,) = (case for at, case in enumerate(stream_of("known", 5, 0, tmp_path)) if at == 2)
    assert again.files[0].read_text() == (kept / "crashes.txt").read_text()
    outcome, words = replay("known", 5, 0, 5, tmp_path)
    assert outcome == "traceback"
    assert "KeyError: 'a key'" in words


def test_the_command_says_how_many_cases_failed(tmp_path: Path):
    words = ["known", "--replay", "0", "1", "--kept", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, "the kind that the fuzzer is tried on is none of a user's"
    assert f"name one of {', '.join(KINDS)}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_file_crashes_hangs_or_ends_in_a_traceback(kind: str, tmp_path: Path):
    report = fuzz(kind, SEED, SECONDS, tmp_path / "made", tmp_path / "kept")
    print(report)
    assert not report.failures, "\n".join([str(report), *report.failures])
    assert report.outcomes["refused"] > 0, "nothing was hostile enough to be refused"


@pytest.mark.slow
def test_the_decoder_as_python_answers_as_its_machine_code_does(tmp_path: Path):
    """What is fuzzed by coverage is what runs elsewhere; each index of it is checked."""
    words = ["--compare", "--corpus", str(tmp_path / "corpus"), "--kept", str(tmp_path / "kept")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.scalar_decoder", *words],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "corpus").iterdir())) > 50
