"""Tables of many types, sound by themselves, that arrow and parquet files are made of before they are broken."""

import json
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from tests.fuzz.values import choice, some_images

_KIND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_ROWS = 12
_PATHS = (
    "beside.jpg", "../secret.jpg", "/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/self/environ", "",
    ".", "a\0b", "x" * 5000, "../" * 200, "\x1b[31m", "~", "file:///etc/passwd", "hf://a/b", "0.arrow", "0.parquet",
)  # fmt: skip
_NAMES = ("image", "label", "\x1b[31mred", "", "a\nb", "image", "bytes", "x" * 3000, "日本", "image.bytes", "path")
_DEEP = "[" * 3000 + "]" * 3000
_METADATA = (
    None, b"", b"{", b"\xff\xfe", b"null", b"[]", b'{"info": []}', b'{"info": {"features": [1, 2]}}', _DEEP.encode(),
    json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a"]}}}}),
    json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": [{"a": 1}, None, "\x1b[1m\ud800"]}}}}),
    json.dumps({"info": {"features": {"label": {"_type": "Image"}, "image": {"_type": "ClassLabel", "names": 3}}}}),
    json.dumps({"info": {"features": {"none": {"_type": "Image"}, "label": {"_type": ["ClassLabel"]}}}}),
)  # fmt: skip
_EXTENSIONS = (
    {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": b"\x80\x04N."},
    {b"ARROW:extension:name": b"arrow.fixed_shape_tensor", b"ARROW:extension:metadata": b'{"shape": [1000000000]}'},
    {b"ARROW:extension:name": b"arrow.uuid"}, {b"ARROW:extension:name": b"arrow.json"},
    {b"ARROW:extension:name": b"\xff", b"ARROW:extension:metadata": b"\0" * 5000},
)  # fmt: skip


@cache
def image_columns() -> list[Any]:
    """Columns that an image may be in, and some in which none can be."""
    images = [some_images(200)[place % 6] for place in range(_ROWS)]
    paths = [_PATHS[place % len(_PATHS)] for place in range(_ROWS)]
    both = [{"bytes": image, "path": path} for image, path in zip(images, paths, strict=True)]
    return [
        pa.array(images, pa.binary()),
        pa.array(images, pa.large_binary()),
        pa.array([*images[:5], None, *images[6:]], pa.binary()),
        pa.array(both, _KIND),
        pa.array([{"bytes": None, "path": path} for path in paths], _KIND),
        pa.array([{"bytes": None, "path": path} for path in _PATHS[-_ROWS:]], _KIND),
        pa.array([None, *both[1:]], _KIND),
        pa.array(images, pa.binary()).dictionary_encode(),
        pa.array([[image] for image in images], pa.list_(pa.binary())),
        pa.array([{"bytes": [1, 2], "path": 3}] * _ROWS),
        pa.array([b"0123456789abcdef"] * _ROWS, pa.binary(16)),
        pa.array(paths),
        pa.nulls(_ROWS),
        pa.array([{"bytes": {"bytes": image}} for image in images]),
        pa.chunked_array([pa.array(some, pa.binary()) for some in (images[:7], [], images[7:])]),
    ]  # fmt: skip


@cache
def label_columns() -> list[Any]:
    """Columns that a label may be in, and some in which none can be."""
    words = ["cat", "dog", None, "\x1b[31m", "", "d\u00f6g", "a\nb", "\u202e"]
    some = [words[place % 8] for place in range(_ROWS)]
    return [
        pa.array([place % 4 for place in range(_ROWS)]),
        pa.array([place % 4 for place in range(_ROWS)], pa.int8()),
        pa.array([2**64 - 1 - place for place in range(_ROWS)], pa.uint64()),
        pa.array([-(2**63), None] * (_ROWS // 2)),
        pa.array(some),
        pa.array(some, pa.large_string()),
        pa.array(some).dictionary_encode(),
        pa.array([7, None, 9] * (_ROWS // 3)).dictionary_encode(),
        pa.array([True, None, False] * (_ROWS // 3)),
        pa.array([1.5, float("nan"), None] * (_ROWS // 3)),
        pa.array([[1], [], None] * (_ROWS // 3)),
        pa.array([[("a", 1)], [], None] * (_ROWS // 3), pa.map_(pa.string(), pa.int32())),
        pa.nulls(_ROWS),
        pa.array([0] * _ROWS, pa.timestamp("ns")),
        pa.array([str(place) for place in range(_ROWS)]).cast(pa.decimal128(9, 2)),
        pa.array(["a" * 5000] * _ROWS),
    ]  # fmt: skip


@cache
def odd_columns() -> list[Any]:
    """Columns of types that parquet does not know."""
    images = [some_images(200)[place % 6] for place in range(_ROWS)]
    return [
        pa.RunEndEncodedArray.from_arrays(pa.array([5, _ROWS], pa.int32()), pa.array([3, 4])),
        pa.array(["cat"] * _ROWS, pa.string_view()),
        pa.array(images, pa.binary_view()),
        pa.UnionArray.from_dense(
            pa.array([0, 1] * (_ROWS // 2), pa.int8()),
            pa.array([place // 2 for place in range(_ROWS)], pa.int32()),
            [pa.array(images[: _ROWS // 2], pa.binary()), pa.array(range(_ROWS // 2))],
        ),
        pa.array([[1, 2]] * _ROWS, pa.list_view(pa.int32())),
    ]


def table(rng: np.random.Generator, *, odd: bool) -> Any:
    """A sound table, mostly of an image and a label. `odd`: of any type that arrow has."""
    columns, names = [choice(rng, image_columns())], ["image"]
    if rng.random() < 0.85:
        columns.append(choice(rng, label_columns()))
        names.append("label")
    if rng.random() < 0.25:
        columns.append(choice(rng, [*image_columns(), *label_columns(), *(odd_columns() if odd else [])]))
        names.append(choice(rng, _NAMES))
    if odd and rng.random() < 0.15:
        columns[int(rng.integers(len(columns)))] = choice(rng, odd_columns())
    fields = [pa.field(name, column.type) for name, column in zip(names, columns, strict=True)]
    if odd and rng.random() < 0.1:
        place = int(rng.integers(len(fields)))
        fields[place] = fields[place].with_metadata(choice(rng, _EXTENSIONS))
    metadata = choice(rng, _METADATA) if rng.random() < 0.4 else None
    schema = pa.schema(fields, None if metadata is None else {"huggingface": metadata})
    made = pa.table(columns, schema=schema)
    return made.slice(int(rng.integers(_ROWS)), int(rng.integers(_ROWS))) if rng.random() < 0.1 else made
