"""A run's folder: where it is, whether it may be used, and what a resumed run has to agree with."""

import datetime
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpmae.architecture import warmup_epochs
from fastpmae.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoints_in,
    newest_checkpoint,
    read_checkpoint,
    remove_leftovers,
)
from fastpmae.config import Config, settings_by_name, write_config
from fastpmae.errors import UserError
from fastpmae.world import World
from fastpmae_loaders import Beton

# What decides the numbers that a run computes. Where it lies, how it saves and speaks and what it runs on is not in
# here; the images are compared by their contents.
COMPARED_GROUPS = ("views", "model", "teachers", "loss", "optimiser")
COMPARED_SETTINGS = ("seed", "precision", "page_order")


@dataclass(frozen=True)
class OpenRun:
    """A run folder that is ours to write to, and the checkpoint to go on from."""

    folder: Path
    checkpoint: Path | None
    remarks: list[str]


def resolve(config: Config, device: torch.device, beton: Beton) -> Config:
    """The settings with everything that was left to us decided, as the run folder records them.

    What would depend on the machine is decided once, so that a run goes on the same on another.
    """
    page_order = config.data.page_order
    if page_order == "auto":
        page_order = "on" if beton.path.stat().st_size > memory_size() else "off"
    precision = config.efficiency.precision
    if precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if bf16 else "fp32"
    if config.teachers.teachers == "dual" and not (config.loss.lambda_c or config.loss.lambda_p):
        # without a loss that reads its labels, the labelling teacher would only cost time
        config = config.using(teachers="reconstruction")
    return config.using(precision=precision, page_order=page_order, warmup_epochs=float(warmup_epochs(config)))


def memory_size() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def open_run(config: Config, fingerprint: str) -> OpenRun:
    """Make or reopen the run's folder, and find the checkpoint that a resumed run starts from.

    Args:
        config: resolved settings.
        fingerprint: of the images, as `Beton.fingerprint` gives it.

    Raises:
        UserError: when the folder holds a run and --resume was not given, when there is nothing to resume, or when
            the settings differ from the run's own.
    """
    resume, folder = config.run.resume, folder_of(config)
    remarks: list[str] = []
    if resume is None:
        if holds_run(folder):
            raise UserError(f"{folder} already holds a run: add --resume to go on with it, or choose another --out")
        checkpoint = None
    elif resume == "auto":
        checkpoint, remarks = newest_checkpoint(folder)
        remarks = [f"passed over a checkpoint: {remark}" for remark in remarks]
        if checkpoint is None:
            if remarks:
                raise UserError(f"no checkpoint in {folder} is sound; {'; '.join(remarks)}")
            remarks.append(f"nothing to resume in {folder}: starting anew")
    else:
        path = Path(resume)
        checkpoint, remarks = newest_checkpoint(path) if path.is_dir() else (read_checkpoint(path), [])
        if checkpoint is None:
            raise CheckpointError("; ".join([f"there is no sound checkpoint in {path}", *remarks]))
    if checkpoint is not None:
        changes = differences(checkpoint, config, fingerprint)
        if changes and not config.run.accept_changes:
            raise UserError(
                f"the run in {folder} was started with other settings: {'; '.join(changes)}. "
                "Resume with the run's own, or add --accept-changes"
            )
        remarks += [f"resumed with a changed setting: {change}" for change in changes]
        remarks.append(f"resumed from {checkpoint.path}")
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        beside = folder / ".config.json.tmp"
        write_config(config.using(resume=None, accept_changes=False), beside)
        beside.rename(folder / "config.json")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}") from None
    return OpenRun(folder, None if checkpoint is None else checkpoint.path, remarks)


def folder_of(config: Config) -> Path:
    """The run's folder: --out, else the one that --resume names, else a new one under runs/."""
    if config.run.out is not None:
        return config.run.out
    resume = config.run.resume
    if resume is not None:
        folder = None if resume == "auto" else run_of(Path(resume))
        if folder is None:
            raise UserError("--resume: say which run with --out FOLDER, or name a checkpoint of a run folder")
        return folder
    name = config.run.name or config.run.preset
    stem = Path("runs") / f"{datetime.date.today().isoformat()}-{name}"
    return next(path for path in _numbered(stem) if not path.exists())


def run_of(path: Path) -> Path | None:
    """The run folder that a path given to --resume belongs to."""
    if (path / "checkpoints").is_dir():
        return path
    return path.parent.parent if path.parent.name == "checkpoints" else None


def holds_run(folder: Path) -> bool:
    """Whether there is anything of a run in a folder."""
    return (folder / "config.json").exists() or (folder / "metrics.jsonl").exists() or bool(checkpoints_in(folder))


def differences(checkpoint: Checkpoint, config: Config, fingerprint: str) -> list[str]:
    """What a resumed run would compute differently, one phrase each."""
    before, now, groups = checkpoint.config.flat(), config.flat(), settings_by_name()
    changes = [
        f"--{name.replace('_', '-')} was {before[name]} and is now {now[name]}"
        for name in now
        if (groups[name] in COMPARED_GROUPS or name in COMPARED_SETTINGS) and before[name] != now[name]
    ]
    if checkpoint.progress["fingerprint"] != fingerprint:
        changes.append("the .beton holds other images")
    return changes


def describe_run(
    config: Config, beton: Beton, world: World, student: nn.Module, steps_per_epoch: int, folder: Path
) -> list[str]:
    """What is about to happen, in a few lines, with a warning where the settings will not do well."""
    parameters = sum(p.numel() for p in student.parameters()) / 1e6
    optimiser, folds, prototypes = config.optimiser, config.views.folds, config.model.prototypes
    lines = [
        f"{config.run.preset}: {config.model.model}, {parameters:.1f} M parameters, "
        f"on {world.device} x {world.size} in {config.efficiency.precision}",
        f"{len(beton)} images in {beton.path}: {steps_per_epoch} steps of {optimiser.batch_size} an epoch, "
        f"{optimiser.epochs} epochs",
    ]
    rows = optimiser.batch_size // optimiser.accumulate * folds
    if config.teachers.teachers in ("dual", "single") and rows < prototypes / 2:
        lines.append(
            f"warning: {rows} class tokens a batch share {prototypes} prototypes, too few to fill them: expect a weak "
            "class loss; a larger --batch-size or fewer --prototypes helps"
        )
    return [*lines, f"run folder: {folder}"]


def describe_machine() -> dict[str, Any]:
    """What the run runs on, for the record."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "machine": platform.platform(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def write_machine(folder: Path) -> None:
    """Record the machine of this start of the run, one line a start."""
    with (folder / "machine.jsonl").open("a") as file:
        file.write(
            json.dumps(describe_machine() | {"date": datetime.datetime.now().isoformat(timespec="seconds")}) + "\n"
        )


def _numbered(stem: Path) -> Iterator[Path]:
    yield stem
    number = 2
    while True:
        yield stem.with_name(f"{stem.name}-{number}")
        number += 1
