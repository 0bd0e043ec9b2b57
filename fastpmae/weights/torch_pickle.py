"""What torch.save has written, as a zip or as before torch 1.6: tensors that stay in the file until they are loaded."""

import contextlib
import io
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from fastpmae.weights.pickle_machine import CutOffError, PickleError, StandIn, Storage, follow, storage_of

DIRECTORY = 16 * 2**20
"""Bytes of a zip's directory."""
PICKLE = 256 * 2**20
"""Bytes of a file's pickles."""
ODD = (ValueError, TypeError, KeyError, IndexError, OverflowError, EOFError, AttributeError, struct.error)
"""What reading something else than a pickle of torch.save ends in."""
SHOWN = 100
"""Signs of a file's own words in an error: a name may have megabytes."""
MAGIC = 0x1950A86A20F9469CFC6C
"""What torch.save began its files with before they were zips."""


def read_pickled(path: Path) -> Any:
    """What a file of torch.save holds; its tensors are `Stored`, read when they are asked for.

    Raises:
        PickleError: when it is none, or is damaged.
        OSError: when it cannot be read.
    """
    with path.open("rb") as file:
        try:
            if file.read(4) == b"PK\3\4":
                return _read_zip(path)
            file.seek(0)
            return _read_legacy(path, file)
        except (PickleError, OSError):
            raise
        except MemoryError:
            raise PickleError("there is not enough memory for what it says it holds") from None
        except zipfile.BadZipFile:
            raise CutOffError("it is cut off or damaged: it has no directory, which stands at its end") from None
        except (*ODD, RuntimeError) as error:  # the last is zipfile's for what it cannot read
            raise PickleError(f"it is damaged: {str(error)[:SHOWN]}") from None


class _Careful(io.FileIO):
    """A file of which no more than a few megabytes are read at once, whatever its directory says."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        if min(left, left if size is None or size < 0 else size) > DIRECTORY:
            raise PickleError("its directory is too large")
        return super().read(left if size is None or size < 0 else min(size, max(0, left))) or b""


def _read_zip(path: Path) -> Any:
    with _Careful(path) as directory, zipfile.ZipFile(directory) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    root = next((name.removesuffix("data.pkl") for name in entries if name.endswith("data.pkl")), None)
    if root is None:
        raise PickleError("it is a zip file without a data.pkl")
    if root + "constants.pkl" in entries:
        raise PickleError("it is a TorchScript program: save the state_dict() of what torch.jit.load gives")

    def content(name: str, begin: int, size: int) -> bytearray:
        entry = entries[root + name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise PickleError("it has been packed anew: torch.save compresses nothing")
        with path.open("rb") as file:
            file.seek(entry.header_offset)
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\3\4":
                raise PickleError(f"it is damaged: {name[:SHOWN]} is not where its directory says")
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30])) + begin
            if begin + size > entry.file_size or start + size > os.fstat(file.fileno()).st_size:
                raise CutOffError(f"it is cut off or damaged: {name[:SHOWN]} is larger than what is there")
            file.seek(start)
            return _exactly(file, size)

    def whole(name: str, most: int) -> bytes:
        size = entries[root + name].file_size
        if size > most:
            raise PickleError(f"its {name} is too large: {size:,} bytes")
        return bytes(content(name, 0, size))

    if root + "byteorder" in entries and whole("byteorder", 64).strip() != b"little":
        raise PickleError("a machine of the other byte order has written it")

    def numbers(storage: Storage, begin: int, size: int) -> bytearray:
        return content(f"data/{storage.key}", begin, size)

    def stored(pid: tuple[Any, ...]) -> Storage:
        storage = storage_of(pid, numbers)
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None or entry.file_size < storage.size:
            raise PickleError(f"it is damaged: it lacks numbers ({storage.key[:SHOWN]})")
        return storage

    return follow(io.BytesIO(whole("data.pkl", PICKLE)), stored)


class _Bounded:
    """The beginning of a file, as a pickle is read from it: no line and no string is longer than what may be left."""

    def __init__(self, file: IO[bytes], left: int):
        self.file, self.left = file, left

    def read(self, size: int) -> bytes:
        return self._counted(self.file.read(min(size, self.left + 1)))

    def readline(self) -> bytes:
        return self._counted(self.file.readline(self.left + 1))

    def _counted(self, found: bytes) -> bytes:
        self.left -= len(found)
        if self.left < 0:
            raise PickleError("its pickles are too long")
        return found


def _read_legacy(path: Path, file: IO[bytes]) -> Any:
    """The form before torch 1.6: five pickles, then each storage's count and numbers."""
    pickles = _Bounded(file, PICKLE)

    def nothing(pid: tuple[Any, ...]) -> Storage:
        raise PickleError("it is damaged: numbers before its beginning")

    magic = None
    with contextlib.suppress(CutOffError, *ODD):  # of a file of any other kind
        magic = follow(pickles, nothing)
    if magic != MAGIC:
        raise PickleError("torch.save has not written it")
    for _ in ("version", "machine"):
        follow(pickles, nothing)
    places: dict[str, int] = {}
    storages: dict[str, Storage] = {}

    def numbers(storage: Storage, begin: int, size: int) -> bytearray:
        with path.open("rb") as again:
            again.seek(places[storage.key] + begin)
            return _exactly(again, size)

    def stored(pid: tuple[Any, ...]) -> Storage:
        if len(pid) > 5 and pid[5] is not None:
            raise PickleError("it is of a torch before 0.4: load it there and save it again")
        storage = storage_of(pid, numbers)
        known = storages.setdefault(storage.key, storage)
        if (known.dtype, known.count) != (storage.dtype, storage.count):
            raise PickleError(f"it is damaged: two sizes for numbers {storage.key[:SHOWN]}")
        return known

    loaded, keys = follow(pickles, stored), follow(pickles, nothing)
    place, end = file.tell(), os.fstat(file.fileno()).st_size
    for key in keys if isinstance(keys, list) else []:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise PickleError("it is damaged: its list of numbers does not fit")
        file.seek(place)
        (count,) = struct.unpack("<q", _exactly(file, 8))
        places[storage.key] = place + 8
        place += 8 + storage.size
        if count != storage.count or place > end:
            raise CutOffError(f"it is cut off or damaged: numbers {storage.key[:SHOWN]} are too few")
    if storages.keys() - places.keys():
        raise PickleError("it is damaged: it lacks numbers")
    return loaded


def _exactly(file: IO[bytes], size: int) -> bytearray:
    found = bytearray(size)
    view, done = memoryview(found), 0
    while done < size:
        count = file.readinto(view[done:])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise CutOffError("it is cut off")
        done += count
    return found


def held_by_name(loaded: Any) -> Mapping[str, Any]:
    """A dictionary's entries that have names. Raises PickleError where it is no dictionary."""
    if isinstance(loaded, StandIn):
        raise PickleError(f"it is a whole object {loaded.kind}: save its state_dict() instead")
    if not isinstance(loaded, dict):
        raise PickleError("it holds no tensors by name")
    return {key: value for key, value in loaded.items() if isinstance(key, str)}
