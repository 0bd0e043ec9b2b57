"""Requests to an object store: through obstore, tried again for as long as it is sensible, and never past a close.

What a store answers is put into words of our own: its own text may hold a key's name or a signature.
"""

import contextlib
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
from fastpmae_loaders.stores.opening import ENDPOINTS, KEYS, open_bucket

Answer = TypeVar("Answer")

FIRST_TRY = 20.0
"""Seconds in which a store must answer when a program starts."""
DEADLINE = 300.0
"""Seconds for which a request is tried again later on."""
_LONGEST_PAUSE = 8.0
_PAUSES = random.Random()
"""Not the program's own generator, from which a training on the main thread draws meanwhile."""
UPLOAD_PART = 8 << 20
_MOST_PARTS = 9000  # S3 takes 10,000


class Closed(Exception):
    """A request that was given up because whoever wanted it has closed."""


_waiting = threading.local()


@contextlib.contextmanager
def waits_end_when(stopped: Callable[[], bool]) -> Iterator[None]:
    """Within it this thread waits for no request and no fetch any more once `stopped` says so: Closed is raised."""
    before = waits_end()
    _waiting.stopped = stopped
    try:
        yield
    finally:
        _waiting.stopped = before


def waits_end() -> Callable[[], bool] | None:
    """What says that this thread's waits end (see `waits_end_when`)."""
    return getattr(_waiting, "stopped", None)


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
    """A file that is no longer the version that was opened."""


class Store:
    """One bucket. Its methods may be called by any number of threads; each takes the key within the bucket.

    A request that fails for a reason that may pass (a server's 5xx, a connection that breaks, a timeout) is tried again
    with growing pauses for `deadline` seconds. Ctrl-C, `close` and `waits_end_when` end the wait at once.

    Raises:
        UserError: without obstore, and for settings of the environment that it does not take.
    """

    def __init__(self, address: Address, deadline: float = DEADLINE) -> None:
        self.address = Address(address.scheme, address.bucket)
        self.deadline = deadline
        self._closed = threading.Event()
        self._process = os.getpid()
        self._store = open_bucket(address)

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
        listing = _Listing(self._store, prefix and prefix.removesuffix("/") + "/")
        while chunk := self._patiently(prefix, listing.more):
            yield from ((entry["path"], int(entry["size"])) for entry in chunk)

    def put(self, key: str, data: bytes | Path) -> None:
        """Write a file, whole or not at all; what is large goes in parts.

        Args:
            data: the bytes, or the file that holds them.

        Raises:
            StoreError: where it cannot be written.
        """

        def send(obstore: Any) -> None:
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
            return _aside(lambda: act(self), FIRST_TRY, self._closed.is_set)
        except TimeoutError:
            where = self.address / key if key else self.address
            name = {"az": "account", "https": "host", "http": "host"}.get(where.scheme, "bucket")
            hint = f"the {name}'s name"
            if where.scheme in ENDPOINTS:
                hint += f", to the endpoint that the environment names ({ENDPOINTS[where.scheme]}, say)"
            raise StoreError(
                f"{where} cannot be reached: no answer within {FIRST_TRY:g} s. See to {hint}, and to the network"
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
        given_up = waits_end()
        alone = given_up is None and threading.current_thread() is not threading.main_thread()

        def ended() -> bool:
            return self._closed.is_set() or (given_up is not None and given_up())

        while True:
            if ended():
                raise Closed
            try:
                return request(obstore) if alone else _aside(lambda: request(obstore), None, ended)
            except FileNotFoundError as error:
                code = _CODE.search(str(error))
                what = _NO_BUCKET.get(code[1]) if code else None
                raise Missing(f"{where}: {what}" if what else f"{where} does not exist") from None
            except obstore.exceptions.PreconditionError:
                raise Changed(f"{where} is no longer the file that was opened") from None
            except (obstore.exceptions.BaseError, OSError, ValueError, RuntimeError) as error:
                reason, passing = _reason(error, where.scheme)
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
                end = time.monotonic() + min(left, pause * _PAUSES.uniform(0.5, 1.5))
                while not ended() and (rest := end - time.monotonic()) > 0:
                    self._closed.wait(min(rest, 0.2))
                pause = min(2 * pause, _LONGEST_PAUSE)


class _Listing:
    """A folder of a store, listed by the thousand; where a request for more fails, the next goes on behind the last.

    One stream is kept for all of it: not every store can begin behind a name, and of one that cannot (Azure's, as
    obstore asks it, may begin anew with each request) the names that were there before are passed over.
    """

    def __init__(self, store: Any, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self._stream: Iterator[Any] | None = None
        self._after: str | None = None
        self._begun: str | None = None

    def more(self, obstore: Any) -> list[Any]:
        """The next entries in order; none at the end."""
        try:
            if self._stream is None:
                self._begun = self._after
                found = obstore.list(self._store, self._prefix or None, offset=self._begun, chunk_size=1000)
                self._stream = iter(found)
            while chunk := next(self._stream, []):
                new = [entry for entry in chunk if self._begun is None or entry["path"] > self._begun]
                if new:
                    new.sort(key=lambda entry: entry["path"])
                    self._after = new[-1]["path"]
                    return new
        except BaseException:
            self._stream = None
            raise
        return []


def _aside(work: Callable[[], Answer], seconds: float | None, ended: Callable[[], bool]) -> Answer:
    """What `work` gives, computed in another thread, so that ctrl-C and `ended` are heard meanwhile.

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
        if ended():
            raise Closed
        if end is not None and time.monotonic() > end:
            raise TimeoutError
    good, found = answer[0]
    if not good:
        raise found
    return found


_REFUSED = "the store refuses these credentials"
_STATUS = re.compile(r"(?:status code: |\(code: )(\d{3})")  # the latter of Azure's store, which deletes in batches
_CODE = re.compile(r"<Code>([A-Za-z]{3,60})</Code>")
_NO_BUCKET = {"NoSuchBucket": "there is no such bucket", "ContainerNotFound": "there is no such container"}


def _reason(error: BaseException, scheme: str) -> tuple[str, bool]:
    """Why a request failed, in words of our own, and whether it may do better in a while."""
    text = str(error)
    status = _STATUS.search(text)
    code = _CODE.search(text)
    kind = type(error).__name__
    if "169.254.169.254" in text or "metadata.google.internal" in text:
        return (
            f"no credentials were found, neither in the environment ({KEYS.get(scheme, '')}), nor from this machine's "
            "own role",
            False,
        )
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or (status and status[1] in ("401", "403")):
        return f"{_REFUSED}{f' ({code[1]})' if code else ''}", False
    if code and code[1] in _NO_BUCKET:
        return _NO_BUCKET[code[1]], False
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
    return "the connection to the store broke", True
