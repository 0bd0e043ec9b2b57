"""Checkpoints of ours whose digest fits, and whose settings, sizes or tensors are forged; and damaged ones."""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpmae import PRESETS, Config, export_encoder, load_encoder, pretrain, write_beton
from fastpmae.model.vit import Encoder
from fastpmae.pictures.analysis import networks_of
from fastpmae.pretraining.cli import settings_of_run
from fastpmae.run.checkpoint import checkpoint_path, newest_checkpoint, read_checkpoint, write_checkpoint
from fastpmae.run.init_weights import start_encoder, tuned_weights
from fastpmae_loaders.errors import RunError, UserError
from tests.fuzz.case import Case
from tests.fuzz.weights import bytes_of
from tests.made import write_tree

STEP = 3
ODD: tuple[Any, ...] = (
    0, -1, 1, 3, 10**8, 10**12, 2**63, 10**30, 10**400, 1e-300, 1e300, float("inf"), float("nan"), True, None, "",
    "auto", "\x1b[31mred", "a\0b", "../../x", "/dev/zero", "hf-hub:a/b", [], [1], [0.9, 1e400], {}, {"a": 1},
    "x" * 100000,
)  # fmt: skip


def settings(beton: Path) -> Config:
    """As small as a run can be."""
    return PRESETS["demo"].using(
        beton=beton, image_size=16, patch_size=8, width=16, heads=2, depth=1, decoder_width=16, decoder_depth=1,
        decoder_heads=2, head_hidden=16, head_bottleneck=8, prototypes=8, folds=3, epochs=2, pixel_epochs=0,
        batch_size=4, log_every=1, workers=1, device="cpu", tensorboard=False, loader="torch",
    )  # fmt: skip


def sound(folder: Path) -> Path:
    """A run of a few steps, its images beside it."""
    run = folder / "sound"
    if not checkpoint_path(run, STEP).exists():
        beton = folder / "images.beton"
        write_beton(write_tree(folder / "tree", 16), beton, force=True)
        with contextlib.redirect_stderr(None):
            pretrain(settings(beton).using(out=run, steps=STEP))
    return run


def use(run: Path, step: int) -> None:
    """What the commands do with a checkpoint, one after the other: each refuses it in a sentence or takes it."""
    path = checkpoint_path(run, STEP)
    said: list[Exception] = []

    def resume() -> None:
        pretrain(settings_of_run(run).using(out=run, resume="auto", steps=STEP + 1))

    def attempt(*calls: Any) -> None:
        for call in calls:
            try:
                call()
            except (UserError, RunError) as error:
                said.append(error)

    attempt(
        lambda: tuned_weights(run),
        lambda: load_encoder(run, ("student", "labelling_teacher", "reconstruction_teacher", "random")[step % 4]),
        lambda: networks_of(read_checkpoint(path)),
        lambda: start_encoder(Encoder(16, 8, 16, 1, 2), path),
        lambda: export_encoder(run, run / "out.safetensors", with_head=True, format="plain"),
        lambda: newest_checkpoint(run),
        resume,
    )
    for error in said:
        raise error


def forged(rng: np.random.Generator, tensors: dict[str, Tensor], progress: dict[str, Any]) -> str:
    """Change something of a checkpoint's, and say what."""
    kind = rng.integers(8)
    value = ODD[rng.integers(len(ODD))]
    if kind < 3:
        config = progress["config"]
        group = str(rng.choice(sorted(config)))
        name = str(rng.choice(sorted(config[group])))
        config[group][name] = value
        return f"{group}.{name} = {value!r:.60}"
    if kind == 3:
        name = str(rng.choice(sorted(progress)))
        progress[name] = value
        return f"progress {name} = {value!r:.60}"
    if kind == 4:
        progress["config"][str(rng.choice(["\x1b]0;name\x07", "finetune", "run", "model"]))] = value
        return f"a group {value!r:.60}"
    name = str(rng.choice(sorted(tensors)))
    tensor = tensors[name]
    if kind == 5:
        del tensors[name]
        tensors[str(rng.choice(["student.\x1b[31mred", "student.encoder.blocks.999999999.x", "rng.cpu", ""]))] = tensor
        return f"{name} under another name"
    changes = {
        "zeros": lambda: torch.zeros_like(tensor),
        "ones": lambda: torch.full_like(tensor, 1),
        "all bits": lambda: torch.full_like(tensor, 255) if tensor.dtype == torch.uint8 else tensor * float("nan"),
        "minus": lambda: -tensor,
        "complex": lambda: tensor.to(torch.complex64),
        "int": lambda: tensor.long(),
        "no numbers": lambda: tensor[:0] if tensor.ndim else torch.zeros(0),
        "another shape": lambda: torch.zeros(tuple(rng.integers(0, 5, size=rng.integers(0, 4)).tolist())),
        "float8": lambda: tensor.to(torch.float8_e4m3fn),
    }
    what = str(rng.choice(sorted(changes)))
    # random states and the optimizer's counts are what a resume hands to torch
    if rng.random() < 0.4:
        name = str(rng.choice([other for other in sorted(tensors) if other.startswith(("rng", "log", "optimizer"))]))
        tensor = tensors[name]
    tensors[name] = changes[what]()
    return f"{name}: {what}"


def cases(rng: np.random.Generator, folder: Path) -> Iterator[Case]:
    """See `tests.fuzz.case`."""
    original = read_checkpoint(checkpoint_path(sound(folder), STEP))
    run = folder / "forged"
    path = checkpoint_path(run, STEP)
    while True:
        for leftover in path.parent.glob("step-*"):
            leftover.unlink()
        (run / "metrics.jsonl").unlink(missing_ok=True)
        tensors, progress = dict(original.tensors), json.loads(json.dumps(original.progress))
        said = [forged(rng, tensors, progress)]
        write_checkpoint(path, tensors, progress, keep=0)
        if rng.random() < 0.15:
            said.append(bytes_of(rng, path))
        yield Case("; ".join(said), functools.partial(use, run, int(rng.integers(4))), (path,))
