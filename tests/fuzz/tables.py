"""Hostile tar shards, arrow and parquet files, by structure, through what `fastpmae-write` does with them.

Shards are listed and read in this process; a table's file may crash the library that reads it, so that its worker
processes are part of what is tried. A case of tables is a handful of files, since starting those takes a second.
"""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np

from fastpmae import UserError, write_beton
from fastpmae_loaders.folders import TarShards
from fastpmae_loaders.sources.beton import Beton
from fastpmae_loaders.sources.listing import Item
from fastpmae_loaders.write.hf_datasets import rows_of
from fastpmae_loaders.write.images import ImageSettings, store
from fastpmae_loaders.write.sources import SourceSettings, find_images, read_item
from fastpmae_loaders.write.table_reader import Refusal, Table
from fastpmae_loaders.write.workers import Failure, WorkerPool
from tests.fuzz.archives import archive
from tests.fuzz.arrow_files import arrow_file
from tests.fuzz.case import Case
from tests.fuzz.parquet_files import parquet_file

_FILES = 24
_ROWS = 72  # of a case's tables, read in the end
_SECONDS = 25.0  # for one file or row: far more than any takes


def cases(rng: np.random.Generator, folder: Path) -> Iterator[Case]:
    """Shards, arrow and parquet in turn; `how.txt` beside a case's files says what was done to each."""
    for number in count():
        here = folder / f"case-{number}"
        here.mkdir(exist_ok=True)
        for old in here.iterdir():
            old.unlink()
        (here / "beside.jpg").write_bytes(b"a row may name this")
        whole = bool(rng.random() < 0.2)  # the command's own function from end to end
        suffix, make = (("tar", archive), ("arrow", arrow_file), ("parquet", parquet_file))[number % 3]
        made = [make(rng) for _ in range(1 if whole else _FILES)]
        paths = [here / f"{place}.{suffix}" for place in range(len(made))]
        for path, (content, _) in zip(paths, made, strict=True):
            path.write_bytes(content)
        (here / "how.txt").write_text(
            "".join(f"{path.name}: {how}\n" for path, (_, how) in zip(paths, made, strict=True))
        )
        if whole:
            yield Case(f"{suffix}: {made[0][1]}", _written(paths[0] if suffix == "tar" else here), (here,))
        else:
            run = _listed(paths) if suffix == "tar" else _read(paths)
            yield Case(f"{suffix}: {_FILES} files", run, (here,))


def _written(source: Path) -> Callable[[], None]:
    def run() -> None:
        out = source.parent / "out.beton"
        kind = "tar" if source.suffix == ".tar" else "hf"
        listing = SourceSettings(kind=kind)
        written = write_beton(source, out, workers=1, skip_bad=True, force=True, listing=listing, timeout=_SECONDS)
        assert len(Beton(out)) == written.samples
        _check_said([*written.notes, *(f"{name}: {reason}" for name, reason in written.bad)])

    return run


def _listed(paths: list[Path]) -> Callable[[], None]:
    def run() -> None:
        refused = None
        for path in paths:
            try:
                _list(path)
            except UserError as error:
                _check_said([str(error)])
                refused = error
        if refused is not None:
            raise refused

    return run


def _list(path: Path) -> None:
    listing = find_images(path)
    _check_said(listing.notes)
    for item in listing.items:
        try:
            store(read_item(item), ImageSettings(max_pixels=1 << 24))
        except UserError as error:
            _check_said([item.name, str(error)])
    samples = TarShards(path)
    for index in range(len(samples)):
        samples.payload(index)
    _check_said([*samples.notes, *(f"{name}: {reason}" for name, reason in samples.left_out)])
    assert len(samples) + len(samples.left_out) == len(listing.items)


def _read(paths: list[Path]) -> Callable[[], None]:
    def run() -> None:
        items: list[Item] = []
        with WorkerPool("fastpmae_loaders.write.table_reader:lister", (None, None), 1, _SECONDS) as pool:
            for place, table in pool.in_order([str(path) for path in paths], group_size=1):
                if isinstance(table, Table):
                    items += rows_of(str(paths[place]), table)[: _ROWS // len(paths)]
                    assert all(isinstance(label, int | str | None) for label in table.labels)
                else:
                    assert isinstance(table, Failure | Refusal)
                    _check_said([table.reason if isinstance(table, Failure) else table.sentence])
        with WorkerPool("fastpmae_loaders.write.write:converter", (ImageSettings(),), 1, _SECONDS) as pool:
            for _, row in pool.in_order(items):
                _check_said([row.reason] if isinstance(row, Failure) else [])

    return run


def _check_said(sentences: list[str]) -> None:
    for sentence in sentences:
        assert sentence.isprintable(), repr(sentence)
        assert sentence.strip()
        assert "it took more than" not in sentence, sentence
