"""A run in a store: which of its checkpoints are whole, and how they come to this machine, alone or with the rest.

A checkpoint counts when its marker is there, which is written after the last of its files: `step-00000100.safetensors`
beside `step-00000100.whole`, and `step-00000100.shards/…` beside `step-00000100.shards.whole`.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastpmae.config import Config, run_at
from fastpmae.run.checkpoint import CheckpointError, identity_of
from fastpmae.run.trackers import WANDB_ID
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_folder, atomic_write
from fastpmae_loaders.locks import lock
from fastpmae_loaders.stores.address import Address, parse_address, place_of
from fastpmae_loaders.stores.cache import CacheSettings
from fastpmae_loaders.stores.client import Missing, Refused, Store, StoreError
from fastpmae_loaders.stores.copies import copy_here, fetch_file

LOGS = ("config.json", "metrics.jsonl", "train.log", "machine.jsonl", WANDB_ID)
"""What a run's folder holds besides its checkpoints."""
EXPORTED = ("model.safetensors", "pytorch_model.bin")
"""What the weights in a folder are called, here and on the hub."""
TUNED = {
    "finetune": "classifier.safetensors", "segment": "segmenter.safetensors", "detect": "detector.safetensors",
}  # fmt: skip
"""What each kind of training of a whole network leaves in its folder, under the name of its settings."""
WHOLE, PAST = ".whole", ".past"
"""Endings of a checkpoint's marker; the latter where the run went on from one before it."""
_STEP = re.compile(r"step-(\d{8,15})\.(safetensors|shards)")
LARGEST_RESULT = 4 << 20
"""Bytes of a file of results that comes along with a run."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint in a store.

    Attributes:
        name: what it is called in a run's folder of checkpoints.
        files: it, or those in it, by their names in that folder, with their bytes.
    """

    name: str
    files: dict[str, int]

    @property
    def step(self) -> int:
        """The step that it was written after."""
        return int(self.name.removeprefix("step-").partition(".")[0])

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(self.files.values())

    @property
    def marker(self) -> str:
        """The name that its marker begins with, before `WHOLE` or `PAST`."""
        return self.name.removesuffix(".safetensors")


def whole_checkpoints(store: Store, address: Address) -> list[Stored]:
    """The checkpoints at an address whose markers are there, newest first. Raises StoreError."""
    folder = key_in(address, "checkpoints")
    return _whole({key.removeprefix(f"{folder}/"): size for key, size in store.files(folder)})


def _whole(names: dict[str, int]) -> list[Stored]:
    """The same of the files in a folder of checkpoints, by their names."""
    files: dict[str, dict[str, int]] = {}
    for name, size in names.items():
        checkpoint = name.partition("/")[0]
        if _STEP.fullmatch(checkpoint):
            files.setdefault(checkpoint, {})[name] = size
    found = (Stored(name, held) for name, held in files.items())
    return sorted((each for each in found if each.marker + WHOLE in names), key=lambda each: each.step, reverse=True)


def key_in(address: Address, name: str) -> str:
    """The key of a file in a run's folder."""
    return f"{address.key}/{name}".removeprefix("/")


def marker_of(path: Path) -> bytes:
    """What the marker of a checkpoint of this machine says."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    return (json.dumps({"format": "fastpmae-checkpoint", "bytes": size, "digest": identity_of(path)}) + "\n").encode()


def local_folder(address: Address, settings: CacheSettings) -> Path:
    """Where on this machine the run at an address has its folder."""
    name = hashlib.sha256(str(address).encode()).hexdigest()[:12]
    return settings.place / "runs" / f"{address.name or address.bucket}-{name}"


def is_checkpoint(address: Address) -> bool:
    """Whether an address is that of one checkpoint, by its name."""
    return address.parent.name == "checkpoints" and _STEP.fullmatch(address.name) is not None


def bring_back(address: Address, folder: Path, name: str | None = None) -> None:
    """Have the newest whole checkpoint at an address in the local folder, with the log.

    The log that is there already is not asked for. Processes of one machine may call it at once: one does the work.

    Args:
        name: of another checkpoint than the newest.

    Raises:
        UserError: where the store cannot be read, or the folder not be written.
    """
    checkpoints = folder / "checkpoints"
    store = Store(address)
    if not folder.exists() and not _wanted(store, address, name):
        return  # and what is refused leaves no folder
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        with (folder / ".bringing").open("w") as alone:
            lock(alone, wait=True)
            wanted = _wanted(store, address, name)
            for stored in wanted:
                _bring_checkpoint(store, address, stored, checkpoints)
            for log in LOGS:
                if wanted and not (folder / log).exists():
                    with contextlib.suppress(Missing), atomic_write(folder / log) as beside:
                        beside.write_bytes(store.read(key_in(address, log)))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None


def _wanted(store: Store, address: Address, name: str | None) -> list[Stored]:
    """The checkpoint of this name, or else the newest, at an address; none where there is no run."""
    found = store.first_try(lambda store: whole_checkpoints(store, address), address.key)
    wanted = found[:1] if name is None else [each for each in found if each.name == name]
    if name is not None and not wanted:
        raise UserError(f"{address}/checkpoints/{name} is no whole checkpoint{_others(found)}")
    return wanted


def _others(found: Iterable[Stored]) -> str:
    names = [stored.name for stored in found]
    return f"; there are {', '.join(names)}" if names else ", and its run has none"


def _bring_checkpoint(store: Store, address: Address, stored: Stored, checkpoints: Path) -> None:
    marker = store.read(key_in(address, f"checkpoints/{stored.marker}{WHOLE}"))
    try:
        told = json.loads(bytes(marker[:4096]))
        size, digest = told["bytes"], told.get("digest")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        size = digest = None
    if size != stored.size:
        raise UserError(
            f"{address}/checkpoints/{stored.name} is not what its marker says: it is damaged, or being written"
        )
    path = checkpoints / stored.name
    with contextlib.suppress(OSError, CheckpointError):
        files = [path, *path.iterdir()] if path.is_dir() else [path]
        held = sum(file.stat().st_size for file in files if file.is_file())
        # an earlier version's marker tells no digest
        if held == size and digest in (None, identity_of(path)):
            return
    whole = address / "checkpoints"
    if stored.name in stored.files:
        fetch_file(store, whole / stored.name, path)
        return
    with atomic_folder(path) as beside:
        for name in stored.files:
            fetch_file(store, whole / name, beside / name.partition("/")[2])


def resumed_from(config: Config) -> Path | None:
    """The checkpoint, or the folder of the run, that a run goes on from, on this machine; what lies in a store comes.

    None where it begins anew.

    Raises:
        UserError: where the store cannot be read, or there is no such checkpoint.
    """
    run, settings = config.run, config.data.cached
    if run.resume is None:
        return None
    named = None if run.resume == "auto" else Address.of_text(run.resume)
    if run.upload is not None and (run.resume == "auto" or named is not None):
        address = parse_address(run.upload)
        folder = run.out or local_folder(address, settings)
        if named is None or run_at(named) == address:
            bring_back(address, folder, None if named is None or named == address else named.name)
            return folder if named is None or named == address else folder / "checkpoints" / named.name
    if named is not None:
        return local_copy(named, settings)
    return run.out if run.resume == "auto" else Path(run.resume)


def local_copy(place: str | Path | Address, settings: CacheSettings | None = None) -> Path:
    """A run, a checkpoint or a file of weights on this machine: a path as it is, and of an address a copy.

    Of a run the newest checkpoint comes, with its log and the results of its evaluations; of the folder of a
    fine-tuning or an export what it left.

    Raises:
        UserError: where the store cannot be read, or none of these lies there.
    """
    found = place_of(place)
    if isinstance(found, Path):
        return found
    store = Store(found)
    folder, names = store.first_try(lambda store: _files_of(store, found), found.key)
    here = copy_here(store, folder, names, found, settings)
    return here / found.key.removeprefix(folder.key).removeprefix("/")


@contextlib.contextmanager
def brought_here(place: str | Path | Address, settings: CacheSettings | None = None) -> Iterator[Path]:
    """What `local_copy` gives. Within it a UserError that names files of a copy names their addresses instead."""
    path = local_copy(place, settings)
    try:
        yield path
    except UserError as error:
        named = place_of(place)
        if isinstance(named, Address):
            raise type(error)(in_words(str(error), path, named)) from None
        raise


def in_words(text: str, copy: Path, address: Address) -> str:
    """A text that names files of a copy, with their addresses."""
    return text.replace(str(copy), str(address)).replace(str(copy.parent), str(address.parent))


def _files_of(store: Store, address: Address) -> tuple[Address, list[str]]:
    """The folder that a copy has the shape of, and the files of it that are copied."""
    if is_checkpoint(address):
        inside = address.name.endswith(".shards")
        files = [key for key, _ in store.files(address.key)] if inside else [address.key]
        if not files:
            raise Missing(f"{address} does not exist")
        run = run_at(address)
        return run, [key.removeprefix(run.key).removeprefix("/") for key in files]
    web = address.scheme in ("https", "http")
    if address.suffix or web:
        try:
            store.stat(address.key)
            return address.parent, [address.name]
        except (Missing, Refused):
            if web:  # of which no folder can be listed
                raise
    prefix = address.key and f"{address.key}/"
    names = {key.removeprefix(prefix): size for key, size in store.files(address.key)}
    chosen = _chosen(names)
    if chosen:
        return address, chosen
    if not names:
        store.stat(address.key)  # a file without an ending, or Missing
        return address.parent, [address.name]
    raise StoreError(
        f"{address} holds neither a whole checkpoint of a run nor exported weights: name a run's folder, a checkpoint "
        "or a file of weights"
    )


def _chosen(names: dict[str, int]) -> list[str]:
    """Of the files in a folder those that say what its networks are: weights and results, and of a run the log."""
    inside = "checkpoints/"
    checkpoints = _whole({name.removeprefix(inside): size for name, size in names.items() if name.startswith(inside)})
    weights = [name for name in (*TUNED.values(), *EXPORTED) if name in names]
    if not weights and checkpoints:
        weights = [inside + name for name in checkpoints[0].files]
    results = [
        name
        for name, size in names.items()
        if (name.startswith("eval/") or "/" not in name) and name.endswith(".json") and size <= LARGEST_RESULT
    ]
    logs = [name for name in LOGS if name in names]
    return list(dict.fromkeys([*weights, *logs, *results])) if weights or logs else []
