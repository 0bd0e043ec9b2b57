"""Tensors in a safetensors file whose bytes are the same each time."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fastpmae.errors import UserError


def save_tensors(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """A safetensors file whose bytes depend on its contents alone.

    safetensors writes its header's entries in an order that differs from process to process: they are put in that of
    their names, in the room that they have.
    """
    save_file(tensors, path, header)
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
        told = {"__metadata__": dict(sorted(entries.pop("__metadata__", {}).items())), **dict(sorted(entries.items()))}
        words = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
        if len(words) > size:
            raise UserError(f"{path} cannot be written: its header takes {len(words)} bytes instead of {size}")
        file.seek(8)
        file.write(words.ljust(size))
