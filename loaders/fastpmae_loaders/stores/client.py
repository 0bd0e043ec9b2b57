"""Requests to an object store: through obstore, tried again for as long as it is sensible, and never past a close.

What a store answers is put into words of our own: its own text may hold a key's name or a signature.
"""

import configparser
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.stores.address import Address

Answer = TypeVar("Answer")

FIRST_TRY = 20.0
"""Seconds in which a store must answer when a program starts."""
DEADLINE = 300.0
"""Seconds for which a request is tried again later on."""
_CONNECT, _STALL, _WHOLE = "5s", "20s", "120s"
_LONGEST_PAUSE = 8.0
_PAUSES = random.Random()
"""Not the program's own generator, from which a training on the main thread draws meanwhile."""
UPLOAD_PART = 8 << 20
_MOST_PARTS = 9000  # S3 takes 10,000

_MISSING = (
    "{address}: reading from and writing to object stores needs the package obstore, which is not installed here: "
    "pip install 'fastpmae-loaders[stores]'"
)


class Closed(Exception):
    """A request that was given up because whoever wanted it has closed."""


class Stat(NamedTuple):
    """What a store says of a file.

    `size` in bytes; `version`, which a request can ask for (an ETag), or None; `mark`, which tells this version from
    others: the ETag, or the time of its last change.
    """

    size: int
    version: str | None
    mark: str


class StoreError(UserError):
    """A store that cannot be reached, or that refuses."""


class Missing(StoreError):
    """A file that is not there."""


class Refused(StoreError):
    """A request that the store does not allow; S3 says so of what is missing too, where a bucket must not be listed."""


class Changed(StoreError):
    """A file that is no longer the version that was opened, or that was to be made new and is there."""


class Store:
    """One bucket. Its methods may be called by any number of threads; each takes the key within the bucket.

    A request that fails for a reason that may pass (a server's 5xx, a connection that breaks, a timeout) is tried again
    with growing pauses for `deadline` seconds. Ctrl-C and `close` end the wait at once.

    Raises:
        UserError: without obstore, and for settings of the environment that it does not take.
    """

    def __init__(self, address: Address, deadline: float = DEADLINE) -> None:
        self.address = Address(address.scheme, address.bucket)
        self.deadline = deadline
        self._closed = threading.Event()
        self._process = os.getpid()
        self._store = _open(address)

    def stat(self, key: str) -> Stat:
        """Size and version of a file. Raises Missing, StoreError."""
        found = self._patiently(key, lambda obstore: obstore.head(self._store, key))
        tag = found["e_tag"]
        # what begins so stands for files that are alike, and cannot be asked for
        version = None if tag is None or tag.startswith("W/") else tag
        return Stat(int(found["size"]), version, tag or found["last_modified"].isoformat())

    def read(self, key: str, start: int = 0, size: int | None = None, version: str | None = None) -> memoryview:
        """Bytes start … start + size - 1 of a file, all of them where no size is given.

        Args:
            version: of the file that is meant; None takes any.

        Raises:
            Missing, Changed, StoreError: where it is not there, is another version, is shorter, or cannot be had.
        """
        options: dict[str, Any] = {} if size is None else {"range": (start, start + size)}
        if version is not None:
            options["if_match"] = version
        data = memoryview(self._patiently(key, lambda obstore: obstore.get(self._store, key, options=options).bytes()))
        if size is not None and len(data) != size:
            raise Changed(
                f"{self.address / key} ends at byte {start + len(data):,}, and byte {start + size:,} was to be read"
            )
        return data

    def files(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, size) of every file below a folder, in the order of their keys. Raises StoreError."""
        begin = prefix and prefix.removesuffix("/") + "/"
        after: str | None = None
        while True:
            chunk = self._patiently(prefix, lambda obstore, after=after: self._some(obstore, begin, after))
            yield from ((entry["path"], int(entry["size"])) for entry in chunk)
            if not chunk:
                return
            after = chunk[-1]["path"]

    def put(self, key: str, data: bytes | Path, *, new: bool = False) -> None:
        """Write a file, whole or not at all; what is large goes in parts.

        Args:
            data: the bytes, or the file that holds them.
            new: refuse where there is one of that name. For what fits one request.

        Raises:
            Changed: with `new`, where it is there.
            StoreError: where it cannot be written.
        """

        def send(obstore: Any) -> None:
            if new:
                obstore.put(self._store, key, data, mode="create")
            else:
                size = data.stat().st_size if isinstance(data, Path) else len(data)
                obstore.put(self._store, key, data, chunk_size=max(UPLOAD_PART, -(-size // _MOST_PARTS)))

        self._patiently(key, send)

    def delete(self, key: str) -> None:
        """Remove a file; one that is not there is none to remove. Raises StoreError."""
        try:
            self._patiently(key, lambda obstore: obstore.delete(self._store, key))
        except Missing:
            return

    def first_try(self, act: Callable[["Store"], Answer], key: str = "") -> Answer:
        """What `act` gives, by requests that must be answered within FIRST_TRY seconds, as when a program starts.

        Raises:
            StoreError: where they are not.
        """
        patience, self.deadline = self.deadline, FIRST_TRY
        try:
            return _aside(lambda: act(self), FIRST_TRY, self._closed)
        except TimeoutError:
            where = self.address / key if key else self.address
            raise StoreError(
                f"{where} cannot be reached: no answer within {FIRST_TRY:g} s. See to the network, to the endpoint "
                "that the environment names (AWS_ENDPOINT_URL, say), and to the bucket's name"
            ) from None
        finally:
            self.deadline = patience

    def try_to_write(self, address: Address) -> None:
        """See that files can be written at an address of this bucket and removed again, within FIRST_TRY seconds.

        Raises:
            StoreError: one sentence, where they cannot.
        """
        if address.scheme in ("https", "http"):
            raise StoreError(f"{address}: https:// can only be read from; name an address with s3://, gs:// or az://")
        name = f"/.try-{uuid.uuid4().hex[:16]}"
        marker = f"{address.key}{name}".removeprefix("/")

        def write_and_delete(store: "Store") -> None:
            store.put(marker, b"whether fastpmae may write here\n")
            store.delete(marker)

        try:
            self.first_try(write_and_delete, address.key)
        except StoreError as error:  # the user named no such file
            raise type(error)(str(error).replace(name, "")) from None

    @property
    def closed(self) -> bool:
        """Whether its requests have been given up."""
        return self._closed.is_set()

    def close(self) -> None:
        """Give up every request that waits or is under way. Harmless when done twice."""
        self._closed.set()

    def _some(self, obstore: Any, prefix: str, after: str | None) -> list[Any]:
        """The next thousand entries of a folder, in order; stores list in the order of keys."""
        stream = obstore.list(self._store, prefix or None, offset=after, chunk_size=1000)
        return sorted(next(iter(stream), []), key=lambda entry: entry["path"])

    def _patiently(self, key: str, request: Callable[[Any], Answer]) -> Answer:
        """The answer to a request, tried again where it fails for a while."""
        import obstore

        if os.getpid() != self._process:
            raise StoreError(
                f"process {os.getpid()} uses a connection to {self.address} that process {self._process} opened before "
                "it was forked: open it anew in the process that uses it, or start that process afresh (spawn)"
            )
        where = self.address / key if key else self.address
        began, pause = time.monotonic(), 0.1
        while True:
            if self._closed.is_set():
                raise Closed
            try:
                if threading.current_thread() is threading.main_thread():
                    return _aside(lambda: request(obstore), None, self._closed)
                return request(obstore)
            except FileNotFoundError as error:
                raise Missing(_missing(where, str(error))) from None
            except (obstore.exceptions.PreconditionError, obstore.exceptions.AlreadyExistsError):
                raise Changed(f"{where} is there already, or is no longer the file that was opened") from None
            except (obstore.exceptions.BaseError, OSError, ValueError, RuntimeError) as error:
                reason, passing = _reason(error)
                if reason.startswith(_REFUSED):
                    raise Refused(f"{where}: {reason}") from None
                left = began + self.deadline - time.monotonic()
                if not passing:
                    raise StoreError(f"{where}: {reason}") from None
                if left <= 0:
                    raise StoreError(
                        f"{where}: {reason}; it was tried for {time.monotonic() - began:.0f} s. Go on when the store "
                        "is there again"
                    ) from None
                # drawn, so that ranks that failed together do not come back together
                self._closed.wait(min(left, pause * _PAUSES.uniform(0.5, 1.5)))
                pause = min(2 * pause, _LONGEST_PAUSE)


def _aside(work: Callable[[], Answer], seconds: float | None, closed: threading.Event) -> Answer:
    """What `work` gives, computed in another thread, so that ctrl-C and `closed` are heard meanwhile.

    Raises:
        TimeoutError: after so many seconds; the thread is left to itself.
    """
    answer: list[tuple[bool, Any]] = []
    done = threading.Event()

    def run() -> None:
        try:
            answer.append((True, work()))
        except BaseException as error:
            answer.append((False, error))
        done.set()

    threading.Thread(target=run, name="fastpmae-store", daemon=True).start()
    end = None if seconds is None else time.monotonic() + seconds
    while not done.wait(0.2):
        if closed.is_set():
            raise Closed
        if end is not None and time.monotonic() > end:
            raise TimeoutError
    good, found = answer[0]
    if not good:
        raise found
    return found


def _open(address: Address) -> Any:
    """obstore's own object for a bucket."""
    try:
        import obstore.store as stores
    except ImportError:
        raise UserError(_MISSING.format(address=address)) from None
    # a fault that is gone at once need not come back to Python; what lasts is tried again here, where it can be ended
    retry = {"max_retries": 2, "backoff": {"init_backoff": _seconds(0.05), "max_backoff": _seconds(0.5), "base": 2}}
    client: dict[str, Any] = {"connect_timeout": _CONNECT, "read_timeout": _STALL, "timeout": _WHOLE}
    common: dict[str, Any] = {"retry_config": retry | {"retry_timeout": _seconds(10)}, "client_options": client}
    try:
        if address.scheme == "s3":
            settings = _profile() if "AWS_ACCESS_KEY_ID" not in os.environ else {}
            endpoint = (
                settings.get("endpoint")
                or os.environ.get("AWS_ENDPOINT_URL_S3", "")
                or os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", ""))
            )
            client["allow_http"] = endpoint.startswith("http://")
            return stores.S3Store(address.bucket, **settings, **common)
        if address.scheme == "gs":
            return stores.GCSStore(address.bucket, **common)
        if address.scheme == "az":
            return stores.AzureStore(address.bucket, **common)
        client["allow_http"] = address.scheme == "http"
        return stores.HTTPStore.from_url(str(Address(address.scheme, address.bucket)), **common)
    except Exception as error:
        raise StoreError(f"{address} cannot be opened: {_reason(error)[0]}") from None


def _seconds(count: float) -> Any:
    from datetime import timedelta

    return timedelta(seconds=count)


def _profile() -> dict[str, str]:
    """Keys, region and endpoint of the AWS profile in use, from the files that its own tools read; obstore does not."""
    name = os.environ.get("AWS_PROFILE", os.environ.get("AWS_DEFAULT_PROFILE", "default"))
    home = Path("~/.aws").expanduser()
    files = {
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials"): name,
        os.environ.get("AWS_CONFIG_FILE", home / "config"): name if name == "default" else f"profile {name}",
    }
    wanted = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
        "region": "region",
        "endpoint_url": "endpoint",
    }
    found: dict[str, str] = {}
    for path, section in files.items():
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            parser.read(path, encoding="utf-8")
            values = dict(parser[section]) if section in parser else {}
        except (configparser.Error, OSError, UnicodeDecodeError):
            raise UserError(f"{path} is no file of AWS profiles that can be read") from None
        found |= {ours: values[theirs] for theirs, ours in wanted.items() if values.get(theirs)}
    variables = {
        "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    }
    for setting, names in variables.items():
        if any(os.environ.get(variable) for variable in names):
            found.pop(setting, None)
    return (
        found
        if "access_key_id" in found and "secret_access_key" in found
        else {setting: found[setting] for setting in ("region", "endpoint") if setting in found}
    )


_REFUSED = "the store refuses these credentials"
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z]{3,60})</Code>")


def _missing(where: Address, text: str) -> str:
    if "NoSuchBucket" in text:
        return f"{where}: there is no such bucket"
    return f"{where} does not exist"


def _reason(error: BaseException) -> tuple[str, bool]:
    """Why a request failed, in words of our own, and whether it may do better in a while."""
    text = str(error)
    status = _STATUS.search(text)
    code = _CODE.search(text)
    kind = type(error).__name__
    if "169.254.169.254" in text or "metadata.google.internal" in text:
        return (
            "no credentials were found, neither in the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, "
            "AZURE_STORAGE_ACCOUNT_NAME and so on), nor in a profile, nor from this machine's own role",
            False,
        )
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or (status and status[1] in ("401", "403")):
        return f"{_REFUSED}{f' ({code[1]})' if code else ''}", False
    if code and code[1] == "NoSuchBucket":
        return "there is no such bucket", False
    if status:
        number = int(status[1])
        passing = number >= 500 or number in (408, 425, 429)
        return f"the store answers {number}{f' ({code[1]})' if code else ''}", passing
    if "kind: Connect" in text or "error sending request" in text:
        if "dns error" in text or "failed to lookup" in text:
            return "its host is not found", True
        if "certificate" in text:
            return "its host's certificate is not trusted", False
        return "the store cannot be connected to" if "TimedOut" not in text else "the store does not answer", True
    if "TimedOut" in text or "timed out" in text:
        return "the store does not answer", True
    if kind == "NotSupportedError":
        return "this kind of store cannot do that", False
    if kind in ("UnknownConfigurationKeyError", "InvalidPathError") or isinstance(error, ValueError):
        return "a setting of the environment, or the name, is none that such a store takes", False
    if "Missing" in text and "Configuration" not in text:
        return "a setting is missing, such as the account's name in the environment", False
    return "the connection to the store broke", True
