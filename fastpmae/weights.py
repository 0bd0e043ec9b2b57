"""Encoder weights by others or ourselves, as the start of a run: our checkpoints, timm's safetensors, MAE's .pth."""

from pathlib import Path

import safetensors
from torch import Tensor

from fastpmae.checkpoint import FORMAT, find_checkpoint
from fastpmae.errors import UserError
from fastpmae.layouts import read_foreign
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
        weights["pos_embed"] = fit_positions(weights["pos_embed"], own["pos_embed"].shape[1])
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
    """Tensors under timm's names from a checkpoint of ours, or from a file of others (see `read_foreign`)."""
    if path.is_dir() or is_ours(path):
        return find_checkpoint(path).part("student.encoder")
    return read_foreign(path).tensors


def is_ours(path: Path) -> bool:
    """Whether a file says that it is a checkpoint of ours."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (safetensors.SafetensorError, OSError):
        return False


def fit_positions(positions: Tensor, count: int) -> Tensor:
    """Positions [1, 1+N, D] for another number of patches, the class token's kept."""
    if positions.shape[1] == count:
        return positions
    from timm.layers import resample_abs_pos_embed

    side = round((count - 1) ** 0.5)
    return resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=1)
