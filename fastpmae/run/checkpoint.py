"""Checkpoints: one safetensors file with everything a run needs to go on, written whole or not at all; or a folder of
them (see shards.py), which is read by the same functions.

Tensors are named by whose they are (`student.`, `reconstruction_teacher.`, `labelling_teacher.`, `optimizer.`, `rng.`,
`log.`); numbers, the loader's position and the config are JSON in the header. A digest over every tensor's name, shape
and bytes, and over that JSON, tells a damaged file from a sound one.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from fastpmae.config import Config
from fastpmae.config_file import config_from
from fastpmae.model.build import build_student
from fastpmae.model.phases import Phase, phase_after
from fastpmae.model.teachers import Teachers
from fastpmae.run.progress import CheckpointError, parsed_progress
from fastpmae.run.shards import SUFFIX, Described, Shards, WholeTensors, check_files, is_sharded, read_index
from fastpmae.weights.file_kind import is_safetensors, other_file, unsound
from fastpmae.weights.tensor_file import save_file
from fastpmae_loaders.errors import RunError, UserError
from fastpmae_loaders.files import PARTIAL, atomic_write
from fastpmae_loaders.printable import on_one_line, short
from fastpmae_loaders.values import local_path

FORMAT = "fastpmae-checkpoint-1"
NAME = re.compile(r"step-\d{8,15}\.(safetensors|shards)")


ODD = (ValueError, TypeError, KeyError, AttributeError)
"""What safetensors end in, besides errors of their own, where torch has no such type or size."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: tensors by name, on the CPU, and the run's progress as plain values."""

    path: Path
    tensors: Shards | WholeTensors
    progress: dict[str, Any]

    @property
    def config(self) -> Config:
        """The settings of the run that wrote it."""
        return settings_in(self.progress, self.path)

    @property
    def phase(self) -> Phase:
        """The phase of the run that its networks are of."""
        return self._phase_of(self.config)

    @property
    def config_of_encoder(self) -> Config:
        """The settings of that phase where the encoder alone is of interest, whatever decoder the run had."""
        return self._phase_of(settings_in(self.progress, self.path, decoder_matters=False)).config

    @property
    def why_without(self) -> str:
        """Why a teacher may be missing, as part of a sentence."""
        phase = self.phase
        if phase.name == "pixels":
            return "its run was still learning pixels without a teacher (--pixel-epochs)"
        return f"its run used --teachers {phase.config.teacher.teachers}"

    def _phase_of(self, config: Config) -> Phase:
        return phase_after(config, self.progress["step"], self.progress["steps_per_epoch"])

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix.`, by the rest of their names."""
        return {name[len(prefix) + 1 :]: self.tensors[name] for name in self.tensors if name.startswith(prefix + ".")}

    def described(self, prefix: str) -> dict[str, Described]:
        """Shapes and types of the same tensors."""
        found = self.tensors.described.items()
        return {name[len(prefix) + 1 :]: like for name, like in found if name.startswith(prefix + ".")}

    def part_like(self, prefix: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the same tensors those of `like`, on its devices and sharded as it is."""
        return self.tensors.like(prefix, like)


def settings_in(progress: dict[str, Any], path: Path, *, decoder_matters: bool = True) -> Config:
    """The settings in a checkpoint's progress, which holds all that its version had: what it lacks was not there yet.

    Raises:
        UserError: for settings that make no Config (see `config_from`).
    """
    return config_from(progress["config"], str(path), recorded=True, decoder_matters=decoder_matters)


def settings_before(path: Path | None) -> Config | None:
    """The settings of the run that a start goes on with; None where there is none that can be read.

    Args:
        path: of a checkpoint, or of a run folder, whose newest counts.
    """
    if path is None:
        return None
    is_folder = path.is_dir() and not is_sharded(path)
    for checkpoint in checkpoints_in(path) if is_folder else [path]:
        with contextlib.suppress(UserError):
            return settings_in(read_progress(checkpoint), checkpoint)
    return None


def checkpoint_path(folder: Path, step: int, *, sharded: bool = False) -> Path:
    """Where the checkpoint after `step` steps lies in a run folder, as a file or as a folder of shards."""
    return folder / "checkpoints" / f"step-{step:08d}{SUFFIX if sharded else '.safetensors'}"


def collect_state(student: nn.Module, teachers: Teachers, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that the rest of a run depends on, by its name in a checkpoint: the run's own, not copies."""
    tensors = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    for role, teacher in teachers.modules().items():
        tensors |= {f"{role}.{name}": tensor for name, tensor in teacher.state_dict().items()}
    for name, parameter in student.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_state(
    checkpoint: Checkpoint, student: nn.Module, teachers: Teachers, optimizer: torch.optim.Optimizer
) -> None:
    """Put a checkpoint's tensors back where `gather` found them.

    Raises:
        CheckpointError: when it belongs to a model of other sizes or another method, or lacks a part.
    """
    restore_networks(checkpoint, student, teachers)
    held = checkpoint.described("optimizer")
    if not held:
        raise CheckpointError(f"{checkpoint.path} lacks the optimizer's state")
    # a parameter that no loss has reached yet has none
    reached = {name: parameter for name, parameter in student.named_parameters() if f"{name}.step" in held}
    like: dict[str, Tensor] = {}
    for name, parameter in reached.items():
        like[f"{name}.step"] = torch.zeros((), device=parameter.device)
        like[f"{name}.exp_avg"] = like[f"{name}.exp_avg_sq"] = parameter.detach()
    require(checkpoint, "optimizer", like)
    state = checkpoint.part_like("optimizer", like)
    for name, parameter in reached.items():
        # popped, so that what is read and what is kept are never both whole in memory
        optimizer.state[parameter] = {
            key: state.pop(f"{name}.{key}").clone() for key in ("step", "exp_avg", "exp_avg_sq")
        }
    require(checkpoint, "rng", {"cpu": torch.get_rng_state()}, others=("cuda",))
    try:
        torch.set_rng_state(checkpoint.tensors["rng.cpu"])
        if "rng.cuda" in checkpoint.tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint.tensors["rng.cuda"])
    except (RuntimeError, TypeError):
        raise CheckpointError(f"{checkpoint.path} holds no state of a random generator of torch's") from None


def restore_networks(checkpoint: Checkpoint, student: nn.Module, teachers: Teachers) -> None:
    """The student's and the teachers' part of `restore_state`. Raises CheckpointError as it does."""
    modules: dict[str, nn.Module] = {"student": student, **teachers.modules()}
    for role, module in modules.items():
        own = module.state_dict()
        require(checkpoint, role, own)
        module.load_state_dict(checkpoint.part_like(role, own))


def check_fits(checkpoint: Checkpoint, config: Config) -> None:
    """Whether a checkpoint holds a student of these settings' sizes, before any of it is made: raises CheckpointError
    where it does not, since what a stranger's settings speak of may fill the memory."""
    with torch.device("meta"):
        require(checkpoint, "student", build_student(config).state_dict())


def require(checkpoint: Checkpoint, prefix: str, like: dict[str, Tensor], others: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError unless the tensors under a prefix have the names, shapes and types of `like`.

    Compiled code takes sizes as given, so nothing from a file may reach it unchecked.
    """
    found = checkpoint.described(prefix)
    for name in sorted(like.keys() | found.keys() - set(others)):
        ours, theirs = (like[name].shape, like[name].dtype) if name in like else None, found.get(name)
        if ours != theirs:
            raise CheckpointError(
                f"{checkpoint.path} does not fit this run: {prefix}.{short(name)} is {_described(theirs)} in it "
                f"and {_described(ours)} here"
            )


def _described(tensor: Described | None) -> str:
    return "missing" if tensor is None else f"{str(tensor[1]).removeprefix('torch.')} {list(tensor[0])}"


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], progress: dict[str, Any], keep: int) -> None:
    """Write beside, flush to the disk, rename, and remove all but `keep` of the other checkpoints.

    Raises:
        RunError: when the disk is full or the folder gone.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    told = json.dumps(progress)
    header = {"format": FORMAT, "digest": digest(tensors, told), "progress": told}
    others = checkpoints_in(path.parent.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as beside:
            save_file(tensors, beside, header)
    except (UserError, OSError) as error:
        raise RunError(f"{error}. Last checkpoint: {next(iter(others), 'none yet')}") from None
    remove_others(path, others, keep)


def remove_others(path: Path, others: list[Path], keep: int) -> None:
    """Remove all but `keep` of the other checkpoints, newest first."""
    for old in [other for other in others if other != path][keep:]:
        if is_sharded(old):
            # out of sight before it is no longer whole
            gone = old.with_name(f"{PARTIAL}{old.name}")
            with contextlib.suppress(OSError):
                old.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def read_checkpoint(path: Path, rank: int = 0, ranks: int = 1) -> Checkpoint:
    """Read and verify a checkpoint; nothing in it is ever executed.

    Of a checkpoint in shards only headers are read, and files for their digests: tensors when they are asked for. Where
    several ranks read it, each verifies its share of the files.

    Raises:
        CheckpointError: when it is missing, no checkpoint of ours, truncated or altered.
    """
    if is_sharded(local_path(path)):
        index = read_index(path)
        check_files(path, index, rank, ranks)
        shards = Shards(path)
        shards.check()
        return Checkpoint(path, shards, index.progress)
    header, progress = _header(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = WholeTensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        sound = digest(tensors, header["progress"]) == header["digest"]
    except (safetensors.SafetensorError, OSError, RuntimeError, *ODD) as error:
        raise CheckpointError(f"{path} is damaged: {on_one_line(str(error))}") from None
    if not sound:
        raise CheckpointError(f"{path} is damaged: its contents do not match its digest")
    return Checkpoint(path, tensors, progress)


def read_progress(path: Path) -> dict[str, Any]:
    """The progress in a checkpoint's header, without reading its tensors.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    return read_index(path).progress if is_sharded(local_path(path)) else _header(path)[1]


def identity_of(path: Path) -> str:
    """A text that another checkpoint does not have; no tensor is read. CheckpointError as `read_checkpoint`."""
    return read_index(path).digest if is_sharded(local_path(path)) else _header(path)[0]["digest"]


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest sound checkpoint of a run folder, and a sentence for each damaged one that was passed over."""
    complaints = []
    for path in checkpoints_in(folder):
        try:
            return read_checkpoint(path), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    return None, complaints


def find_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint by its own path, or the newest sound one of a run folder.

    Raises:
        CheckpointError: when there is none.
    """
    if not path.is_dir() or is_sharded(path):
        return read_checkpoint(path)
    checkpoint, complaints = newest_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError("; ".join([f"there is no sound checkpoint in {path}/checkpoints", *complaints]))
    return checkpoint


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first."""
    found = (path for path in (folder / "checkpoints").glob("step-*") if NAME.fullmatch(path.name))
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("step-"))


def _header(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """A checkpoint's header, and the progress in it with the kinds of values that a run relies on."""
    path = local_path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{path} is no regular file and no checkpoint")
        with path.open("rb") as file:
            beginning, size = file.read(512), os.fstat(file.fileno()).st_size
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error.strerror or error}") from None
    except (safetensors.SafetensorError, *ODD) as error:
        odd = other_file(beginning, size)
        if not odd and is_safetensors(beginning):
            odd = unsound(path, beginning, str(error))
        words = f"it {odd}" if odd else on_one_line(str(error))
        raise CheckpointError(f"{path} is damaged or no checkpoint: {words}") from None
    if header.get("format") != FORMAT or not {"digest", "progress"} <= header.keys():
        raise CheckpointError(f"{path} is a safetensors file but no fastpmae checkpoint")
    return header, parsed_progress(header["progress"], path)


def digest(tensors: dict[str, Tensor], progress: str) -> str:
    """SHA-256 over the progress and every tensor's name, type, shape and bytes."""
    total = hashlib.sha256(progress.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
