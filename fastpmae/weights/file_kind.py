"""What a file is that should be weights and is none: told by its first bytes and its size."""

import json
import re
import struct
from pathlib import Path

from fastpmae_loaders.printable import on_one_line

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""


def other_file(beginning: bytes, size: int) -> str:
    """What is wrong with a file that begins like this, in words that follow its name; empty where nothing is known."""
    start = beginning.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower()
    if size == 0:
        return "is empty, so neither safetensors nor a .pth of plain tensors: fetch or write it anew"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script")):
        return "is a web page and holds no weights: its link led to a page, so download the file that the page links to"
    if beginning.startswith(b"version https://git-lfs"):
        told = re.search(rb"\nsize (\d{1,18})\r?\n", beginning)
        what = f"a file of {int(told[1]):,} bytes" if told else "the file"
        return f"is a pointer of Git LFS to {what} that is not there yet: `git lfs pull` fetches it"
    return ""


def is_safetensors(beginning: bytes) -> bool:
    """Whether a file begins as safetensors do: with the length of a header, and the header, which is JSON."""
    length = struct.unpack("<Q", beginning[:8])[0] if len(beginning) >= 8 else 0
    return beginning[8:9] == b"{" and 2 <= length <= LONGEST_HEADER


def unsound(path: Path, beginning: bytes, error: str) -> str:
    """Why safetensors refuse a file that begins as theirs do, in words that follow its name."""
    length, size = struct.unpack("<Q", beginning[:8])[0], path.stat().st_size
    wanted = 8 + length
    if wanted <= size:
        try:
            with path.open("rb") as file:
                file.seek(8)
                header = json.loads(file.read(length))
            wanted += max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OSError):
            wanted = 0
    if isinstance(wanted, int) and size < wanted < 2**63:
        return f"is incomplete: it has {size:,} bytes of {wanted:,}; fetch or copy it again"
    return f"is damaged: {on_one_line(error)}"
