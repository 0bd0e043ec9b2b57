"""Checkpoints of other projects: recognised by the names of their tensors, and brought to timm's names.

MAE, SdAE, DINO, iBOT, MoCo v3 and BEiT share timm's names for the encoder itself. They differ in what it is wrapped
in: dictionaries of networks, prefixes, and layers that pretraining needed.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastpmae.errors import UserError

Layout = Literal["MAE", "SdAE", "DINO", "iBOT", "MoCo v3", "BEiT", "plain ViT"]

PATCHES = "patch_embed.proj.weight"
"""Every ViT has it: what stands before it in a name is the encoder's prefix."""
DROPPED = ("head", "lm_head", "mask_token", "masked_embed", "decoder", "projector", "predictor", "cls_pt_layers")
"""Beginnings of names that are no part of the encoder."""


@dataclass(frozen=True)
class Foreign:
    """An encoder's tensors under timm's names, and whose layout they came in."""

    tensors: dict[str, Tensor]
    layout: Layout
    choice: str
    """Which of the file's networks it is, in the file's own words; empty where there is one."""


def read_foreign(path: Path, teacher: bool | None = None) -> Foreign:
    """The encoder in a safetensors file or in a .pth of plain tensors, whatever it is wrapped in.

    Args:
        teacher: whether to take the teacher (or momentum encoder) where the file holds two networks; None takes the
            one that the project itself evaluates.

    Raises:
        UserError: when the file cannot be read, or holds no plain ViT.
    """
    return unwrapped(read_tensors(path), teacher, str(path))


def read_tensors(path: Path) -> Mapping[str, Any]:
    """What a file holds: tensors by name, perhaps in dictionaries. Nothing in it is ever executed.

    Raises:
        UserError: when it is neither safetensors nor a .pth of plain values.
    """
    try:
        return load_file(path)
    except safetensors.SafetensorError:
        pass
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    try:
        # weights_only: a file from a stranger may hold tensors and plain values and nothing that runs. The options
        # of a command line, which MAE and DINO save beside their weights, are plain values in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch's own words advise to load the file with less care
        raise UserError(f"{path} is neither safetensors nor a .pth of plain tensors") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds no tensors by name")
    return loaded


def unwrapped(loaded: Mapping[str, Any], teacher: bool | None, name: str) -> Foreign:
    """The encoder in what a file holds (see `read_foreign`); `name` is the file's, for messages."""
    tensors, choice, layout = _network(loaded, teacher)
    named = {key: value for key, value in tensors.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not named:
        raise UserError(f"{name} holds no tensors by name")
    prefixes = sorted(key[: -len(PATCHES)] for key in named if key.endswith(PATCHES))
    if not prefixes:
        raise UserError(f"{name} holds no plain ViT: none of its {len(named)} tensors is called {PATCHES}")
    prefix = prefixes[0]
    if any("base_encoder." in other for other in prefixes):
        layout, wanted = "MoCo v3", "momentum_encoder." if teacher else "base_encoder."
        prefix = next((other for other in prefixes if wanted in other), prefix)
        choice = prefix.removeprefix("module.").rstrip(".")
    encoder = {
        key.removeprefix(prefix): value
        for key, value in named.items()
        if key.startswith(prefix) and not key.removeprefix(prefix).startswith(DROPPED)
    }
    layout = layout or _layout_of(named, prefix)
    if layout == "BEiT":
        encoder = _separate_biases(encoder)
    return Foreign(encoder, layout, choice)


def _network(loaded: Mapping[str, Any], teacher: bool | None) -> tuple[Mapping[str, Any], str, Layout | None]:
    """The dictionary of the network that is asked for, its name in the file, and the layout if that tells it."""
    held = {key for key, value in loaded.items() if isinstance(value, Mapping)}
    if {"model", "model_teacher"} <= held:
        key = "model_teacher" if teacher else "model"
        return loaded[key], key, "SdAE"
    if {"student", "teacher"} <= held:
        # DINO and iBOT report their teachers.
        key = "student" if teacher is False else "teacher"
        return loaded[key], key, None
    for key in ("model", "state_dict", "teacher", "student", "module"):
        if key in held:
            return loaded[key], key if key in ("teacher", "student") else "", None
    return loaded, "", None


def _layout_of(named: Mapping[str, Tensor], prefix: str) -> Layout:
    if any(key.endswith("relative_position_bias_table") for key in named):
        return "BEiT"
    if prefix + "masked_embed" in named:
        return "iBOT"
    if "decoder_embed.weight" in named:
        predicted, width = named.get("decoder_pred.weight"), named[prefix + PATCHES].shape[0]
        return "SdAE" if predicted is not None and len(predicted) == width else "MAE"
    if any("head.last_layer" in key or "head.mlp.0" in key for key in named):
        return "DINO"
    return "plain ViT"


def _separate_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """BEiT's pretraining shares one table of position biases; its fine-tuning and timm give each block its own."""
    shared = tensors.get("rel_pos_bias.relative_position_bias_table")
    kept = {key: value for key, value in tensors.items() if "rel_pos_bias." not in key and "position_index" not in key}
    if shared is not None:
        blocks = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
        kept |= {f"blocks.{number}.attn.relative_position_bias_table": shared.clone() for number in blocks}
    return kept
