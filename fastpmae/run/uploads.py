"""A run's folder kept at an address in a store: checkpoints and the log go there as they are written.

What is in the store is what `--resume` finds, on any machine (see `stored_run`).
"""

import contextlib
import threading
import uuid
from pathlib import Path
from types import TracebackType

from fastpmae.config import Config
from fastpmae.distributed.ranks import Ranks
from fastpmae.run.checkpoint import CheckpointError, identity_of, newest_checkpoint
from fastpmae.run.stored_run import (
    LOGS,
    PAST,
    WHOLE,
    Stored,
    bring_back,
    key_in,
    local_folder,
    marker_of,
    whole_checkpoints,
)
from fastpmae_loaders.errors import RunError, UserError
from fastpmae_loaders.stores.address import Address, parse_address
from fastpmae_loaders.stores.client import Closed, Store, StoreError

_AFTER_A_SIGNAL = 10.0
"""Seconds for which requests are tried again when the run is told to end: its machine may be taken away soon."""


def open_uploads(config: Config, ranks: Ranks) -> "Uploads | None":
    """What takes a run to the address that --upload says (see `uploads_to`); None without one."""
    if config.run.upload is None:
        return None
    address = parse_address(config.run.upload)
    folder = config.run.out or local_folder(address, config.data.cached)
    return uploads_to(address, folder, ranks, keep=config.run.keep, resumes=config.run.resume is not None)


def uploads_to(address: Address, folder: Path, ranks: Ranks, *, keep: int, resumes: bool) -> "Uploads | None":
    """What takes a training's folder to an address, on the main rank; None on the others.

    The address is tried: a marker is written there and deleted.

    Args:
        keep: older checkpoints to keep there beside the newest.
        resumes: whether the training goes on with what is there.

    Raises:
        UserError: on every rank where nothing can be written there, or a training is there that is not to be resumed.
    """
    made = list[Uploads]()

    def open_main() -> None:
        store = Store(address)
        store.try_to_write(address)
        if not resumes and whole_checkpoints(store, address):
            raise UserError(f"{address} already holds a run: add --resume to continue it, or choose another --out")
        made.append(Uploads(store, address, folder, keep))

    ranks.broadcast_from_main(open_main)
    return made[0] if made else None


def take_up_at(address: Address | None, folder: Path, ranks: Ranks, *, resume: bool) -> "Uploads | None":
    """The same for a training that takes up its newest checkpoint where it is resumed: it comes to every machine."""
    if address is None:
        return None
    uploads = uploads_to(address, folder, ranks, keep=1, resumes=resume)
    if resume:
        bring_back(address, folder)
        if ranks.size > ranks.local_size:
            newest = ranks.broadcast_from_main(lambda: _newest_in(folder))
            on_every_machine(newest, address, folder, uploads, ranks)
    return uploads


def on_every_machine(
    checkpoint: Path | None, address: Address | None, folder: Path, uploads: "Uploads | None", ranks: Ranks
) -> None:
    """See that each machine has the checkpoint that the main rank goes on from, where there is one.

    That may be newer than all in the store: its run was ended before it was there. It is taken there now, and comes to
    the other machines.

    Raises:
        UserError: on every rank where a machine cannot have it.
    """
    if checkpoint is None or ranks.size == ranks.local_size:
        return
    identity, is_own = ranks.broadcast_from_main(
        lambda: (identity_of(checkpoint), checkpoint.parent == folder / "checkpoints")
    )

    def is_missing() -> bool:
        try:
            missing = identity_of(checkpoint) != identity
        except CheckpointError:
            missing = True
        return bool(ranks.max_over_ranks(missing)[0])

    missing = is_missing()
    if missing and is_own and address is not None:
        if uploads is not None:
            uploads.checkpoint(checkpoint)
        # asked again and again: in one message a rank waits for --rank-timeout alone
        while not ranks.broadcast_from_main(lambda: uploads is None or uploads.is_done(5.0)):
            pass
        bring_back(address, folder, checkpoint.name)
        missing = is_missing()
    if missing:
        raise UserError(
            f"the first machine goes on from {checkpoint}, which another machine does not have: name a folder that all "
            "machines see with --out, or an address in a store"
        )


def _newest_in(folder: Path) -> Path | None:
    checkpoint, _ = newest_checkpoint(folder)
    return None if checkpoint is None else checkpoint.path


def check_shared(folder: Path, ranks: Ranks) -> None:
    """UserError, on every rank, where the machines of a run do not write to one folder."""
    if ranks.size == ranks.local_size:
        return
    mark, is_new = folder / f".seen-{uuid.uuid4().hex[:16]}", not folder.exists()

    def leave() -> str:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            raise UserError(f"--out {folder} cannot be written: {error.strerror or error}") from None
        return mark.name

    name = ranks.broadcast_from_main(leave)
    (missing,) = ranks.max_over_ranks(not (folder / name).exists())
    mark.unlink(missing_ok=True)
    if missing:
        if ranks.is_main and is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise UserError(
            f"--sharded-checkpoints: {folder} is another folder on each machine, and all ranks write to one: name a "
            "folder that all machines see with --out (and the address of a run in a store with --upload)"
        )


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

    def is_done(self, seconds: float) -> bool:
        """Whether nothing is on its way any more, within some seconds. Raises UserError where it did not get there."""
        with self._lock:
            self._changed.wait_for(lambda: self._due is None and not self._working, seconds)
            if self._due is not None or self._working:
                return False
            if self._failed is not None:
                raise UserError(f"the newest checkpoint could not be taken to {self.address}: {self._failed}")
        return True

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

    def leave_past(self, step: int) -> None:
        """Checkpoints after a step, which the run went on from, count no more: the newest is the run's own.

        Their files stay until the run writes a checkpoint of the same name. Raises StoreError.
        """
        for stored in whole_checkpoints(self.store, self.address):
            if stored.step > step:
                self.store.put(self._key(stored.marker + PAST), b"the run went on from a checkpoint before this one\n")
                self.store.delete(self._key(stored.marker + WHOLE))

    def _take(self, path: Path) -> None:
        marker = marker_of(path)
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            self.store.put(self._key(file.relative_to(path.parent).as_posix()), file)
        stored = Stored(path.name, {})
        self.store.put(self._key(stored.marker + WHOLE), marker)
        self.store.delete(self._key(stored.marker + PAST))
        self._take_logs()
        for old in whole_checkpoints(self.store, self.address)[self.keep + 1 :]:
            # first the marker: what is half removed counts as nothing
            for name in (old.marker + WHOLE, *old.files):
                self.store.delete(self._key(name))

    def _take_logs(self) -> None:
        for name in LOGS:
            if (self.folder / name).exists():
                self.store.put(key_in(self.address, name), (self.folder / name).read_bytes())

    def _key(self, name: str) -> str:
        return key_in(self.address, f"checkpoints/{name}")
