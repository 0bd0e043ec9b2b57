"""`segmenter.safetensors` and `detector.safetensors`: written with all that they need, read as files of strangers."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import safetensors
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fastpmae.evaluate.backbone import LARGEST_IMAGE, Backbone
from fastpmae.evaluate.dense.rcnn import Detector
from fastpmae.evaluate.dense.recipe import DenseConfig, DetectConfig, SegmentConfig
from fastpmae.evaluate.dense.upernet import Segmenter
from fastpmae.evaluate.vit_arguments import checked_arguments, require, three_numbers, timm_arguments_of
from fastpmae.run.init_weights import TUNED, header_of, tuned_weights, weights_file
from fastpmae.weights.tensor_file import save_tensors
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.printable import printable
from fastpmae_loaders.values import typed

Kind = Literal["segment", "detect"]
CONFIGS: dict[Kind, type[DenseConfig]] = {"segment": SegmentConfig, "detect": DetectConfig}
WORDS: dict[Kind, str] = {"segment": "segmenter", "detect": "detector"}
ENCODER = "backbone.vit."
"""What the names of the encoder's tensors begin with; timm's names follow."""


def write_network(
    folder: Path, kind: Kind, model: Segmenter | Detector, backbone: Backbone, told: dict[str, Any]
) -> None:
    """Leave a trained network in a folder. Its encoder's tensors begin with `backbone.vit.`, under timm's names.

    Args:
        told: the settings under `kind`, and what the classes are called, for the header.
    """
    vit = model.backbone.vit
    arguments = timm_arguments_of(vit) if isinstance(vit, VisionTransformer) else {}
    header = _header(arguments, backbone.source, backbone.mean, backbone.std, backbone.image_size, told)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / TUNED[kind]) as beside:
        save_tensors(tensors, beside, header)


def _header(
    arguments: dict[str, Any],
    source: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    image_size: int,
    told: dict[str, Any],
) -> dict[str, str]:
    numbers = {"timm": arguments, "mean": mean, "std": std, "image_size": image_size, **told}
    return {"format": "pt", "backbone": source, **{name: json.dumps(value) for name, value in numbers.items()}}


@dataclass(frozen=True)
class NetworkFile:
    """A segmenter or a detector as its file has it, every value of its kind.

    Attributes:
        arguments: of its ViT for `timm.create_model`, of the sizes that the tensors have; none where it is a BEiT.
        config: the settings of its training that this version knows.
        names: of the classes; any text.
        masks: whether a detector finds masks too.
        image_size: that its positions are for, in pixels.
        mean, std: by which its images are normalised.
        source: what the training started from; any text.
    """

    path: Path
    kind: Kind
    tensors: dict[str, Tensor]
    arguments: dict[str, Any]
    config: DenseConfig
    names: tuple[str, ...]
    masks: bool
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    @property
    def encoder(self) -> dict[str, Tensor]:
        """The ViT's tensors under timm's names."""
        return encoder_in(self.tensors)

    def told(self) -> dict[str, str]:
        """The header of a file that is read as this one was."""
        told = {self.kind: dataclasses.asdict(self.config), "classes": self.names}
        told |= {"masks": self.masks} if self.kind == "detect" else {}
        return _header(self.arguments, self.source, self.mean, self.std, self.image_size, told)

    def settings(self) -> dict[str, Any]:
        """What the header says, for people and programs that read no safetensors."""
        numbers = {name: json.loads(value) for name, value in self.told().items() if name not in ("format", "backbone")}
        return {"task": self.kind, **numbers}


def encoder_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a network's tensors those of its ViT, under timm's names."""
    return {name.removeprefix(ENCODER): tensor for name, tensor in tensors.items() if name.startswith(ENCODER)}


def kind_of(path: Path) -> Kind | None:
    """Whether a file says that it is a segmenter or a detector; None where it says neither."""
    header = header_of(path)
    return next((kind for kind in CONFIGS if kind in header and "classes" in header), None)


def network_file(path: Path) -> Path:
    """The file of a training's folder, of an export's, or the file itself. Raises UserError as `tuned_weights`."""
    return tuned_weights(path) or weights_file(path)


def read_network(path: Path) -> NetworkFile:
    """The segmenter or detector in a folder or a file (see `network_file`).

    Raises:
        UserError: where there is none, the training has not ended, the file cannot be read, or its header says what
            cannot be.
    """
    file = network_file(path)
    name, kind = printable(str(file)), kind_of(file)
    if kind is None:
        what = "does not exist" if not file.exists() else "is no segmenter and no detector of fastpmae-eval"
        raise UserError(f"{name} {what}: name the folder that `fastpmae-eval segment` or `detect` left")
    header = header_of(file)
    try:
        said = {part: json.loads(header[part]) for part in ("timm", "classes", "mean", "std", "image_size", kind)}
        tensors = load_file(file)
        for key, tensor in tensors.items():
            finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
            require(finite, f"{key[:80]!r} holds numbers that are not finite")
        arguments = checked_arguments(said["timm"], encoder_in(tensors)) if said["timm"] else {}
        mean, std = map(three_numbers, (said["mean"], said["std"]))
        require(min(std) > 0, "std is not above 0")
        image_size = typed(said["image_size"], int, "image_size", strict=True)
        require(1 <= image_size <= LARGEST_IMAGE, f"image_size is {image_size}")
        require(arguments.get("img_size", image_size) == image_size, "it gives two sizes of images")
        names = typed(said["classes"], tuple[str, ...], "classes")
        require(len(names) > 0, "it names no classes")
        masks = kind == "detect" and typed(json.loads(header.get("masks", "false")), bool, "masks")
        return NetworkFile(
            file, kind, tensors, arguments, _config(kind, said[kind]), names, masks, image_size, mean, std,
            header.get("backbone", ""),
        )  # fmt: skip
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{name} is no {WORDS[kind]} of fastpmae-eval") from None
    except UserError as error:
        raise UserError(f"{name} is no {WORDS[kind]} of fastpmae-eval: {error}") from None


def _config(kind: Kind, said: Any) -> DenseConfig:
    """The settings that this version has; what another version knew is left out."""
    require(isinstance(said, dict), "its header names no settings of its training")
    kinds = get_type_hints(CONFIGS[kind])
    return CONFIGS[kind](**{name: typed(said[name], kinds[name], name) for name in kinds if name in said})
