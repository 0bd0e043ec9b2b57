"""A run's folder: where it is, whether it may be used, and what a resumed run has to agree with."""

import contextlib
import datetime
import json
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpmae.config import Config, settings_by_name
from fastpmae.config_file import read_config, write_config
from fastpmae.distributed.ranks import Ranks, has_bf16
from fastpmae.model.build import check_label_schedules, pixel_epochs, warmup_epochs
from fastpmae.model.phases import phase_after
from fastpmae.model.resolutions import canonical
from fastpmae.run.checkpoint import (
    Checkpoint,
    check_fits,
    checkpoints_in,
    newest_checkpoint,
    read_checkpoint,
    step_of,
)
from fastpmae.run.images import absolute, counted, source_notes
from fastpmae.run.shards import is_sharded
from fastpmae.run.stored_run import local_folder, resumed_from
from fastpmae.settings.rates import rate_changes
from fastpmae_loaders import Samples
from fastpmae_loaders.engines.base import by_page
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write, remove_partial
from fastpmae_loaders.locks import lock
from fastpmae_loaders.printable import printable
from fastpmae_loaders.stores.address import parse_address

# What decides the numbers that a run computes. Where it lies, how it saves and speaks and what it runs on is not in
# here; the images are compared by their contents.
COMPARED_GROUPS = ("views", "network", "teacher", "loss", "optimizer")
COMPARED_SETTINGS = (
    "seed", "precision", "teacher_precision", "page_order", "loader", "hw_decoder_load", "augment_on", "deterministic",
)  # fmt: skip
LEFT_TO_US = ("page_order", "precision", "augment_on")
"""Those of them that may be `auto`, which then depends on the machine."""
# These decode to the same bits.
ALIKE_LOADERS = ("native", "ffcv", "torch")
DECODER = "accurate DCT"
"""Of how the FFCV engine decodes. Checkpoints of before do not say; it was the fast DCT, by FFCV's own call."""
# And to the last bit, which --deterministic is about.
ROUNDING_SETTINGS = ("compile", "compile_mode", "attention", "activation_checkpointing", "prototypes_chunk", "shard")


@dataclass(frozen=True)
class OpenRun:
    """A run folder that is ours to write to, and the checkpoint to go on from.

    Attributes:
        looked_at: the checkpoints that were in the folder when that one was chosen.
    """

    folder: Path
    checkpoint: Path | None
    remarks: list[str]
    looked_at: list[Path]


def resolve(config: Config, device: torch.device, images: Samples, before: Config | None = None) -> Config:
    """The settings with everything that was left to us decided, as the run folder records them.

    What would depend on the machine is decided once, so that a run goes on the same on another.

    Args:
        before: the settings of the run that goes on.
    """
    if before is not None:
        now, decided = config.flat(), before.flat()
        config = config.using(**{name: decided[name] for name in LEFT_TO_US if now[name] == "auto"})
    page_order = config.data.page_order
    if page_order == "auto":
        page_order = "on" if by_page(images) else "off"
    precision = config.efficiency.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    augment_on = config.efficiency.augment_on
    if augment_on == "auto":
        augment_on = "device" if device.type == "cuda" else "cpu"
    if config.teacher.teachers == "dual" and not (config.loss.lambda_c or config.loss.lambda_p):
        # without a loss that reads its labels, the labelling teacher would only cost time
        config = config.using(teachers="reconstruction")
    return config.using(
        **absolute(config, images),
        precision=precision,
        page_order=page_order,
        augment_on=augment_on,
        warmup_epochs=float(warmup_epochs(config)),
        pixel_epochs=float(pixel_epochs(config)),
        progressive_resolution=canonical(config),
    )


def open_run(config: Config, fingerprint: str, steps_per_epoch: int, told: Sequence[str] = ()) -> OpenRun:
    """Find the run's folder and the checkpoint that a resumed run starts from; nothing is written yet.

    Args:
        config: resolved settings.
        fingerprint: of the images.
        steps_per_epoch: that these settings and images give.
        told: what was decided about the settings for these ranks.

    Raises:
        UserError: when the folder holds a run and --resume was not given, when there is nothing sound to resume, or
            when the settings differ from the run's own.
    """
    resume, folder = config.run.resume, folder_of(config)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    if resume is None and holds_run(folder):
        raise UserError(f"{folder} already holds a run: add --resume to continue it, or choose another --out")
    _check_no_others_files(folder)
    if resume is None:
        check_label_schedules(config)
        return OpenRun(folder, None, [*told], checkpoints_in(folder))
    remarks: list[str] = []
    path, looked_at = resumed_from(config) or folder, checkpoints_in(folder)
    if resume == "auto" or (path.is_dir() and not is_sharded(path)):
        checkpoint, complaints = newest_checkpoint(path)
        remarks = [f"passed over a checkpoint: {complaint}" for complaint in complaints]
    else:
        checkpoint = read_checkpoint(path)
    if checkpoint is None:
        if remarks or resume != "auto":
            raise UserError("; ".join([f"there is no sound checkpoint in {path}", *remarks]))
        check_label_schedules(config)
        return OpenRun(folder, None, [*told, f"nothing to resume in {folder}: starting anew"], looked_at)
    before = checkpoint.progress["steps_per_epoch"]
    if before != steps_per_epoch:
        raise UserError(
            f"{checkpoint.path} counts {before} steps an epoch, and these images and --batch-size give "
            f"{steps_per_epoch}: its place in the epoch and its schedules would jump. A new run can start from its "
            f"weights: --init {checkpoint.path}"
        )
    changes = differences(checkpoint, config, fingerprint)
    if changes and not config.run.accept_changes:
        raise UserError(
            f"the run in {folder} was started with other settings: {'; '.join([*changes, *told])}. "
            "Resume with the run's own, or add --accept-changes"
        )
    total, step = steps_per_epoch * config.optimizer.epochs, checkpoint.progress["step"]
    if step > total:
        raise UserError(f"{checkpoint.path} stands after step {step:,}, and these settings end after {total:,}")
    check_fits(checkpoint, phase_after(config, step, steps_per_epoch).config)
    remarks += [f"resumed with a changed setting: {change}" for change in changes]
    if checkpoint.config.data.loader == "ffcv" and checkpoint.progress.get("decoder") != DECODER:
        remarks.append(
            "JPEGs are decoded by the accurate DCT from here on, as every other loader does: the steps before saw "
            "pixels that were 0.8/255 darker on average"
        )
    return OpenRun(folder, checkpoint.path, [*told, *remarks, f"resumed from {checkpoint.path}"], looked_at)


def _check_no_others_files(folder: Path) -> None:
    """Raise UserError where a run would write over a file that no run of ours has left."""
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    sentence = f"--out {folder} holds a {{}} that is no run's: choose another folder"
    if config.exists():
        try:
            groups = json.loads(config.read_text(encoding="utf-8"))
            ours = isinstance(groups, dict) and groups.keys() == read_config(config, recorded=True).groups().keys()
        except (UserError, OSError, ValueError, RecursionError):
            ours = False
        if not ours and not checkpoints_in(folder):
            raise UserError(sentence.format("config.json"))
    elif metrics.exists() and metrics.stat().st_size and not checkpoints_in(folder):
        # Every run writes its settings before its first row.
        raise UserError(sentence.format("metrics.jsonl"))


@contextlib.contextmanager
def lock_run(run: OpenRun, config: Config) -> Iterator[list[str]]:
    """Make the folder this process's own: lock it, clear what killed processes left, record the settings.

    Checkpoints past the one that is resumed are set aside, so that the newest in the folder is always the run's own.

    Yields:
        Remarks for the user.

    Raises:
        UserError: when another process trains there, or has done so since the checkpoint was chosen, or the folder
            cannot be written.
    """
    checkpoints = run.folder / "checkpoints"
    with lock_folder(run.folder) as remarks:
        if new := [path for path in checkpoints_in(run.folder) if path not in run.looked_at]:
            raise UserError(
                f"another process was still training in {run.folder}, and has written {new[0].name} since this start "
                "has looked for a checkpoint: start again, with --resume, to go on from it"
            )
        if run.checkpoint is not None and run.checkpoint.parent.resolve() == checkpoints.resolve():
            past = [path for path in checkpoints_in(run.folder) if step_of(path) > step_of(run.checkpoint)]
            aside = checkpoints / f"past-{run.checkpoint.stem}"
            for path in past:
                aside.mkdir(exist_ok=True)
                shutil.rmtree(aside / path.name, ignore_errors=True)  # a folder gives way to none
                path.replace(aside / path.name)
        with atomic_write(run.folder / "config.json") as beside:
            write_config(recorded(config), beside)
        yield remarks


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[list[str]]:
    """A folder with checkpoints as this process's own: locked, and cleared of what killed processes left.

    Yields:
        Remarks for the user: that nothing can be locked there, where that is so.

    Raises:
        UserError: when another process trains there, or the folder cannot be written.
    """
    checkpoints = folder / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}") from None
    with file:
        locked = lock(file)
        if locked is False:
            raise UserError(f"another process is training in {folder}; wait for it or choose another --out")
        remove_partial(folder, alone=locked is True)
        remove_partial(checkpoints, alone=locked is True)
        unlocked = f"the file system of {folder} keeps no locks: see to it that no second process trains there"
        yield [] if locked else [unlocked]


def recorded(config: Config) -> Config:
    """The settings without those that belong to one start of the run."""
    return config.using(out=None, upload=None, resume=None, accept_changes=False, profile=0)


def folder_of(config: Config) -> Path:
    """The run's folder: --out, else the one that --resume names, else a new one under runs/."""
    if config.run.out is not None:
        return config.run.out
    if config.run.upload is not None:
        return local_folder(parse_address(config.run.upload), config.data.cached)
    resume = config.run.resume
    if resume is not None:
        folder = None if resume == "auto" else run_of(Path(resume))
        if folder is None:
            raise UserError("--resume: say which run with --out FOLDER, or name a checkpoint of a run folder")
        return folder
    name = config.run.name or config.run.preset
    if Path(name).name != name:
        raise UserError(f"--name {name}: a name without folders; --out chooses the place")
    stem = Path("runs") / f"{datetime.date.today().isoformat()}-{name}"
    return next(path for path in _numbered(stem) if not path.exists())


def run_of(path: Path) -> Path | None:
    """The run folder that a path given to --resume belongs to."""
    if (path / "checkpoints").is_dir():
        return path
    return path.parent.parent if path.parent.name == "checkpoints" else None


def holds_run(folder: Path) -> bool:
    """Whether a run in this folder got as far as a row or a checkpoint."""
    metrics = folder / "metrics.jsonl"
    return bool(checkpoints_in(folder)) or (metrics.exists() and metrics.stat().st_size > 0)


def differences(checkpoint: Checkpoint, config: Config, fingerprint: str) -> list[str]:
    """What a resumed run would compute differently, one phrase each."""
    before, now, groups = checkpoint.config.flat(), config.flat(), settings_by_name()
    compared = COMPARED_SETTINGS + ROUNDING_SETTINGS * (before["deterministic"] and now["deterministic"])
    unlabelled = before["teachers"] == now["teachers"] and now["teachers"] in ("none", "reconstruction")
    if unlabelled or before["sinkhorn_over"] == now["sinkhorn_over"] == "step":
        before["accumulate"] = now["accumulate"]  # micro-batches only decide what is held at a time
    if before["loader"] in ALIKE_LOADERS and now["loader"] in ALIKE_LOADERS:
        before["loader"] = now["loader"]
    changes = [
        f"--{name.replace('_', '-')} was {printable(str(before[name]))} and is now {now[name]}"
        for name in now
        if (groups[name] in COMPARED_GROUPS or name in compared)
        and name not in ("blr", "lr")
        and before[name] != now[name]
    ]
    changes += rate_changes(checkpoint.config.flat(), config.flat())
    if checkpoint.progress["fingerprint"] != fingerprint:
        changes.append("the .beton holds other images")
    return changes


def describe_run(
    config: Config, images: Samples, ranks: Ranks, student: nn.Module, steps_per_epoch: int, folder: Path
) -> list[str]:
    """What is about to happen, in a few lines, with a warning where the settings will not do well."""
    parameters = sum(p.numel() for p in student.parameters()) / 1e6
    sharded = config.efficiency.shard and ranks.group is not None
    optimizer, folds, prototypes = config.optimizer, config.views.folds, config.network.prototypes
    lines = [
        f"{config.run.preset}: {config.network.model}, {parameters:.1f} M parameters, "
        f"on {ranks.device} x {ranks.size} in {config.efficiency.precision}{', sharded' * sharded}",
        f"{counted(images)} in {images.path}: {steps_per_epoch} steps of {optimizer.batch_size} an epoch, "
        f"{optimizer.epochs} epoch{'s' * (optimizer.epochs != 1)}, peak learning rate {optimizer.peak_lr:.4g}",
        *source_notes(images),
    ]
    balanced = optimizer.accumulate if optimizer.sinkhorn_over == "micro-batch" else 1
    rows = optimizer.batch_size // balanced * folds
    if config.teacher.teachers in ("dual", "single") and rows < prototypes / 4:
        lines.append(
            f"warning: {rows} class tokens a batch share {prototypes} prototypes, too few to fill them: expect a weak "
            "class loss; a larger --batch-size or fewer --prototypes helps"
        )
    taken = "" if config.run.upload is None else f", taken to {config.run.upload}"
    return [*lines, f"run folder: {folder}{taken}"]


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
