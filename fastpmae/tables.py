"""Hugging Face data sets on disk: parquet files, or the arrow files that `save_to_disk` writes."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastpmae.errors import UserError
from fastpmae_loaders.listing import Item, Listing, labels_from
from fastpmae_loaders.printable import printable

_IMAGE_NAMES = ("image", "img", "jpg", "png", "picture", "photo")
_LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target")


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "parquet and arrow files are read by pyarrow, which is not installed: pip install 'fastpmae[hf]'"
        ) from None
    return pyarrow


def list_tables(paths: list[str], image_column: str | None, label_column: str | None) -> Listing:
    """The images of a data set's files, with the names of its classes where its schema has them.

    Only labels are read. A file that cannot be opened is one bad item.
    """
    items: list[Item] = []
    labels: list[int | str | None] = []
    bad: list[Item] = []
    names: list[str] | None = None
    notes: list[str] = []
    for path in paths:
        try:
            schema, groups = _open(path)
            features = _features(schema)
            image = image_column or _image_column(schema, features, path)
            label = label_column or _label_column(schema, features)
            for column in (image, label):
                if column is not None and column not in schema.names:
                    raise UserError(f"{printable(path)} has no column {column!r}: {', '.join(schema.names)}")
            found = _class_names(features, label)
            if items and found != names:
                raise UserError(f"{printable(path)} has other classes than the files before it")
            names = found
            row = 0
            for group, count in enumerate(groups):
                for inner in range(count):
                    where = (group, inner, image, row) if path.endswith(".parquet") else (row, image)
                    items.append(Item(_kind(path), path, where, 0))
                    row += 1
            values = _column(path, label) if label else [None] * row
            labels += [_plain(value) for value in values]
        except UserError:
            raise
        except Exception as error:  # pyarrow has errors of its own, and KeyError, OSError, ...
            bad.append(Item("bad", path, (f"cannot be read: {_short(error)}",), -1))
            del labels[len(items) :], items[len(labels) :]
    numbers, words, more = labels_from(labels)
    if names and not all(-1 <= number < len(names) for number in numbers):
        more.append(f"Some labels are beyond the {len(names)} classes of the schema: its names are not kept.")
        names = None
    items = [item._replace(label=number) for item, number in zip(items, numbers, strict=True)]
    return Listing(items + bad, names or words, 0, notes + more)


def _kind(path: str) -> str:
    return "parquet" if path.endswith(".parquet") else "arrow"


def _short(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _plain(value: Any) -> int | str | None:
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _open(path: str) -> tuple[Any, list[int]]:
    """A file's schema, and the number of rows in each of its groups."""
    arrow = _pyarrow()
    if _kind(path) == "parquet":
        with arrow.parquet.ParquetFile(path) as file:
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
def _row_group(path: str, group: int, column: str) -> Any:
    with _pyarrow().parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(column)


def _column(path: str, column: str) -> list[Any]:
    if _kind(path) == "parquet":
        return _pyarrow().parquet.read_table(path, columns=[column]).column(column).to_pylist()
    return _arrow_table(path).column(column).to_pylist()


def _features(schema: Any) -> dict[str, Any]:
    """The data set's own description of its columns, kept in the schema's metadata."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (TypeError, KeyError, ValueError, RecursionError):
        return {}
    return {name: kind for name, kind in features.items() if isinstance(kind, dict)}


def _image_column(schema: Any, features: dict[str, Any], path: str) -> str:
    arrow = _pyarrow()
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    structs = [
        column.name
        for column in schema
        if arrow.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0
    ]
    binary = [
        column.name
        for column in schema
        if arrow.types.is_binary(column.type) or arrow.types.is_large_binary(column.type)
    ]
    for found in (declared, structs, binary):
        named = [name for name in _IMAGE_NAMES if name in found]
        if named or found:
            return (named or found)[0]
    columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
    raise UserError(f"{printable(path)} has no column of images; its columns: {columns}. --image-column names one")


def _label_column(schema: Any, features: dict[str, Any]) -> str | None:
    arrow = _pyarrow()
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in _LABEL_NAMES if name in declared]
    if declared:
        return (named or declared)[0]
    for name in _LABEL_NAMES:
        if name in schema.names:
            kind = schema.field(name).type
            if arrow.types.is_integer(kind) or arrow.types.is_string(kind):
                return name
    return None


def _class_names(features: dict[str, Any], label: str | None) -> list[str] | None:
    names = features.get(label, {}).get("names") if label else None
    if not isinstance(names, list) or not names:
        return None
    return [printable(str(name)) for name in names]


def read_row(kind: str, path: str, where: tuple) -> bytes:
    """The bytes of one row's image. UserError with the reason when it has none."""
    try:
        if kind == "parquet":
            group, inner, column = where[:3]
            value = _row_group(path, group, column)[inner].as_py()
        else:
            row, column = where
            value = _arrow_table(path).column(column)[row].as_py()
    except Exception as error:
        raise UserError(f"cannot be read: {_short(error)}") from None
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            value = value["bytes"]
        elif isinstance(value.get("path"), str):
            return (Path(path).parent / value["path"]).read_bytes()
        else:
            value = None
    if not isinstance(value, bytes):
        raise UserError("the row has no image")
    return value
