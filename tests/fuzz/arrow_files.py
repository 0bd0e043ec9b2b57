"""Arrow streams and files: sound ones of drawn tables, broken in messages' heads, buffers, order and footer."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from tests.fuzz.table_data import table
from tests.fuzz.values import broken, choice, set_word

_MAGIC = b"ARROW1\0\0"
Region = tuple[int, int]


def arrow_file(rng: np.random.Generator) -> tuple[bytes, str]:
    """The bytes of one arrow file, and what was done to it."""
    made = table(rng, odd=True)
    compression = choice(rng, (None, None, None, "lz4", "zstd"))
    as_file = bool(rng.random() < 0.4)
    buffer = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression, unify_dictionaries=as_file)
    with (pa.ipc.new_file if as_file else pa.ipc.new_stream)(buffer, made.schema, options=options) as writer:
        writer.write_table(made, max_chunksize=int(choice(rng, (5, 1000))))
    content = buffer.getvalue()
    heads, bodies = _messages(content, len(_MAGIC) if as_file else 0)
    data, done = bytearray(content), ["file" if as_file else "stream", str(compression)]
    deep = bool(rng.random() < 0.4)  # heads that verify, so that what they describe is looked at
    done += [
        _break(rng, data, [] if deep else heads, bodies, as_file)
        for _ in range(int(rng.choice([0, 1, 1, 1, 2, 2, 3, 5])))
    ]
    if rng.random() < 0.15 and not deep:
        moved = _reordered(rng, bytes(data), heads, bodies)
        data, done = bytearray(moved), [*done, "messages moved"]
    if rng.random() < 0.1 and not deep:
        changed, how = broken(rng, bytes(data))
        return changed, " ".join([*done, how])
    return bytes(data), " ".join(done)


def _messages(content: bytes, start: int) -> tuple[list[Region], list[Region]]:
    """Where the heads (with their lengths before them) and the bodies of a stream's messages lie."""
    heads, bodies, at = [], [], start
    reader = pa.ipc.MessageReader.open_stream(pa.BufferReader(content[start:]))
    while True:
        try:
            message: Any = reader.read_next_message()
        except StopIteration:
            return heads, bodies
        head = 8 + -(-message.metadata.size // 8) * 8
        body = 0 if message.body is None else message.body.size
        heads.append((at, at + head))
        bodies.append((at + head, at + head + body))
        at += head + body


def _break(rng: np.random.Generator, data: bytearray, heads: list[Region], bodies: list[Region], footer: bool) -> str:
    where = choice(rng, ("head", "head", "body", "body", "body", "length", "footer" if footer else "head"))
    where = where if heads else "body"
    if where == "footer":
        return "footer " + set_word(rng, data, bodies[-1][1], len(data), 4)
    full = [region for region in bodies if region[1] > region[0]] or bodies
    start, stop = choice(rng, full if where == "body" else heads)
    if where == "length":
        return "length " + set_word(rng, data, start, start + 8, 4)
    if where == "body" and stop > start and rng.random() < 0.2:
        size = min(stop - start, int(choice(rng, (8, 64, 512))))
        data[start : start + size] = bytes([int(choice(rng, (0, 255)))]) * size
        return f"body filled at {start}"
    return f"{where} " + set_word(rng, data, start, max(start + 1, stop), 4)


def _reordered(rng: np.random.Generator, content: bytes, heads: list[Region], bodies: list[Region]) -> bytes:
    """Messages left out, doubled or in another order."""
    parts = [content[head[0] : body[1]] for head, body in zip(heads, bodies, strict=True)]
    end = content[bodies[-1][1] :]
    how, place = choice(rng, ("drop", "double", "shuffle")), int(rng.integers(len(parts)))
    if how == "drop":
        del parts[place]
    elif how == "double":
        parts.insert(place, parts[place])
    else:
        parts = [parts[int(place)] for place in rng.permutation(len(parts))]
    return content[: heads[0][0]] + b"".join(parts) + end
