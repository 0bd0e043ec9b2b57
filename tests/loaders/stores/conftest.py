"""The servers that these tests share."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastpmae_loaders.stores.address import Address, parse_address
from tests.stores import BUCKET, Server, s3_server, told

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def place(s3: Server) -> Iterator[Address]:
    """An empty folder of the server's, which the environment names."""
    with told(s3):
        yield parse_address(f"s3://{BUCKET}/test-{next(_numbers)}")


@pytest.fixture
def no_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials of whoever runs the tests."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
