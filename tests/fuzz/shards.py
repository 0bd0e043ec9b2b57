"""Checkpoints in shards whose index is forged with a digest that fits, or whose files are damaged or exchanged."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fastpmae import export_encoder, load_encoder, pretrain
from fastpmae.pictures.analysis import networks_of
from fastpmae.pretraining.cli import settings_of_run
from fastpmae.run.checkpoint import checkpoint_path, newest_checkpoint, read_checkpoint, read_progress
from fastpmae.run.init_weights import tuned_weights
from fastpmae.run.shards import INDEX, write_shards
from fastpmae_loaders.errors import RunError, UserError
from tests.fuzz.case import Case
from tests.fuzz.checkpoints import STEP, forged
from tests.fuzz.checkpoints import sound as sound_run
from tests.fuzz.values import broken, choice
from tests.fuzz.weights import bytes_of


def use(run: Path, path: Path) -> None:
    """What the commands do with a checkpoint, one after the other: each refuses it in a sentence or takes it."""
    said: list[Exception] = []
    for attempt in (
        partial(read_progress, path),
        partial(tuned_weights, run),
        partial(load_encoder, run, "student"),
        lambda: networks_of(read_checkpoint(path)),
        partial(export_encoder, run, run / "out.safetensors", with_head=True, format="plain"),
        partial(newest_checkpoint, run),
        lambda: pretrain(settings_of_run(run).using(out=run, resume="auto", steps=STEP + 1)),
    ):
        try:
            attempt()
        except (UserError, RunError) as error:
            said.append(error)
    for error in said:
        raise error


def reindex(path: Path, index: dict) -> None:
    """Write the index with a digest that fits."""
    index.pop("digest", None)
    told = json.dumps(index, sort_keys=True)
    (path / INDEX).write_text(json.dumps(index | {"digest": hashlib.sha256(told.encode()).hexdigest()}))


def break_files(rng: np.random.Generator, path: Path) -> str:
    """Something of a checkpoint's folder, and what; the index may be made to fit."""
    index = json.loads((path / INDEX).read_text())
    shard = path / str(choice(rng, sorted(index["files"])))
    kind = int(rng.integers(7))
    if kind == 0:
        content, said = broken(rng, (path / INDEX).read_bytes())
        (path / INDEX).write_bytes(content)
        return f"index: {said}"
    if kind == 1:
        said = bytes_of(rng, shard)
    elif kind == 2:
        said = f"{shard.name} is missing"
        shard.unlink()
    elif kind == 3:
        name = str(
            choice(rng, ("../out.safetensors", "/dev/zero", "a/b.safetensors", "\x1b.safetensors", ".safetensors"))
        )
        index["files"][name] = index["files"][shard.name]
        reindex(path, index)
        return f"a file called {name!r}"
    elif kind == 4:
        value = choice(rng, (None, [], [1], [1, 2], ["1", ""], [-1, ""], [2**70, "x"], [True, "x"], {"a": 1}))
        index["files"][shard.name] = value
        reindex(path, index)
        return f"{shard.name} is {value!r}"
    elif kind == 5:
        value = choice(rng, ("", "null", "[]", "{}", '{"a":' * 50, "[" * 10**5, 7, None, {"step": 1}))
        index["progress"] = value
        reindex(path, index)
        return f"progress {value!r:.40}"
    else:
        said = f"{shard.name} is a pipe"
        shard.unlink()
        os.mkfifo(shard)
    if rng.random() < 0.7 and shard.is_file():
        index["files"][shard.name] = [shard.stat().st_size, hashlib.sha256(shard.read_bytes()).hexdigest()]
        reindex(path, index)
        said += ", known to the index"
    return said


def cases(rng: np.random.Generator, folder: Path) -> Iterator[Case]:
    """See `tests.fuzz.case`."""
    original = read_checkpoint(checkpoint_path(sound_run(folder), STEP))
    run = folder / "sharded"
    path = checkpoint_path(run, STEP, sharded=True)
    while True:
        shutil.rmtree(run, ignore_errors=True)
        path.parent.mkdir(parents=True)
        tensors, progress = dict(original.tensors), json.loads(json.dumps(original.progress))
        said = [forged(rng, tensors, progress)] if rng.random() < 0.5 else []
        write_shards(path, tensors, progress, None)
        if not said or rng.random() < 0.15:
            said.append(break_files(rng, path))
        yield Case("; ".join(said), partial(use, run, path), (path,))
