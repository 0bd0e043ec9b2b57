"""Checkpoints of other projects: recognised by the names of their tensors, and brought to timm's names.

MAE, SdAE, DINO, iBOT, MoCo v3 and BEiT share timm's names for the encoder itself. They differ in what it is wrapped
in: dictionaries of networks, prefixes, and layers that pretraining needed.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastpmae.weights.file_kind import is_safetensors, other_file, unsound
from fastpmae.weights.pickle_machine import CutOffError, PickleError, StandIn, Stored
from fastpmae.weights.torch_pickle import held_by_name, read_pickled
from fastpmae.weights.transformers import joined, known_other, project_of, timm_name
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import on_one_line, printable, short
from fastpmae_loaders.values import local_path

Layout = Literal["MAE", "SdAE", "DINO", "iBOT", "MoCo v3", "BEiT", "SimMIM", "transformers", "torchvision", "plain ViT"]

PATCHES = "patch_embed.proj.weight"
"""Every ViT has it: what stands before it in a name is the encoder's prefix."""
DROPPED = ("head", "lm_head", "mask_token", "masked_embed", "decoder", "projector", "predictor", "cls_pt_layers")
"""Beginnings of names that are no part of the encoder."""
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip
"""Numbers that weights are."""


@dataclass(frozen=True)
class Foreign:
    """An encoder's tensors under timm's names, and whose layout they came in."""

    tensors: dict[str, Tensor]
    layout: Layout
    choice: str
    """Which of the file's networks it is, in the file's own words; empty where there is one."""


def read_foreign(path: Path, teacher: bool | None = None) -> Foreign:
    """The encoder in a safetensors file or in a .pth, whatever it is wrapped in.

    Args:
        teacher: whether to take the teacher (or momentum encoder) where the file holds two networks; None takes the
            one that the project itself evaluates.

    Raises:
        UserError: when the file cannot be read, or holds no plain ViT.
    """
    return unwrapped(read_tensors(path), teacher, str(path), 4 * path.stat().st_size + 2**26)


def read_tensors(path: Path) -> Mapping[str, Any]:
    """What a file holds: tensors by name, perhaps in dictionaries. Nothing in it is ever executed.

    A .pth's are `Stored`: only those that are wanted are read from it.

    Raises:
        UserError: when it is neither safetensors nor a .pth of torch.save.
    """
    path = local_path(path)
    name = printable(str(path))
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{name} is {'a folder' if path.is_dir() else 'no regular file'}: name a file of weights")
        with path.open("rb") as file:
            beginning, size = file.read(512), os.fstat(file.fileno()).st_size
        odd = other_file(beginning, size)
        if odd:
            raise UserError(f"{name} {odd}")
        if is_safetensors(beginning):
            return load_file(path)
        return held_by_name(read_pickled(path))
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None
    except CutOffError as error:
        raise UserError(f"{name} is incomplete ({on_one_line(str(error))}): fetch or copy it again") from None
    except PickleError as error:
        words = on_one_line(str(error))
        raise UserError(f"{name} is neither safetensors nor a .pth of plain tensors: {words}") from None
    except (safetensors.SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        # the last ones where torch has no such type or size
        raise UserError(f"{name} {unsound(path, beginning, str(error))}") from None


def unwrapped(loaded: Mapping[str, Any], teacher: bool | None, name: str, most: int = 2**40) -> Foreign:
    """The encoder in what a file holds (see `read_foreign`).

    Args:
        name: the file's, for messages.
        most: bytes that its tensors may take; a small file can speak of large ones.
    """
    name = printable(name)
    tensors, choice, layout = _network(loaded, teacher)
    named = {key: value for key, value in tensors.items() if isinstance(key, str) and _is_tensor(value)}
    if not named:
        raise UserError(f"{name} holds no tensors by name")
    prefixes = sorted(key[: -len(PATCHES)] for key in named if key.endswith(PATCHES))
    other = None if prefixes else project_of(named)
    if other is not None:
        layout, prefix = other
        renamed = {timm_name(key.removeprefix(prefix), layout): named[key] for key in named if key.startswith(prefix)}
        encoder = joined(_loaded({key: value for key, value in renamed.items() if key is not None}, name, most))
        return Foreign(encoder, layout, choice)
    if not prefixes:
        raise UserError(
            f"{name} holds no plain ViT{known_other(named)}: none of its {len(named)} tensors is called {PATCHES}"
        )
    prefix, found = _prefix(prefixes, teacher)
    # some have a patch embedding too
    if words := known_other([key for key in named if key.startswith(prefix)]):
        raise UserError(f"{name} holds no plain ViT{words}")
    choice = found or choice
    if any("base_encoder." in other for other in prefixes):
        layout = "MoCo v3"
    encoder = {
        _unchunked(key.removeprefix(prefix)): value
        for key, value in named.items()
        if key.startswith(prefix)
        and not key.removeprefix(prefix).startswith(DROPPED)
        and not key.endswith("relative_position_index")
    }
    layout = layout or _layout_of(named, prefix)
    encoder = _loaded(encoder, name, most)
    if layout in ("BEiT", "SimMIM"):
        encoder = _separate_biases(encoder)
    return Foreign(_with_dinov2_registers(encoder), layout, choice)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor | Stored) or (isinstance(value, StandIn) and value.kind.startswith("a "))


def check_real(key: str, tensor: Tensor | Stored, name: str) -> None:
    """Raise UserError, with the file's `name`, where a tensor is of a type that no weights are."""
    if tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{name}: {short(key)} holds {kind}, and weights are real numbers")


def _loaded(encoder: Mapping[str, Any], name: str, most: int) -> dict[str, Tensor]:
    """The tensors themselves, in memory of their own. Raises UserError for one that is no matrix of finite numbers."""
    for key, value in encoder.items():
        if isinstance(value, StandIn):
            raise UserError(f"{name}: {short(key)} is {value.kind}, and weights are plain tensors")
        check_real(key, value, name)
    if sum(value.nbytes for value in encoder.values()) > most:
        raise UserError(f"{name}: its tensors are {most:,} bytes or more, which are not in it")
    tensors = {}
    for key, value in encoder.items():
        try:
            tensor = value.load() if isinstance(value, Stored) else value
        except (PickleError, OSError) as error:
            raise UserError(f"{name} cannot be read: {on_one_line(str(error))}") from None
        tensors[key] = tensor.float() if tensor.dtype.itemsize == 1 else tensor
        if not bool(torch.isfinite(tensors[key]).all()):
            raise UserError(f"{name}: {short(key)} holds numbers that are not finite")
    return tensors


def _prefix(prefixes: list[str], teacher: bool | None) -> tuple[str, str]:
    """What stands before the names of the network that is asked for, and what that is called where there are two."""
    led = [prefix for prefix in prefixes if any(word in prefix for word in ("teacher", "momentum"))]
    own = [prefix for prefix in prefixes if prefix not in led]
    if not led or not own:
        return prefixes[0], ""
    # Who has a student evaluates its teacher; a momentum encoder serves the training of the other.
    wanted = any("student" in prefix for prefix in own) if teacher is None else teacher
    prefix = (led if wanted else own)[0]
    return prefix, prefix.removeprefix("module.").rstrip(".")


def _unchunked(name: str) -> str:
    """DINOv2 trains its blocks in chunks: `blocks.1.7.` is block 7."""
    return re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", name)


def _with_dinov2_registers(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's registers have no positions, and its class token has: as timm keeps both, added up."""
    registers, positions, token = (encoder.get(name) for name in ("register_tokens", "pos_embed", "cls_token"))
    if registers is None or positions is None or token is None:
        return encoder
    if (
        {registers.ndim, positions.ndim, token.ndim} != {3}
        or positions.shape[1] < 2
        or token.shape != positions[:, :1].shape
    ):
        return encoder
    rest = {name: tensor for name, tensor in encoder.items() if name != "register_tokens"}
    return rest | {"reg_token": registers, "cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:]}


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


def _layout_of(named: Mapping[str, Any], prefix: str) -> Layout:
    if any(key.endswith("relative_position_bias_table") for key in named):
        # SimMIM's ViT is BEiT's, with one convolution as decoder and ImageNet's own normalisation.
        return "SimMIM" if prefix.endswith("encoder.") and "decoder.0.weight" in named else "BEiT"
    if prefix + "masked_embed" in named:
        return "iBOT"
    if "decoder_embed.weight" in named:
        predicted, patches = named.get("decoder_pred.weight"), named[prefix + PATCHES]
        return "SdAE" if predicted is not None and predicted.shape[:1] == patches.shape[:1] else "MAE"
    if any("head.last_layer" in key or "head.mlp.0" in key for key in named):
        return "DINO"
    return "plain ViT"


def _separate_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """BEiT's pretraining shares one table of position biases; its fine-tuning and timm give each block its own."""
    shared = tensors.get("rel_pos_bias.relative_position_bias_table")
    kept = {key: value for key, value in tensors.items() if "rel_pos_bias." not in key}
    if shared is not None:
        blocks = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
        kept |= {f"blocks.{number}.attn.relative_position_bias_table": shared for number in blocks}
    return kept
