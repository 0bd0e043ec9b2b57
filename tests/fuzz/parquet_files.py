"""Parquet files: sound ones of drawn tables, broken in the pages, their headers, the footer and its length."""

import io
import struct

import numpy as np
import pyarrow.parquet as pq

from tests.fuzz.table_data import table
from tests.fuzz.values import broken, choice, set_word


def parquet_file(rng: np.random.Generator) -> tuple[bytes, str]:
    """The bytes of one parquet file, and what was done to it."""
    compression = choice(rng, ("none", "none", "snappy", "gzip", "zstd", "brotli", "lz4"))
    version = choice(rng, ("1.0", "2.0"))
    dictionary = bool(rng.random() < 0.5)
    buffer = io.BytesIO()
    pq.write_table(
        table(rng, odd=False),
        buffer,
        compression=compression,
        data_page_version=version,
        use_dictionary=dictionary,
        row_group_size=int(choice(rng, (3, 1000))),
        data_page_size=int(choice(rng, (64, 1 << 20))),
        write_page_index=bool(rng.random() < 0.3),
        write_page_checksum=bool(rng.random() < 0.2),
        store_schema=bool(rng.random() < 0.7),
    )
    data = bytearray(buffer.getvalue())
    done = [compression, version, "dictionary" if dictionary else "plain"]
    done += [_break(rng, data) for _ in range(int(rng.choice([0, 1, 1, 1, 2, 2, 3, 5])))]
    if rng.random() < 0.1:
        changed, how = broken(rng, bytes(data))
        return changed, " ".join([*done, how])
    return bytes(data), " ".join(done)


def _break(rng: np.random.Generator, data: bytearray) -> str:
    """Thrift's compact numbers are single bytes with a high bit for more: they are changed as bytes, and as words."""
    (length,) = struct.unpack_from("<I", data, len(data) - 8)
    footer = max(4, len(data) - 8 - length)
    where = choice(rng, ("footer", "footer", "footer", "pages", "pages", "length"))
    if where == "length":
        return "length " + set_word(rng, data, len(data) - 8, len(data) - 4, 4)
    start, stop = (footer, len(data) - 8) if where == "footer" else (4, footer)
    if rng.random() < 0.6:
        at = start + int(rng.integers(max(1, stop - start)))
        value = int(choice(rng, (0, 1, 2, 0x7F, 0x80, 0x81, 0xFF, 0xFE, int(rng.integers(256)))))
        data[at : at + 1] = bytes([value])
        return f"{where} byte {value} at {at}"
    if rng.random() < 0.3:  # a number without end, or the largest
        at = start + int(rng.integers(max(1, stop - start)))
        data[at : at + 10] = choice(rng, (b"\xff" * 10, b"\xff" * 9 + b"\x01", b"\xfe\xff\xff\xff\x0f" + b"\x7f" * 5))
        return f"{where} number at {at}"
    return f"{where} " + set_word(rng, data, start, max(start + 1, stop))
