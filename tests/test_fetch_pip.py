"""scripts/fetch_pip.py: pip's wheel from wherever pip is told to look, and no other bytes under its name."""

import base64
import hashlib
import importlib.util
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from tests.made import REPOSITORY

CONTENT = b"a wheel, for this test"


@pytest.fixture
def fetch_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, for a wheel of other bytes, where pip has no settings but those of a test."""
    spec = importlib.util.spec_from_file_location("fetch_pip", REPOSITORY / "scripts/fetch_pip.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DIGEST", hashlib.sha256(CONTENT).hexdigest())
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "CERT", "PROXY"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "nothing").as_uri())
    return module


def test_the_digest_is_written_whole():
    text = (REPOSITORY / "scripts/fetch_pip.py").read_text()
    assert len(text.partition('DIGEST = "')[2].partition('"')[0]) == 64


def test_from_a_folder_that_pip_is_told_of(fetch_pip: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / fetch_pip.WHEEL).write_bytes(CONTENT)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert fetch_pip.fetch(tmp_path / "here") == tmp_path / "here" / fetch_pip.WHEEL
    assert (tmp_path / "here" / fetch_pip.WHEEL).read_bytes() == CONTENT


@pytest.fixture
def index(fetch_pip: ModuleType) -> Iterator[tuple[str, dict[str, bytes]]]:
    """An index that asks for a password: its address with that, and what lies at each path."""
    there: dict[str, bytes] = {
        "/simple/pip/": f'<a href="../../files/old-{fetch_pip.WHEEL}">old</a>'
        f'<a href="../../files/{fetch_pip.WHEEL}#sha256=00">{fetch_pip.WHEEL}</a>'.encode(),
        f"/files/{fetch_pip.WHEEL}": CONTENT,
    }
    wanted = "Basic " + base64.b64encode(b"me:open/sesame").decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # files lie open, as with most servers of packages
            known = self.path.startswith("/files/") or self.headers.get("Authorization") == wanted
            content = there.get(self.path, b"")
            self.send_response(200 if known and content else 404 if known else 401)
            self.end_headers()
            self.wfile.write(content if known else b"")

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://me:open%2Fsesame@127.0.0.1:{server.server_port}/simple", there
    server.shutdown()
    thread.join()
    server.server_close()


def test_from_the_index_of_a_configuration_file(
    fetch_pip: ModuleType, index: tuple[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PIP_INDEX_URL")
    (tmp_path / "pip.conf").write_text(f"[global]\nindex_url = {index[0]}/\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert fetch_pip.fetch(tmp_path / "here").read_bytes() == CONTENT
    # an environment variable has the last word
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "nothing").as_uri())
    with pytest.raises(fetch_pip.FetchError):
        fetch_pip.fetch(tmp_path / "here")


def test_other_bytes_under_its_name_are_not_taken(
    fetch_pip: ModuleType, index: tuple[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In one sentence, without the password."""
    address, there = index
    there[f"/files/{fetch_pip.WHEEL}"] = b"somebody else's"
    monkeypatch.setenv("PIP_INDEX_URL", address)
    with pytest.raises(fetch_pip.FetchError, match="has a file of that name with other bytes") as caught:
        fetch_pip.fetch(tmp_path / "here")
    assert "sesame" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "here").exists()
