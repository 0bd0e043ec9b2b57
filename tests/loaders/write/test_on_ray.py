"""A set written by a Ray cluster of two nodes: the bytes of the local writer, whatever dies meanwhile."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastpmae_loaders.write.sets import write_set
from tests.made import REPOSITORY, made_image

PATHS = [str(REPOSITORY / folder) for folder in ("", "kernels", "loaders")]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(PATHS),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "400",
}
PARTS = 6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray (the extra ray)"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take a while to convert, one of which none can read."""
    folder = tmp_path_factory.mktemp("source") / "many"
    folder.mkdir()
    made_image(0, 900, 700).save(folder / "0000.png", compress_level=1)
    for number in range(1, 180):
        (folder / f"{number:04d}.png").hardlink_to(folder / "0000.png")
    (folder / "0100.png").unlink()
    (folder / "0100.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


@pytest.fixture(scope="module")
def quiet(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as one process writes it."""
    out = tmp_path_factory.mktemp("quiet") / "set"
    write_set(source, out, PARTS, workers=1, skip_bad=True, deduplicate=True)
    return out


class Ray:
    """A cluster in a process of its own."""

    def __init__(self, nodes: int):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.programs.ray_cluster", str(nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def kill_a_node(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "killed\n"

    def begin(self, source: Path, out: Path) -> subprocess.Popen:
        words = [source, out, "--shards", PARTS, "--on", "ray", "--skip-bad", "--deduplicate"]
        return subprocess.Popen(
            [sys.executable, "-m", "fastpmae_loaders.write.cli", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, "RAY_ADDRESS": self.address},
        )


@pytest.fixture
def cluster() -> Iterator[Ray]:
    ray = Ray(2)
    try:
        yield ray
    finally:
        ray.process.communicate(timeout=120)


def writers(out: Path) -> dict[int, str]:
    """The processes that have a part's file open to write it, by what is below `out`."""
    found = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            targets = [str(link.readlink()) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        for target in targets:
            if target.startswith(f"{out}/.partial-part-") and target.endswith(".beton"):
                found[int(process.name)] = Path(target).name
    return found


def wait_for_writers(out: Path, process: subprocess.Popen, count: int) -> dict[int, str]:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        if len(found := writers(out)) >= count:
            return found
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"nobody began to write: {process.communicate()}")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_worker_and_a_node_die_and_the_bytes_are_the_same(
    source: Path, quiet: Path, tmp_path: Path, cluster: Ray
) -> None:
    out = tmp_path / "set"
    process = cluster.begin(source, out)
    killed = next(iter(wait_for_writers(out, process, 2)))
    os.kill(killed, signal.SIGKILL)
    wait_for_writers(out, process, 2)
    cluster.kill_a_node()
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "179 images in 6 parts" in output
    assert "178 of them have the bytes of one before them" in output
    assert contents(out) == contents(quiet)
    # the same again: nothing is written twice
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    again = cluster.begin(source, out)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")} == before
    assert contents(out) == contents(quiet)


def test_an_address_without_a_cluster_is_one_sentence(source: Path, tmp_path: Path) -> None:
    words = [source, tmp_path / "set", "--shards", 2, "--on", "ray://127.0.0.1:9"]
    done = subprocess.run(
        [sys.executable, "-m", "fastpmae_loaders.write.cli", *map(str, words)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=240,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fastpmae-write: error: there is no Ray cluster at ray://127.0.0.1:9")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "set").exists()
