"""Hostile sets: an index, notes of duplicates, manifests and parts that are damaged, forged, exchanged or not files.

Each is opened, shown for an epoch as a set and in a mixture, finished as `fastpmae-write --finish` does, and some are
checked by `fastpmae-write --check`. What is asked beyond the fuzzer's own promises: an epoch that is shown has every
image of the index once, but for duplicates.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastpmae_loaders import PairedViews, UserError, ViewSettings, open_samples
from fastpmae_loaders.errors import RunError
from fastpmae_loaders.sources.beton_set import BetonSet
from fastpmae_loaders.write.cli import main as write_command
from fastpmae_loaders.write.finish import finish_set
from fastpmae_loaders.write.sets import write_set
from tests.fuzz.case import Case
from tests.fuzz.checkpoints import ODD
from tests.fuzz.values import WORDS, broken, choice
from tests.loaders.mutations import KINDS, File
from tests.made import write_tree

SETTINGS = ViewSettings(image_size=32, patch_size=8)
_CHECKED = 0.08
"""Of how many cases: a check starts a process of its own."""
_TEXTS = ("index.json", "part-00001.json", "plan.json")


def sound(folder: Path) -> Path:
    """A set of four parts, two of its images the same, with all that its writer leaves."""
    tree, out = folder / "tree", folder / "sound"
    if not (out / "duplicates.bits").exists():
        write_tree(tree, 22)
        first, *_, last = sorted(tree.rglob("*.jpg"))
        shutil.copy(first, last)
        write_set(tree, out, 4, workers=1, deduplicate=True, force=True)
        show(out)  # numba's compiler is no part of the first case
    return out


def show(folder: Path) -> None:
    """An epoch, of the set alone and of a mixture with itself."""
    samples = open_samples(folder)
    assert isinstance(samples, BetonSet)
    for source in (samples, [f"{folder}:0.5", f"{folder}:1"]):
        with PairedViews(source, 5, "native", SETTINGS, drop_last=False, bad_fraction=1.0, workers=2) as views:
            seen = np.concatenate([batch.index.numpy() for batch in views] or [np.empty(0, np.int64)])
            if source is samples and not views.failed:
                bits = np.zeros(len(samples), bool)
                if samples.duplicates is not None:
                    bits = np.unpackbits(samples.duplicates, count=len(samples), bitorder="little").astype(bool)
                assert sorted(seen.tolist()) == np.flatnonzero(~bits).tolist()


def use(folder: Path, check: bool) -> None:
    """What reads a set, one after the other: each refuses it in a sentence or takes it."""
    said: list[Exception] = []

    def command(*words: str) -> None:
        """The command line, in this process: it says its sentence and ends with a status."""
        before = sys.argv
        sys.argv = ["fastpmae-write", *words]
        try:
            status = write_command()
            assert status in (0, 2), f"exit status {status}"
        finally:
            sys.argv = before

    attempts = [partial(show, folder), partial(finish_set, folder, deduplicate=True)]
    if check:
        attempts.append(partial(command, "--check", str(folder), "--workers", "1"))
    for attempt in attempts:
        try:
            attempt()
        except (UserError, RunError) as error:
            said.append(error)
    if said:
        raise said[0]


def forge(rng: np.random.Generator, value: Any) -> tuple[Any, str]:
    """JSON with one of its values exchanged, dropped, doubled or nested."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = str(choice(rng, sorted(value)))
        kind = rng.random()
        if kind < 0.1:
            return {key: other for key, other in value.items() if key != name}, f"without {name}"
        if kind < 0.2:
            return value | {str(choice(rng, ["\x1b[31mred", "name", "pages", ""])): value[name]}, f"{name} under a name"
        inner, said = forge(rng, value[name])
        return value | {name: inner}, f"{name}: {said}"
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = int(rng.integers(len(value)))
        if rng.random() < 0.2:
            return [*value, value[place]], f"[{place}] twice"
        inner, said = forge(rng, value[place])
        return [*value[:place], inner, *value[place + 1 :]], f"[{place}]: {said}"
    found = choice(rng, (*ODD, *WORDS, [[]] * 3, {"pages": [1]}, "part-00000.beton", "../sound/part-00000.beton"))
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        found = value + int(choice(rng, (-1, 1, 2**32, -(2**31), value)))
    return found, f"{value!r:.30} -> {found!r:.40}"


def break_part(rng: np.random.Generator, folder: Path) -> str:
    """A part, damaged by structure; its digest in the index, or all that it says, may be that of the damaged one."""
    name = f"part-{int(rng.integers(4)):05d}.beton"
    file = File((folder / name).read_bytes())
    kind = KINDS[int(rng.integers(len(KINDS)))]
    kind(file, rng)
    (folder / name).write_bytes(bytes(file.data))
    said = f"{name}: {kind.__name__}"
    if rng.random() < 0.6:
        index = json.loads((folder / "index.json").read_text())
        for shard in index["shards"]:
            if shard["name"] == name:
                shard["digest"] = "sha256:" + hashlib.sha256(file.data).hexdigest()
                shard["bytes"] = len(file.data)
        (folder / "index.json").write_text(json.dumps(index))
        said += ", known to the index"
    return said


def exchange(rng: np.random.Generator, folder: Path) -> str:
    """A file that is missing, another's, a link, a pipe, a folder, or not there to be read."""
    name = str(choice(rng, sorted(os.listdir(folder))))  # noqa: PTH208 - the names alone
    path = folder / name
    kind = str(
        choice(rng, ("missing", "another's", "a link to itself", "a link elsewhere", "a pipe", "a folder", "empty"))
    )
    other = folder / str(choice(rng, sorted(os.listdir(folder))))  # noqa: PTH208
    content = other.read_bytes()
    path.unlink()
    if kind == "another's":
        path.write_bytes(content)
    elif kind == "a link to itself":
        path.symlink_to(name)
    elif kind == "a link elsewhere":
        path.symlink_to("/dev/zero")
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    return f"{name}: {kind}"


def cases(rng: np.random.Generator, folder: Path) -> Iterator[Case]:
    """See `tests.fuzz.case`."""
    original, out = sound(folder), folder / "hostile"
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(original, out)
        said = []
        for _ in range(1 + int(rng.random() < 0.3)):
            kind = rng.random()
            if kind < 0.4:
                path = out / str(choice(rng, _TEXTS))
                with contextlib.suppress(ValueError, OSError):
                    told, what = forge(rng, json.loads(path.read_text()))
                    path.write_text(json.dumps(told))
                    said.append(f"{path.name}: {what}")
            elif kind < 0.65:
                with contextlib.suppress(ValueError, OSError):
                    said.append(break_part(rng, out))
            elif kind < 0.85:
                path = out / str(choice(rng, (*_TEXTS, "duplicates.bits", "part-00002.hashes")))
                if path.is_file():
                    content, what = broken(rng, path.read_bytes())
                    path.write_bytes(content)
                    said.append(f"{path.name}: {what}")
            else:
                with contextlib.suppress(OSError):
                    said.append(exchange(rng, out))
        yield Case("; ".join(said), partial(use, out, bool(rng.random() < _CHECKED)), (out,))
