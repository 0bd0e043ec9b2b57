"""Checkpoints: one safetensors file with everything a run needs to go on, written whole or not at all.

Tensors are named by whose they are (`student.`, `reconstruction_teacher.`, `labelling_teacher.`, `optimiser.`, `rng.`,
`log.`); numbers, the loader's position and the config are JSON in the header. A digest over every tensor's name, shape
and bytes, and over that JSON, tells a damaged file from a sound one.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastpmae.config import Config, config_from
from fastpmae.errors import UserError
from fastpmae.teachers import Teachers

FORMAT = "fastpmae-checkpoint-1"


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: tensors by name, on the CPU, and the run's progress as plain values."""

    path: Path
    tensors: dict[str, Tensor]
    progress: dict[str, Any]

    @property
    def config(self) -> Config:
        """The settings of the run that wrote it."""
        return config_from(self.progress["config"], str(self.path))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix.`, by the rest of their names."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies in a run folder."""
    return folder / "checkpoints" / f"step-{step:08d}.safetensors"


def gather(student: nn.Module, teachers: Teachers, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that the rest of a run depends on, by its name in a checkpoint."""
    tensors = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    for role, teacher in teachers.modules().items():
        tensors |= {f"{role}.{name}": tensor for name, tensor in teacher.state_dict().items()}
    for name, parameter in student.named_parameters():
        tensors |= {f"optimiser.{name}.{key}": value for key, value in optimiser.state[parameter].items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def scatter(checkpoint: Checkpoint, student: nn.Module, teachers: Teachers, optimiser: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors back where `gather` found them.

    Raises:
        CheckpointError: when it belongs to a model of other sizes or another method.
    """
    modules: dict[str, nn.Module] = {"student": student, **teachers.modules()}
    for role, module in modules.items():
        try:
            module.load_state_dict(checkpoint.part(role))
        except RuntimeError as error:
            detail = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"{checkpoint.path} does not fit this run's {role}: {detail}") from None
    for name, parameter in student.named_parameters():
        state = checkpoint.part(f"optimiser.{name}")
        # The step count stays where the fused kernels want it, beside the parameter.
        optimiser.state[parameter] = {key: value.to(parameter.device).clone() for key, value in state.items()}
    torch.set_rng_state(checkpoint.tensors["rng.cpu"])
    if "rng.cuda" in checkpoint.tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(checkpoint.tensors["rng.cuda"])


def write_checkpoint(path: Path, tensors: dict[str, Tensor], progress: dict[str, Any], keep: int) -> None:
    """Write beside, flush to the disk, rename, and remove all but `keep` of the older checkpoints."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    told = json.dumps(progress)
    header = {"format": FORMAT, "digest": digest(tensors, told), "progress": told}
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, beside, header)
        # safetensors writes for its owner alone; a checkpoint is as readable as any other file of the user's.
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a folder cannot be flushed on every file system
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    for old in checkpoints_in(path.parent.parent)[keep + 1 :]:
        old.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint; nothing in it is ever executed.

    Raises:
        CheckpointError: when it is missing, no checkpoint of ours, truncated or altered.
    """
    header = _header(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if digest(tensors, header["progress"]) != header["digest"]:
        raise CheckpointError(f"{path} is damaged: its contents do not match its digest")
    return Checkpoint(path, tensors, json.loads(header["progress"]))


def read_progress(path: Path) -> dict[str, Any]:
    """The progress in a checkpoint's header, without reading its tensors.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    try:
        return json.loads(_header(path)["progress"])
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


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
    if not path.is_dir():
        return read_checkpoint(path)
    checkpoint, complaints = newest_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError("; ".join([f"there is no sound checkpoint in {path}/checkpoints", *complaints]))
    return checkpoint


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first."""
    return sorted((folder / "checkpoints").glob("step-*.safetensors"), reverse=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for leftover in (folder / "checkpoints").glob(".step-*.tmp"):
        leftover.unlink(missing_ok=True)


def _header(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from None
    if header.get("format") != FORMAT or not {"digest", "progress"} <= header.keys():
        raise CheckpointError(f"{path} is a safetensors file but no fastpmae checkpoint")
    return header


def digest(tensors: dict[str, Tensor], progress: str) -> str:
    """SHA-256 over the progress and every tensor's name, type, shape and bytes."""
    total = hashlib.sha256(progress.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
