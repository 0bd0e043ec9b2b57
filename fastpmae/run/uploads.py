"""A run's folder kept at an address in a store: checkpoints and the log go there as they are written, and come back.

A checkpoint counts when its marker is there, which is written after the last of its parts: `step-00000100.safetensors`
beside `step-00000100.whole`. What is in the store is what `--resume` finds, on any machine.
"""

import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fastpmae.config import Config
from fastpmae.distributed.ranks import Ranks
from fastpmae_loaders.errors import RunError, UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.locks import lock
from fastpmae_loaders.stores.address import Address, parse_address
from fastpmae_loaders.stores.cache import CacheSettings
from fastpmae_loaders.stores.client import Closed, Missing, Store, StoreError

CHECKPOINT = re.compile(r"checkpoints/step-(\d{8,15})\.(safetensors|whole)")
LOGS = ("config.json", "metrics.jsonl", "train.log", "machine.jsonl")
_AFTER_A_SIGNAL = 10.0
"""Seconds for which requests are tried again when the run is told to end: its machine may be taken away soon."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint in a store: the step that it was written after, and its bytes."""

    step: int
    size: int


def local_folder(address: Address, settings: CacheSettings) -> Path:
    """Where on this machine the run at an address has its folder."""
    name = hashlib.sha256(str(address).encode()).hexdigest()[:12]
    return settings.place / "runs" / f"{address.name or address.bucket}-{name}"


def open_uploads(config: Config, ranks: Ranks) -> "Uploads | None":
    """What takes a run to the address that --upload says, on the main rank; None on the others, and without one.

    The address is tried: a marker is written there and deleted. Where the run is resumed, its newest checkpoint comes
    back to every machine.

    Raises:
        UserError: on every rank where nothing can be written there, or a run is there that is not to be resumed.
    """
    if config.run.upload is None:
        return None
    address, made = parse_address(config.run.upload), list[Uploads]()
    folder = config.run.out or local_folder(address, config.data.cached)

    def open_main() -> None:
        store = Store(address)
        store.try_to_write(address)
        if config.run.resume is None and whole_checkpoints(store, address):
            raise UserError(f"{address} already holds a run: add --resume to continue it, or choose another --out")
        made.append(Uploads(store, address, folder, config.run.keep))

    ranks.broadcast_from_main(open_main)
    if config.run.resume == "auto":
        bring_back(address, folder)
    return made[0] if made else None


def whole_checkpoints(store: Store, address: Address) -> list[Stored]:
    """The checkpoints at an address whose markers are there and say their size, newest first. Raises StoreError."""
    sizes: dict[tuple[int, str], int] = {}
    for key, size in store.files(f"{address.key}/checkpoints".removeprefix("/")):
        found = CHECKPOINT.fullmatch(key.removeprefix(address.key).removeprefix("/"))
        if found:
            sizes[int(found[1]), found[2]] = size
    steps = sorted((step for step, kind in sizes if kind == "whole" and (step, "safetensors") in sizes), reverse=True)
    return [Stored(step, sizes[step, "safetensors"]) for step in steps]


def bring_back(address: Address, folder: Path) -> None:
    """Have the newest whole checkpoint at an address in the local folder, with the log; what is there is not asked for.

    Processes of one machine may call it at once: one does the work.

    Raises:
        UserError: where the store cannot be read, or the folder not be written.
    """
    checkpoints = folder / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        with (folder / ".bringing").open("w") as alone:
            lock(alone, wait=True)
            store = Store(address)
            found = store.first_try(lambda store: whole_checkpoints(store, address), address.key)
            for stored in found[:1]:
                _bring_checkpoint(store, address, stored, checkpoints)
            for name in LOGS:
                if found and not (folder / name).exists():
                    with contextlib.suppress(Missing), atomic_write(folder / name) as beside:
                        beside.write_bytes(store.read(_key(address, name)))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None


def _bring_checkpoint(store: Store, address: Address, stored: Stored, checkpoints: Path) -> None:
    name = f"step-{stored.step:08d}.safetensors"
    path = checkpoints / name
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size == stored.size:
            return
    marker = store.read(_key(address, f"checkpoints/{Path(name).with_suffix('.whole')}"))
    try:
        told = json.loads(bytes(marker[:4096]))["bytes"]
    except (ValueError, TypeError, KeyError, RecursionError):
        told = None
    if told != stored.size:
        raise UserError(f"{address}/checkpoints/{name} is not what its marker says: it is damaged, or being written")
    with atomic_write(path) as beside, beside.open("wb") as file:
        part = 64 << 20
        for start in range(0, stored.size, part):
            count = min(part, stored.size - start)
            file.write(store.read(_key(address, f"checkpoints/{name}"), start, count))


def _key(address: Address, name: str) -> str:
    return f"{address.key}/{name}".removeprefix("/")


class Uploads:
    """Takes checkpoints to a store beside training, the newest first, with the log; only the main rank has one.

    A store that is away for a while costs nothing but time: what could not be taken there is told, and the next
    checkpoint is tried. At the run's end the newest must be there.

    Args:
        keep: older checkpoints to keep beside the newest.
    """

    def __init__(self, store: Store, address: Address, folder: Path, keep: int) -> None:
        self.store, self.address, self.folder, self.keep = store, address, folder, keep
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._due: Path | None = None
        self._working = False
        self._ended = False
        self._failed: str | None = None
        self._untold: list[str] = []
        self._thread: threading.Thread | None = None

    def checkpoint(self, path: Path) -> None:
        """A checkpoint is written: take it to the store from now on. One that waits still is passed over for it."""
        with self._lock:
            self._due = path
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="fastpmae-upload", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def remarks(self) -> list[str]:
        """Sentences for the user since the last call."""
        with self._lock:
            told, self._untold = self._untold, []
        return told

    def finish(self, *, signalled: bool = False) -> None:
        """Until the newest checkpoint and the log are in the store.

        Args:
            signalled: the run was told to end, and has little time.

        Raises:
            RunError: where they could not be taken there.
        """
        if signalled:
            self.store.deadline = min(self.store.deadline, _AFTER_A_SIGNAL)
        with self._lock:
            while self._due is not None or self._working:
                self._changed.wait(0.2)
            failed = self._failed
        try:
            self._take_logs()
        except (StoreError, Closed) as error:
            failed = failed or str(error)
        if failed is not None:
            raise RunError(
                f"the run is whole in {self.folder}, and could not be taken to {self.address}: {failed}. --resume "
                f"--out {self.address} on this machine does so"
            )

    def close(self) -> None:
        """Give up what waits. Harmless when done twice."""
        with self._lock:
            self._ended, self._due = True, None
            self._changed.notify_all()
        self.store.close()

    def __enter__(self) -> "Uploads":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self._lock:
                while self._due is None and not self._ended:
                    self._changed.wait()
                if self._ended or self._due is None:
                    return
                path, self._due, self._working = self._due, None, True
            failed = None
            try:
                self._take(path)
            except (StoreError, OSError) as error:
                failed = str(error)
            except Closed:
                failed = "it was ended"
            with self._lock:
                self._working, self._failed = False, failed
                if failed is not None and not self._ended:
                    self._untold.append(f"warning: {path.name} could not be taken to {self.address}: {failed}")
                self._changed.notify_all()

    def _take(self, path: Path) -> None:
        size = path.stat().st_size
        self.store.put(self._key(path.name), path)
        marker = {"format": "fastpmae-checkpoint", "bytes": size}
        self.store.put(self._key(path.with_suffix(".whole").name), (json.dumps(marker) + "\n").encode())
        self._take_logs()
        for old in whole_checkpoints(self.store, self.address)[self.keep + 1 :]:
            # first the marker: what is half removed counts as nothing
            self.store.delete(self._key(f"step-{old.step:08d}.whole"))
            self.store.delete(self._key(f"step-{old.step:08d}.safetensors"))

    def _take_logs(self) -> None:
        for name in LOGS:
            if (self.folder / name).exists():
                self.store.put(_key(self.address, name), (self.folder / name).read_bytes())

    def _key(self, name: str) -> str:
        return _key(self.address, f"checkpoints/{name}")
