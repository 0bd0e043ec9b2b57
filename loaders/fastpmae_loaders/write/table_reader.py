"""What is asked of pyarrow about one parquet or arrow file, in worker processes: the library can crash.

An arrow file is memory with its offsets as they stand, so every column is checked in full before a value of it is read.
"""

import json
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import on_one_line, printable, short
from fastpmae_loaders.sources.beton import PIXEL_LIMIT
from fastpmae_loaders.sources.limits import BYTES_A_PIXEL
from fastpmae_loaders.sources.reading import read_below

_IMAGE_NAMES = ("image", "img", "jpg", "png", "picture", "photo")
_LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target")
_LONGEST_LABEL = 4096
_MEMORY = 4 << 30
_MOST = 2**63 - 1  # the largest limit that the system takes
_SHOWN = 30  # columns in a sentence


@dataclass(frozen=True)
class Table:
    """One file's rows. groups: rows in each row group; labels: of all rows; names: of its classes, by its schema."""

    image: str
    groups: list[int]
    labels: list[int | str | None]
    names: list[str] | None


@dataclass(frozen=True)
class Refusal:
    """Why a data set of such a file cannot be understood at all, as a sentence."""

    sentence: str


def lister(image_column: str | None, label_column: str | None) -> Callable[[int, str], Table | Refusal]:
    """What a worker process calls for each file of a data set."""

    def listed(place: int, path: str) -> Table | Refusal:
        confine(path)
        try:
            return _look(path, image_column, label_column)
        except UserError as refusal:
            return Refusal(str(refusal))

    return listed


@lru_cache(maxsize=1)
def confine(path: str, max_pixels: int = PIXEL_LIMIT) -> None:
    """Limits this process's memory to 4 GiB and what a file of this size may need: a small one can ask for anything.

    Args:
        max_pixels: of an image; of larger ones than are read by default decoding may take as much more.
    """
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    larger = BYTES_A_PIXEL * max(0, max_pixels - PIXEL_LIMIT)
    limit = min(_MEMORY + larger + 2 * Path(path).stat().st_size, _MOST)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _pyarrow() -> Any:
    import pyarrow
    import pyarrow.compute
    import pyarrow.ipc
    import pyarrow.parquet

    return pyarrow


def _look(path: str, image_column: str | None, label_column: str | None) -> Table:
    schema, groups = _open(path)
    rows, size = sum(groups), Path(path).stat().st_size
    if min(groups, default=0) < 0 or rows > size:
        raise ValueError(f"it says that it has {rows:,} rows, and has {size:,} bytes")
    features = _features(schema)
    image = image_column or _image_column(schema, features, path)
    label = label_column or _label_column(schema, features)
    for column in (image, label):
        if column is not None and column not in schema.names:
            raise UserError(f"{printable(path)} has no column {printable(column)!r}: {_listed(schema.names)}")
        if column is not None and schema.names.count(column) > 1:
            raise UserError(f"{printable(path)} has several columns named {short(column)!r}: which is meant is unknown")
    labels: list[int | str | None] = [None] * rows
    if label:
        labels = _labels(path, label, schema.field(label).type)
    if len(labels) != rows:
        raise ValueError(f"it has {rows:,} rows and {len(labels):,} labels")
    return Table(image, groups, labels, _class_names(features, label))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(short(name, 200) for name in names[:_SHOWN]) + more


def is_parquet(path: str) -> bool:
    """By its name: what is no parquet file is an arrow file."""
    return path.lower().endswith(".parquet")


def _open(path: str) -> tuple[Any, list[int]]:
    """A file's schema, and the number of rows in each of its groups."""
    if is_parquet(path):
        with _pyarrow().parquet.ParquetFile(path) as file:
            counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            return file.schema_arrow, counts
    table = _arrow_table(path)
    return table.schema, [table.num_rows]


@lru_cache(maxsize=1)
def _arrow_table(path: str) -> Any:
    arrow = _pyarrow()
    source = arrow.memory_map(path)  # rows are read from the disk as they are asked for
    try:
        return arrow.ipc.open_stream(source).read_all()
    except arrow.ArrowInvalid:
        source.seek(0)
        return arrow.ipc.open_file(source).read_all()


@lru_cache(maxsize=1)
def _column(path: str, group: int | None, name: str) -> Any:
    """A column of a file, or of one row group, whose offsets, lengths and indices were all checked."""
    if is_parquet(path):
        with _pyarrow().parquet.ParquetFile(path) as file:
            table = file.read([name]) if group is None else file.read_row_group(group, columns=[name])
    else:
        table = _arrow_table(path)
    column = table.column(name)
    column.validate(full=True)
    return column


def _labels(path: str, name: str, kind: Any) -> list[int | str | None]:
    """A column's labels; rows with the same word share one string."""
    arrow = _pyarrow()
    types, value = arrow.types, kind.value_type if arrow.types.is_dictionary(kind) else kind
    words = types.is_string(value) or types.is_large_string(value)
    if not (words or types.is_integer(value) or types.is_null(value)):
        raise UserError(
            f"{printable(path)}: its column {short(name)!r} holds {on_one_line(str(kind), 200)}, and labels are "
            "integers or words; --label-column names another"
        )
    labels: list[int | str | None] = []
    for chunk in _column(path, None, name).chunks:
        if words:
            chunk = chunk if types.is_dictionary(kind) else chunk.dictionary_encode()
            longest = arrow.compute.max(arrow.compute.binary_length(chunk.dictionary)).as_py() or 0
            if longest > _LONGEST_LABEL:
                raise ValueError(f"one of its labels has {longest:,} bytes")
            known = chunk.dictionary.to_pylist()
            labels += [None if place is None else known[place] for place in chunk.indices.to_pylist()]
        else:
            labels += chunk.to_pylist()
    return labels


def _features(schema: Any) -> dict[str, Any]:
    """The data set's own description of its columns, kept in the schema's metadata."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError):
        return {}


def _image_column(schema: Any, features: dict[str, Any], path: str) -> str:
    types = _pyarrow().types
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    structs = [
        column.name for column in schema if types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0
    ]
    binary = [column.name for column in schema if types.is_binary(column.type) or types.is_large_binary(column.type)]
    for found in (declared, structs, binary):
        named = [name for name in _IMAGE_NAMES if name in found]
        if named or found:
            return (named or found)[0]
    columns = _listed([f"{column.name} ({on_one_line(str(column.type), 200)})" for column in schema])
    raise UserError(f"{printable(path)} has no column of images; its columns: {columns}. --image-column names one")


def _label_column(schema: Any, features: dict[str, Any]) -> str | None:
    types = _pyarrow().types
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in _LABEL_NAMES if name in declared]
    if declared:
        return (named or declared)[0]
    for name in _LABEL_NAMES:
        if name in schema.names:
            kind = schema.field(schema.names.index(name)).type
            if types.is_integer(kind) or types.is_string(kind):
                return name
    return None


def _class_names(features: dict[str, Any], label: str | None) -> list[str] | None:
    names = features.get(label, {}).get("names") if label else None
    if not isinstance(names, list) or not names:
        return None
    return [printable(str(name)) for name in names]


def read_row(path: str, where: tuple) -> bytes:
    """The bytes of one row's image. UserError with the reason when it has none.

    A row may name a file instead; only those below the folder that the table lies in are read.
    """
    try:
        if is_parquet(path):
            group, row, name = where[:3]
        else:
            group, (row, name) = None, where
        value = _column(path, group, name)[row].as_py()
    except MemoryError:
        raise
    except Exception as error:  # pyarrow has errors of its own, and KeyError, OSError, ...
        raise UserError(f"cannot be read: {on_one_line(str(error), 200) or type(error).__name__}") from None
    if isinstance(value, dict):
        if value.get("bytes") is None and isinstance(value.get("path"), str):
            return read_below(Path(path).parent, value["path"])
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise UserError("the row has no image")
    return value
