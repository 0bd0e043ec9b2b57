"""Tensors in a safetensors file, whose bytes are the same each time where others are to have it."""

import json
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fastpmae_loaders.errors import UserError


def save_file(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """A safetensors file. Raises OSError where it cannot be written, a full disk say, for which safetensors has an
    error of its own."""
    try:
        safetensors.torch.save_file(tensors, path, header)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def save_tensors(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """A safetensors file whose bytes depend on its contents alone.

    safetensors writes its header's entries in an order that differs from process to process: they are put in that of
    their names, in the room that they have.

    Raises:
        OSError: where it cannot be written.
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
