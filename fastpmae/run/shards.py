"""Checkpoints in shards: a folder with one safetensors file a rank, written by all ranks at once, and an index.

torch.distributed.checkpoint decides who writes what (`HuggingFaceStorageWriter`) and puts together what is asked for
(`HuggingFaceStorageReader`): its own metadata is a pickle, which is neither written nor read here. The index is JSON:
the run's progress, and the size and SHA-256 of every file. The folder takes its name when all of it is on the disk.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastpmae.distributed.dtensor import distribute_like
from fastpmae.run.progress import CheckpointError, parsed_progress
from fastpmae_loaders.errors import RunError, UserError
from fastpmae_loaders.files import atomic_folder
from fastpmae_loaders.printable import on_one_line, short

FORMAT = "fastpmae-sharded-checkpoint-1"
SUFFIX = ".shards"
INDEX = "checkpoint.json"
LARGEST_INDEX = 64 * 2**20
"""Bytes; that of 100,000 ranks has 15 million."""
_ALONE = "torch.distributed is disabled, unavailable or uninitialized"
"""torch.distributed.checkpoint warns so of a single process."""
Described = tuple[torch.Size, torch.dtype]


def is_sharded(path: Path) -> bool:
    """Whether a path is that of a checkpoint in shards, by its name."""
    return path.suffix == SUFFIX


def write_shards(
    path: Path, tensors: dict[str, Tensor], progress: dict[str, Any], group: dist.ProcessGroup | None
) -> None:
    """Write a checkpoint, each rank its share of it. All ranks of the group call it, and none returns before all have
    written.

    Args:
        tensors: on the CPU; of DTensors each rank writes its own part, and of others, which all hold whole, one of
            them each.
        group: a gloo group that nothing else uses meanwhile; None for a single rank.

    Raises:
        RunError: on every rank, where any of them cannot write.
    """
    # imported here, since it takes a second
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
    from torch.distributed.checkpoint.api import CheckpointException

    warnings.filterwarnings("ignore", message=_ALONE)
    is_main = group is None or group.rank() == 0
    with contextlib.ExitStack() as stack:
        place: list[str | None] = [None]
        failure: Exception | None = None
        try:
            if is_main:
                place[0] = str(stack.enter_context(atomic_folder(path)))
        except (UserError, OSError) as error:
            failure = error
        if group is not None:
            dist.broadcast_object_list(place, src=dist.get_global_rank(group, 0), group=group)
        if place[0] is None:
            raise RunError(str(failure or f"{path} cannot be written by the first rank")) from None
        writer = HuggingFaceStorageWriter(place[0], save_distributed=True)
        try:
            save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
        except CheckpointException as error:
            raise RunError(f"{path} cannot be written: {_reason(error)}") from None
        number = 1 if group is None else group.rank() + 1
        own: dict[str, list[Any]] = {}
        told: str | None = None
        try:
            own = {file.name: _identity(file) for file in sorted(Path(place[0]).glob(f"shard-{number:05d}-*"))}
        except OSError as error:  # told to all: who waits in this group waits for a day
            told = f"{path} cannot be written: {error.strerror or error}"
        shards = [(own, told)]
        if group is not None:
            shards = [(own, told)] * group.size()
            dist.all_gather_object(shards, (own, told), group=group)
        for _, reason in shards:
            if reason is not None:
                raise RunError(reason)
        if is_main:
            files = {name: identity for some, _ in shards for name, identity in some.items()}
            index = {"format": FORMAT, "files": files, "progress": json.dumps(progress)}
            text = json.dumps(index | {"digest": _digest_of(index)}, indent=1, sort_keys=True)
            (Path(place[0]) / INDEX).write_text(text + "\n", encoding="utf-8")


def _reason(error: BaseException) -> str:
    """What the first of the ranks that failed says: DCP gathers their exceptions."""
    failures = getattr(error, "failures", None) or {}
    first = next(iter(failures.values()), None)
    cause = first[0] if isinstance(first, tuple) else error
    return getattr(cause, "strerror", None) or on_one_line(str(cause))


def _identity(file: Path) -> list[Any]:
    with file.open("rb") as opened:
        return [file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest()]


def _digest_of(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Index:
    """What a checkpoint's index says: of each file its bytes and SHA-256, the run's progress, and its own digest."""

    files: dict[str, tuple[int, str]]
    progress: dict[str, Any]
    digest: str


def read_index(path: Path) -> Index:
    """The index of a checkpoint in shards.

    Raises:
        CheckpointError: when it is missing or says what no index does.
    """
    file = path / INDEX
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{file} is no regular file")
        if file.stat().st_size > LARGEST_INDEX:
            raise CheckpointError(f"{file} is too large to be an index")
        index = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise CheckpointError(f"{file} is no index of a fastpmae checkpoint")
        files, told = index.get("files"), index.get("progress")
        own = index.pop("digest", None)
        if own != _digest_of(index) or not isinstance(files, dict) or not isinstance(told, str):
            raise CheckpointError(f"{path} is damaged: its index does not match its digest")
        for name, identity in files.items():
            kinds = [type(part) for part in identity] if isinstance(identity, list) else None
            if Path(name).name != name or not name.endswith(".safetensors") or kinds != [int, str]:
                raise CheckpointError(f"{path} is damaged: its index names no sound file {short(name)!r}")
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}: it holds no {INDEX}") from None
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {on_one_line(str(error))}") from None
    return Index({name: (size, digest) for name, (size, digest) in files.items()}, parsed_progress(told, path), own)


def check_files(path: Path, index: Index, rank: int = 0, ranks: int = 1) -> None:
    """See that every file has the bytes that the index speaks of. Where several ranks ask, each reads its share.

    Raises:
        CheckpointError: for one that is missing, truncated, altered, or not in the index.
    """
    found = {file.name for file in path.glob("*.safetensors")}
    if surplus := sorted(found - index.files.keys()):
        raise CheckpointError(f"{path} is damaged: {short(surplus[0])!r} is not in its index")
    for number, (name, (size, digest)) in enumerate(sorted(index.files.items())):
        file = path / name
        try:
            if not file.is_file():
                raise CheckpointError(f"{path} is damaged: {name} is missing")
            if file.stat().st_size != size:
                raise CheckpointError(
                    f"{path} is damaged: {name} has {file.stat().st_size:,} bytes instead of {size:,}"
                )
            if number % ranks == rank and _identity(file)[1] != digest:
                raise CheckpointError(f"{path} is damaged: {name} does not match its digest")
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None


class WholeTensors(dict[str, Tensor]):
    """The tensors of a checkpoint in one file, by name, to be asked for as those of `Shards` are."""

    @property
    def described(self) -> dict[str, Described]:
        """Shape and type of each tensor."""
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self.items()}

    def like(self, prefix: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under a prefix, sharded and placed as those of `like` are."""
        return {name: distribute_like(self[f"{prefix}.{name}"], tensor) for name, tensor in like.items()}


class Shards(Mapping[str, Tensor]):
    """The tensors of a checkpoint in shards, by name: each is put together when it is asked for, on the CPU.

    Raises:
        CheckpointError: for files that hold no whole tensors.
    """

    def __init__(self, path: Path):
        self.path = path

    def __getitem__(self, name: str) -> Tensor:
        size, dtype = self.described[name]
        return self.read({name: torch.empty(size, dtype=dtype)})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)

    def check(self) -> None:
        """See that the files hold whole tensors; raises CheckpointError otherwise."""
        _ = self.described

    @cached_property
    def described(self) -> dict[str, Described]:
        """Shape and type of each tensor: nothing of it is read but the headers of the files.

        A tensor's parts must be its rows, one part after the other: what a file says of sizes and places is a
        stranger's, and memory is asked for by it.
        """
        try:
            metadata = self._reader.read_metadata()
            found = {}
            for name, tensor in metadata.state_dict_metadata.items():
                parts = sorted((tuple(part.offsets), tuple(part.sizes)) for part in tensor.chunks)
                rest, end = parts[0][1][1:], 0
                for offsets, sizes in parts:
                    first = (end, *[0] * len(rest)) if sizes else ()
                    if sizes[1:] != rest or offsets != first:
                        raise CheckpointError(f"{self.path} is damaged: {short(name)} is not whole in its files")
                    end += sizes[0] if sizes else 0
                size = torch.Size((end, *rest) if parts[0][1] else ())
                found[name] = size, tensor.properties.dtype
            return found
        except CheckpointError:
            raise
        except Exception as error:  # whatever torch and safetensors end in, of what a stranger's header says
            raise CheckpointError(f"{self.path} is damaged: {on_one_line(str(error))}") from None

    def read(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fill tensors of the right shapes and types, each rank of a DTensor its own part, and return them.

        Raises:
            CheckpointError: where a file cannot be read.
        """
        from torch.distributed.checkpoint import load
        from torch.distributed.checkpoint.api import CheckpointException

        warnings.filterwarnings("ignore", message=_ALONE)
        try:
            load(tensors, storage_reader=self._reader, no_dist=True)
        except (Exception, CheckpointException) as error:  # as above; the latter is no Exception
            raise CheckpointError(f"{self.path} cannot be read: {_reason(error)}") from None
        return tensors

    def like(self, prefix: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under a prefix, sharded and placed as those of `like` are."""
        with torch.no_grad():
            room = {
                f"{prefix}.{name}": torch.empty_like(tensor, dtype=self.described[f"{prefix}.{name}"][1])
                for name, tensor in like.items()
            }
        return {name[len(prefix) + 1 :]: tensor for name, tensor in self.read(room).items()}

    @cached_property
    def _reader(self) -> Any:
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        return HuggingFaceStorageReader(str(self.path))


def on_host(tensor: Tensor, copy: Tensor, mesh: Any) -> Tensor:
    """A copy of a rank's part of a sharded tensor, as that part: a DTensor over `mesh`, which is of the CPU."""
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        copy, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
