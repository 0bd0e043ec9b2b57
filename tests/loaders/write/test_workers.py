"""The pool gives every item its answer, in order, whatever happens to the processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.write.workers import Failure, WorkerPool
from tests.made import REPOSITORY


def answers(items: list[str], count: int = 2, timeout: float = 30.0, folder: Path | str = "", **options) -> list:
    told: list[str] = []
    with WorkerPool("tests.tasks:behaviour", (str(folder),), count, timeout, told.append) as pool:
        results = list(pool.in_order(items, **options))
    assert [place for place, _ in results] == list(range(len(items)))
    return [result for _, result in results]


@pytest.mark.parametrize("count", [1, 3])
def test_answers_come_in_order(count: int) -> None:
    items = [f"item {i}" for i in range(200)]
    assert answers(items, count) == list(enumerate(items))
    assert answers(items, count, group_size=1) == list(enumerate(items))
    assert answers(items, count, same_group=lambda a, b: a[-1] != b[-1]) == list(enumerate(items))


def test_large_answers_do_not_lock() -> None:
    results = answers(["large"] * 40, 2)
    assert all(len(result[1]) == 3_000_000 for result in results)


def test_exceptions_are_failures_of_their_item_alone() -> None:
    results = answers(["a", "refuse", "raise", "interrupt", "b"])
    assert results[0] == (0, "a")
    assert results[1] == Failure("no thanks")
    assert results[2] == Failure("ValueError: what is this")
    assert isinstance(results[3], Failure)
    assert results[4] == (4, "b")


@pytest.mark.parametrize(("deed", "says"), [("crash", "SIGSEGV"), ("null", "SIGSEGV"), ("exit", "status 3")])
def test_a_worker_that_dies_costs_its_item_alone(deed: str, says: str) -> None:
    items = [f"item {i}" for i in range(30)]
    items[11] = deed
    results = answers(items)
    assert says in results[11].reason
    assert [result for i, result in enumerate(results) if i != 11] == [(i, x) for i, x in enumerate(items) if i != 11]


def test_a_worker_that_was_killed_once_is_tried_again(tmp_path: Path) -> None:
    items = ["a"] * 9 + ["once"] + ["b"] * 9
    assert answers(items, folder=tmp_path)[9] == (9, "second try")


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["hang", "spin"])
def test_a_worker_that_hangs_is_replaced(deed: str) -> None:
    began = time.monotonic()
    results = answers(["a", deed, "b", "c"], count=1, timeout=1.0)
    assert "more than 1 seconds" in results[1].reason
    assert [results[0], *results[2:]] == [(0, "a"), (2, "b"), (3, "c")]
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_a_slow_consumer_is_no_hanging_worker() -> None:
    with WorkerPool("tests.tasks:behaviour", (), 1, 1.0) as pool:
        for place, result in pool.in_order(["large"] * 6):
            if place == 2:
                time.sleep(1.5)
            assert not isinstance(result, Failure)


@pytest.mark.slow
def test_processes_that_only_die_end_in_a_sentence() -> None:
    with pytest.raises(UserError, match="keep dying"):
        answers(["crash"] * 200)
    with (
        WorkerPool("tests.tasks:broken", (), 1, 30.0) as pool,
        pytest.raises(UserError, match="RuntimeError: this never starts"),
    ):
        list(pool.in_order(["a"]))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_process_is_left() -> None:
    pool = WorkerPool("tests.tasks:behaviour", (), 2, 30.0)
    pids = pool.pids
    results = pool.in_order(["a", "spin", "spin", "spin"], group_size=1)
    assert next(results) == (0, (0, "a"))
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    pool.close()
    assert not any(alive(pid) for pid in pids)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel to end workers with their parent")
def test_workers_die_with_a_parent_that_was_killed() -> None:
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), str(REPOSITORY / "loaders")]
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.programs.spinning_pool"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert parent.stdout is not None
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        time.sleep(2.0)  # they are spinning by now, or at least starting
        assert all(alive(pid) for pid in pids)
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)
