"""Encoder weights by others or ourselves: our checkpoints, timm's safetensors, MAE's .pth."""

from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastpmae.checkpoint import FORMAT, find_checkpoint
from fastpmae.errors import UserError
from fastpmae.model import Encoder


def start_encoder(encoder: Encoder, path: Path) -> None:
    """Start an encoder from weights by others or ourselves.

    What has no place in a plain encoder (MAE's decoder, a classifier) is left out. Positions of another grid are
    interpolated.

    Raises:
        UserError: when the file cannot be read, or the weights are of another size or architecture.
    """
    weights = encoder_weights(path)
    own = encoder.state_dict()
    if "pos_embed" in weights and weights["pos_embed"].ndim == 3:
        weights["pos_embed"] = _fit_positions(weights["pos_embed"], own["pos_embed"].shape[1])
    missing = [name for name in own if name not in weights and name != "pos_embed"]
    if missing:
        raise UserError(f"--init {path} lacks {len(missing)} of the encoder's weights, {missing[0]} among them")
    for name, tensor in own.items():
        if name in weights and weights[name].shape != tensor.shape:
            raise UserError(
                f"--init {path} is of another size: {name} is {tuple(weights[name].shape)}, "
                f"this model's {tuple(tensor.shape)}"
            )
    encoder.load_state_dict({name: weights.get(name, tensor) for name, tensor in own.items()})


def encoder_weights(path: Path) -> dict[str, Tensor]:
    """Tensors under timm's names from a checkpoint of ours, a safetensors file or a .pth of plain tensors."""
    if path.is_dir():
        return find_checkpoint(path).part("student.encoder")
    if not path.exists():
        raise UserError(f"--init {path}: there is no such file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            ours = (file.metadata() or {}).get("format") == FORMAT
    except safetensors.SafetensorError:
        return _pickled_tensors(path)
    except OSError as error:
        raise UserError(f"--init {path} cannot be read: {error}") from None
    return find_checkpoint(path).part("student.encoder") if ours else load_file(path)


def _pickled_tensors(path: Path) -> dict[str, Tensor]:
    try:
        # weights_only: a file from a stranger may hold tensors and plain values and nothing that runs.
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch's own words advise to load the file with less care
        raise UserError(f"--init {path} is neither safetensors nor a .pth of plain tensors") from None
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    tensors = {name: t for name, t in loaded.items() if isinstance(t, Tensor)} if isinstance(loaded, dict) else {}
    if not tensors:
        raise UserError(f"--init {path} holds no tensors by name")
    return tensors


def _fit_positions(positions: Tensor, count: int) -> Tensor:
    """Positions [1, 1+N, D] for another number of patches, the class token's kept."""
    if positions.shape[1] == count:
        return positions
    from timm.layers import resample_abs_pos_embed

    side = round((count - 1) ** 0.5)
    return resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=1)
