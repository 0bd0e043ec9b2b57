"""What a fine-tuning left, `classifier.safetensors`: its header may be a stranger's, and is believed in nothing."""

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import safetensors
import timm
from safetensors.torch import load_file
from torch import Tensor

from fastpmae.evaluate.recipe import FinetuneConfig
from fastpmae.model.build import Shape
from fastpmae.model.patches import IMAGENET_MEAN, IMAGENET_STD
from fastpmae.run.init_weights import header_of
from fastpmae.weights.foreign import PATCHES
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import short
from fastpmae_loaders.values import typed

NEEDED: dict[str, Any] = {
    "model_name": str, "img_size": int, "patch_size": int, "embed_dim": int, "depth": int, "num_heads": int,
    "mlp_ratio": float, "global_pool": Literal["token", "avg"], "num_classes": int,
}  # fmt: skip
"""Arguments for `timm.create_model` that every classifier names."""
POSSIBLE: dict[str, Any] = {
    "fc_norm": bool, "init_values": float, "qk_norm": bool, "no_embed_class": bool, "reg_tokens": int,
    "class_token": bool,
}  # fmt: skip
"""Those that some name."""


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned ViT.

    Attributes:
        tensors: under timm's names.
        arguments: for `timm.create_model`, each of its kind, and of the sizes that the tensors have.
        classes: what they are called; any text.
        mean, std: by which its images are normalised.
        crop_ratio: of whole images, as it was tested.
        finetune: the settings of its training that this version knows.
        backbone: what the training started from; any text.
    """

    tensors: dict[str, Tensor]
    arguments: dict[str, Any]
    shape: Shape
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float
    finetune: dict[str, Any]
    backbone: str


def read_tuned(path: Path) -> Tuned:
    """The classifier in a file of `fastpmae-eval finetune`.

    Raises:
        UserError: where its network is no plain ViT, the file cannot be read, or its header says what cannot be.
    """
    header = header_of(path)
    backbone = header.get("backbone", "")
    if "timm" not in header:
        raise UserError(f"{path} is tuned from {short(backbone)}, which is no plain ViT: it is not exported")
    try:
        arguments, classes, finetune = (json.loads(header[name]) for name in ("timm", "classes", "finetune"))
        normal = [json.loads(header[name]) for name in ("mean", "std") if name in header]
        # Files of earlier versions do not say it.
        crop_ratio = typed(json.loads(header.get("crop_ratio", "0.875")), float, "crop_ratio")
        _require(0.1 <= crop_ratio <= 1, f"crop_ratio is {crop_ratio}")
        tensors = load_file(path)
        mean, std = map(_three, normal) if len(normal) == 2 else (IMAGENET_MEAN, IMAGENET_STD)
        _require(min(std) > 0, "std is not above 0")
        arguments = _arguments(arguments)
        _check_sizes(arguments, tensors)
        classes = list(typed(classes, tuple[str, ...], "classes"))
        _require(len(classes) == arguments["num_classes"], f"num_classes is not the number of classes, {len(classes)}")
        finetune = _finetune_settings(finetune)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{path} is no fine-tuned ViT of fastpmae-eval") from None
    except UserError as error:
        raise UserError(f"{path} is no fine-tuned ViT of fastpmae-eval: {error}") from None
    shape = Shape(*(arguments[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")))
    return Tuned(tensors, arguments, shape, classes, mean, std, crop_ratio, finetune, backbone)


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise UserError(sentence)


def _arguments(said: Any) -> dict[str, Any]:
    _require(isinstance(said, dict), "its header names no arguments for timm")
    unknown = sorted(said.keys() - NEEDED.keys() - POSSIBLE.keys())
    _require(not unknown, f"timm has no such argument here: {short(unknown[0], 60)}" if unknown else "")
    missing = sorted(NEEDED.keys() - said.keys())
    _require(not missing, f"{', '.join(missing)} missing")
    kinds = NEEDED | POSSIBLE
    arguments = {name: typed(value, kinds[name], name, strict=True) for name, value in said.items()}
    name = arguments["model_name"]
    known = re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", name) is not None and timm.is_model(name)
    _require(known, f"timm has no model {short(name, 60)!r}")
    for key, value in arguments.items():
        _require(isinstance(value, str | bool) or (math.isfinite(value) and value > 0), f"{key} is {value}")
    return arguments


def _check_sizes(arguments: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The sizes that are said are those of the tensors."""
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    width, depth = arguments["embed_dim"], arguments["depth"]
    patch = arguments["patch_size"]
    sizes = {
        PATCHES: (width, 3, patch, patch),
        "head.weight": (arguments["num_classes"], width),
        "head.bias": (arguments["num_classes"],),
        "blocks.0.attn.qkv.weight": (3 * width, width),
        "blocks.0.mlp.fc1.weight": (round(arguments["mlp_ratio"] * width), width),
    }
    for name, size in sizes.items():
        _require(name in tensors, f"it has no {name}")
        found = tuple(tensors[name].shape)
        _require(found == size, f"its {name} is {found}, and its header says {size}")
    _require(len(blocks) == depth, f"it has {len(blocks)} blocks, and its header says {depth}")
    _require(width % arguments["num_heads"] == 0, f"{arguments['num_heads']} heads do not divide {width}")
    _require(arguments["img_size"] % patch == 0, f"img_size {arguments['img_size']} is no multiple of {patch}")


def _finetune_settings(said: Any) -> dict[str, Any]:
    """The settings that a `FinetuneConfig` has, each of its kind; what another version knew is left out."""
    _require(isinstance(said, dict), "its header names no settings of its training")
    kinds = get_type_hints(FinetuneConfig)
    names = [field.name for field in fields(FinetuneConfig) if field.name in said]
    return {name: typed(said[name], kinds[name], name) for name in names}


def _three(said: Any) -> tuple[float, float, float]:
    numbers = typed(said, tuple[float, float, float], "mean or std")
    _require(all(map(math.isfinite, numbers)), "mean or std is not finite")
    return numbers
