"""Images and settings that every test may use."""

import itertools
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

# Networks in the tests are so small that a second thread costs more than it brings, and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what runs in the background deaf to Ctrl-C, nohup to the end of its terminal, and so would be every
# program that a test interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import jaxtyping
import pytest
import torch

import tests.typed  # noqa: F401 - before any module whose annotations it has checked
from fastpmae import Config, write_beton
from fastpmae_loaders.stores.address import Address, parse_address
from tests.made import tiny_settings, write_tree
from tests.stores import BUCKET, Server, s3_server

_places = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` say why they do not run."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests marked `untyped` run without a check of annotations (see tests/typed.py)."""
    jaxtyping.config.update("jaxtyping_disable", item.get_closest_marker("untyped") is not None)
    return (yield)


@pytest.fixture(scope="session")
def small_beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 images in 3 classes: at batch 8, five steps an epoch with four images left over."""
    folder = tmp_path_factory.mktemp("images")
    write_beton(write_tree(folder / "tree", 44), folder / "small.beton")
    return folder / "small.beton"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An S3 server, which starts once: tests that end it, or that it must be empty for, start their own."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def place(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Address:
    """An empty folder of that server, which the environment names; this machine's folder of caches is the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    # what a test changes of it is undone before it is, in one stack
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return parse_address(f"s3://{BUCKET}/test-{next(_places)}")


@pytest.fixture
def tiny(small_beton: Path, tmp_path: Path) -> Config:
    return tiny_settings(small_beton).using(out=tmp_path / "run")
