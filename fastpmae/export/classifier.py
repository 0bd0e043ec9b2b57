"""What a fine-tuning left, `classifier.safetensors`: its header may be a stranger's, and is believed in nothing."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from fastpmae.evaluate.recipe import FinetuneConfig
from fastpmae.evaluate.vit_arguments import checked_arguments, require, three_numbers
from fastpmae.model.build import Shape
from fastpmae.model.patches import IMAGENET_MEAN, IMAGENET_STD
from fastpmae.run.init_weights import header_of
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import short
from fastpmae_loaders.values import typed


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
        require(0.1 <= crop_ratio <= 1, f"crop_ratio is {crop_ratio}")
        tensors = load_file(path)
        mean, std = map(three_numbers, normal) if len(normal) == 2 else (IMAGENET_MEAN, IMAGENET_STD)
        require(min(std) > 0, "std is not above 0")
        arguments = checked_arguments(arguments, tensors)
        require(arguments["num_classes"] > 0, "num_classes is 0")
        classes = list(typed(classes, tuple[str, ...], "classes"))
        require(len(classes) == arguments["num_classes"], f"num_classes is not the number of classes, {len(classes)}")
        finetune = _finetune_settings(finetune)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{path} is no fine-tuned ViT of fastpmae-eval") from None
    except UserError as error:
        raise UserError(f"{path} is no fine-tuned ViT of fastpmae-eval: {error}") from None
    shape = Shape(*(arguments[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")))
    return Tuned(tensors, arguments, shape, classes, mean, std, crop_ratio, finetune, backbone)


def _finetune_settings(said: Any) -> dict[str, Any]:
    """The settings that a `FinetuneConfig` has, each of its kind; what another version knew is left out."""
    require(isinstance(said, dict), "its header names no settings of its training")
    kinds = get_type_hints(FinetuneConfig)
    names = [field.name for field in fields(FinetuneConfig) if field.name in said]
    return {name: typed(said[name], kinds[name], name) for name in names}
