"""Hugging Face's parquet files with a column of images and one of masks."""

import io
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from fastpmae.evaluate.dense.masks import Pair
from fastpmae.evaluate.dense.pairs import Pairs
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import on_one_line, printable
from fastpmae_loaders.sources.reading import FILE_LIMIT, read_below
from fastpmae_loaders.sources.splits import splits_of_files

IMAGE_COLUMNS = ("image", "img", "pixel_values", "picture", "photo")
MASK_COLUMNS = ("mask", "label", "labels", "annotation", "segmentation_mask", "segmentation", "semantic_mask", "seg")
_reading = threading.Lock()


def pairs_in_tables(folder: Path) -> Pairs | None:
    """The rows of the parquet files below a folder; None where there are none.

    Raises:
        UserError: where they cannot be read, or have no such columns.
    """
    paths = sorted(path for path in folder.rglob("*.parquet") if path.is_file())
    if not paths:
        return None
    if find_spec("pyarrow") is None:
        raise UserError("parquet files are read by pyarrow, which is not installed: pip install 'fastpmae[hf]'")
    split_of = splits_of_files([path.relative_to(folder).as_posix() for path in paths])
    found = Pairs("parquet", {})
    for path in paths:
        image, mask, groups = _look(path)
        rows = found.splits.setdefault(split_of(path.relative_to(folder).as_posix()), [])
        for group, count in enumerate(groups):
            for row in range(count):
                name = f"{path}, row {sum(groups[:group]) + row}"
                of_image, of_mask = (partial(_cell, path, group, row, column) for column in (image, mask))
                rows.append(Pair(f"{name}, {image}", f"{name}, {mask}", partial(_opened, of_image), of_mask))
    found.splits = {split: rows for split, rows in found.splits.items() if rows}
    if not found.splits:
        raise UserError(f"{printable(str(folder))}: its parquet files have no rows")
    return found


def _look(path: Path) -> tuple[str, str, list[int]]:
    """The columns of images and masks, and how many rows each group has."""
    from pyarrow import parquet, types

    try:
        with parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            schema = file.schema_arrow
        if min(groups, default=0) < 0 or sum(groups) > path.stat().st_size:
            raise ValueError(f"it says that it has {sum(groups):,} rows")
    except Exception as error:  # pyarrow has errors of its own, and OSError, ValueError, ...
        raise UserError(f"{printable(str(path))} cannot be read: {on_one_line(str(error), 200)}") from None

    def holds_pictures(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or (
            types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        )  # fmt: skip

    names = [column.name for column in schema if holds_pictures(column.type)]
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    mask = next((name for name in MASK_COLUMNS if name in names), None)
    if image is None or mask is None or len(set(names)) < len(names):
        shown = ", ".join(printable(name[:60]) for name in schema.names[:20])
        raise UserError(
            f"{printable(str(path))} needs a column of images called image and one of masks called mask or label; "
            f"its columns: {shown}"
        )
    return image, mask, groups


@lru_cache(maxsize=4)
def _column(path: Path, group: int, name: str) -> Any:
    """One column of one group of rows, every offset in it checked."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        size = file.metadata.row_group(group).total_byte_size
        if size > FILE_LIMIT:
            raise UserError(f"its row group {group} has {size:,} bytes, more than the {FILE_LIMIT:,} that are read")
        column = file.read_row_group(group, columns=[name]).column(name)
    column.validate(full=True)
    return column


def _opened(read: Callable[[], bytes]) -> IO[bytes]:
    return io.BytesIO(read())


def _cell(path: Path, group: int, row: int, name: str) -> bytes:
    """The bytes of one picture; a row may name a file below the table's folder instead."""
    try:
        with _reading:
            column = _column(path, group, name)
        value = column[row].as_py()
    except UserError:
        raise
    except Exception as error:  # pyarrow has errors of its own, and KeyError, OSError, ...
        raise UserError(on_one_line(str(error), 200) or type(error).__name__) from None
    if isinstance(value, dict):
        if value.get("bytes") is None and isinstance(value.get("path"), str):
            return read_below(path.parent, value["path"])
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise UserError("the row has no picture")
    return value
