"""Encoder weights by others or ourselves, as the start of a run: our checkpoints, timm's safetensors, MAE's .pth."""

import json
import math
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from fastpmae.model.vit import Encoder
from fastpmae.renamed import refuse_old_classifier
from fastpmae.run.checkpoint import FORMAT, CheckpointError, checkpoints_in, find_checkpoint, read_progress
from fastpmae.run.shards import is_sharded
from fastpmae.run.stored_run import EXPORTED, TUNED
from fastpmae.weights.foreign import PATCHES, check_real, read_foreign
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import short


def start_encoder(encoder: Encoder, path: Path) -> None:
    """Start an encoder from weights by others or ourselves.

    What has no place in a plain encoder (MAE's decoder, a classifier) is left out. Positions of another grid are
    interpolated.

    Raises:
        UserError: when the file cannot be read, or the weights are of another size or architecture.
    """
    path = weights_file(path)
    weights = encoder_weights(path)
    own = encoder.state_dict()
    missing = [name for name in own if name not in weights and name != "pos_embed"]
    if missing:
        raise UserError(f"--init {path} lacks {len(missing)} of the encoder's weights, {missing[0]} among them")
    left = sorted(weights.keys() - own.keys())
    if left:
        # LayerScale, say: without it the same weights are another network.
        raise UserError(f"--init {path} is no plain ViT: there is no place in one for {few(left)}")
    if "pos_embed" in weights:
        try:
            weights["pos_embed"] = with_class_position(weights["pos_embed"])
        except UserError as error:
            raise UserError(f"--init {path}: {error}") from None
        if weights["pos_embed"].shape[::2] == own["pos_embed"].shape[::2]:
            weights["pos_embed"] = fit_positions(weights["pos_embed"], own["pos_embed"].shape[1])
    for name, tensor in own.items():
        if name in weights and weights[name].shape != tensor.shape:
            raise UserError(
                f"--init {path} is of another size: {name} is {tuple(weights[name].shape)}, "
                f"this model's {tuple(tensor.shape)}"
            )
    encoder.load_state_dict({name: weights.get(name, tensor) for name, tensor in own.items()})


def encoder_weights(path: Path) -> dict[str, Tensor]:
    """Tensors under timm's names from a checkpoint of ours, or from a file of others (see `read_foreign`)."""
    tuned = tuned_weights(path)
    if tuned is not None:
        return read_foreign(tuned).tensors
    if path.is_dir() or is_ours(path):
        checkpoint = find_checkpoint(path)
        found = checkpoint.part("student.encoder")
        for key, tensor in found.items():
            check_real(f"student.encoder.{key}", tensor, str(checkpoint.path))
        return found
    return read_foreign(path).tensors


def weights_file(path: Path) -> Path:
    """The weights in an exported folder, ours or transformers'; any other path as it is."""
    if not path.is_dir() or (path / "checkpoints").is_dir() or any((path / name).exists() for name in TUNED.values()):
        return path
    return next((path / name for name in EXPORTED if (path / name).is_file()), path)


def is_ours(path: Path) -> bool:
    """Whether a file says that it is a checkpoint of ours."""
    return header_of(path).get("format") == FORMAT


def header_of(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says; nothing where it is none."""
    if not path.is_file():  # a pipe would be waited for
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        return {}


def tuned_weights(path: Path) -> Path | None:
    """The network that a fine-tuning, a segmentation or a detection left, named by its folder or itself; None where the
    path is something else.

    Raises:
        UserError: when the training has not ended, it was a linear probe, which holds no network, or an earlier version
            wrote it.
    """
    left = (path / name for name in TUNED.values())
    file = next((each for each in left if each.exists()), path) if path.is_dir() else path
    header = header_of(file)
    if file.name == "classifier.safetensors":
        refuse_old_classifier(header, str(file))
    if any(file.name == name and kind in header for kind, name in TUNED.items()):
        with safetensors.safe_open(file, "pt") as held:
            if not any(key.endswith(PATCHES) for key in held.keys()):  # noqa: SIM118
                raise UserError(
                    f"{file} is a linear probe: the network that it reads is {short(header.get('backbone', ''))}"
                )
        return file
    checkpoint = path if is_ours(path) or is_sharded(path) else next(iter(checkpoints_in(path)), None)
    try:
        config = {} if checkpoint is None else read_progress(checkpoint)["config"]
    except CheckpointError:  # whoever reads it says so, or passes it over
        return None
    refuse_old_classifier(config, str(checkpoint))
    kind = next((kind for kind in TUNED if kind in config), None)
    if kind is None:
        return None
    trained = TUNED[kind].removesuffix(".safetensors")
    raise UserError(
        f"{path} is a {trained}'s training that has left no {TUNED[kind]} yet: end it with --resume"
        if path.is_dir()
        else f"{path} is the state of a {trained}'s training: name its folder, {path.parent.parent}"
    )


def check_pretrained(path: Path) -> None:
    """Raise UserError where a path is what `fastpmae-eval` has trained, and no pretraining run."""
    tuned = tuned_weights(path)
    if tuned is not None:
        kind = next(kind for kind, name in TUNED.items() if name == tuned.name)
        raise UserError(
            f"{path} is what fastpmae-eval {kind} left, and no pretraining run: its figures and pictures lie in its "
            f"folder, as {kind}-*"
        )


def timm_arguments_in(header: dict[str, str]) -> dict[str, object]:
    """timm's arguments in the header of a file of ours; nothing where there are none."""
    try:
        found = json.loads(header.get("timm", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def position_prefix(positions: Tensor, tokens: int = 1) -> int:
    """How many of the positions [1, P, D] are no patch's: all of the class token and registers have one, or none.

    Raises:
        UserError: when the others make no square.
    """
    for prefix in (0, tokens):
        count = positions.shape[1] - prefix if positions.ndim == 3 else 0
        if count > 0 and math.isqrt(count) ** 2 == count:
            return prefix
    raise UserError(f"positions of the shape {tuple(positions.shape)} make no square of patches")


def fit_positions(positions: Tensor, count: int, prefix: int = 1) -> Tensor:
    """Positions [1, prefix+N, D] for another number of patches, those of the class token (and registers) kept."""
    if positions.shape[1] == count:
        return positions
    from timm.layers import resample_abs_pos_embed

    side = round((count - prefix) ** 0.5)
    return resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=prefix)


def with_class_position(positions: Tensor) -> Tensor:
    """Positions with one for the class token: 0 where the network adds none to it (DeiT III). Raises UserError as
    `position_prefix` does."""
    if position_prefix(positions):
        return positions
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)


def few(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    first = short(names[0])
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"
