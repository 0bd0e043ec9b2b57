"""Hugging Face data sets on disk: parquet files, or the arrow files that `save_to_disk` writes."""

from importlib.util import find_spec

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import usable_cores
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.listing import Item, Listing, labels_from
from fastpmae_loaders.write.table_reader import Refusal, Table, is_parquet
from fastpmae_loaders.write.workers import Failure, WorkerPool

_TASK = "fastpmae_loaders.write.table_reader:lister"
_TIMEOUT = 300.0  # seconds for the labels of one file, which may lie far away
_MOST_WORKERS = 4  # they wait for the disk


def list_tables(paths: list[str], image_column: str | None, label_column: str | None) -> Listing:
    """The images of a data set's files, with the names of its classes where its schema has them.

    Only labels are read, by worker processes. A file that cannot be opened, or that ends its process, is one bad item.

    Raises:
        UserError: where a file has no images or the files disagree about the classes.
    """
    if find_spec("pyarrow") is None:
        raise UserError(
            "parquet and arrow files are read by pyarrow, which is not installed: pip install 'fastpmae[hf]'"
        )
    items: list[Item] = []
    labels: list[int | str | None] = []
    bad: list[Item] = []
    names: list[str] | None = None
    task = (_TASK, (image_column, label_column))
    with WorkerPool(*task, max(1, min(len(paths), usable_cores(), _MOST_WORKERS)), _TIMEOUT) as pool:
        for place, table in pool.in_order(paths, group_size=1):
            path = paths[place]
            if isinstance(table, Failure):
                bad.append(Item("bad", path, (f"cannot be read: {table.reason}",), -1))
                continue
            if isinstance(table, Refusal):
                raise UserError(table.sentence)
            if items and table.names != names:
                raise UserError(f"{printable(path)} has other classes than the files before it")
            names = table.names
            items += rows_of(path, table)
            labels += table.labels
    numbers, words, notes = labels_from(labels)
    if names and not all(-1 <= number < len(names) for number in numbers):
        notes.append(f"Some labels are beyond the {len(names)} classes of the schema: its names are not kept.")
        names = None
    items = [item._replace(label=number) for item, number in zip(items, numbers, strict=True)]
    return Listing(items + bad, names or words, 0, notes)


def rows_of(path: str, table: Table) -> list[Item]:
    """The items of a file, labels yet to come: those of all files are numbered together."""
    items: list[Item] = []
    for group, count in enumerate(table.groups):
        for inner in range(count):
            where = (group, inner, table.image, len(items)) if is_parquet(path) else (len(items), table.image)
            items.append(Item("parquet" if is_parquet(path) else "arrow", path, where, 0))
    return items
