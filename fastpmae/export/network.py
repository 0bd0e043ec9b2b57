"""The network on its way out: its tensors under timm's names, its sizes, and where it comes from."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastpmae.config import Config
from fastpmae.evaluate.backbone import BIASES
from fastpmae.evaluate.dense.weights import WORDS, NetworkFile, kind_of, network_file, read_network
from fastpmae.evaluate.features import Network, encoder_of
from fastpmae.export.classifier import read_tuned
from fastpmae.model.build import SHAPES, Shape, shape_of
from fastpmae.model.patches import IMAGENET_MEAN, IMAGENET_STD
from fastpmae.run.checkpoint import find_checkpoint
from fastpmae.run.init_weights import fit_positions, position_prefix, tuned_weights
from fastpmae.weights.foreign import PATCHES
from fastpmae_loaders.errors import UserError


@dataclass(frozen=True)
class Export:
    """A network on its way out.

    Attributes:
        tensors: under timm's names; a classifier is `head.weight` and `head.bias`.
        arguments: for `timm.create_model`.
        shape: its sizes.
        source: the file that it comes from.
        network: whose encoder.
        classes: names of the classes where there is a classifier.
        more: the projection head with its prototypes, where it was asked for.
        config: the run's settings, where it is a run's.
        mean, std: by which its images are normalised.
        crop_ratio: of whole images, as they are evaluated and a classifier was tested.
        finetune: the settings of a tuned network's training.
        backbone: what that training started from, in words.
        dense: the segmenter or detector whose encoder it is.
    """

    tensors: dict[str, Tensor]
    arguments: dict[str, Any]
    shape: Shape
    source: Path
    network: str
    classes: list[str] | None
    more: dict[str, Tensor]
    config: Config | None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_ratio: float = 0.875
    finetune: dict[str, Any] | None = None
    backbone: str = ""
    dense: NetworkFile | None = None


def timm_arguments(config: Config) -> dict[str, Any]:
    """What `timm.create_model` needs to build the encoder of these settings."""
    shape = shape_of(config.network)
    name = config.network.model
    if name in SHAPES:
        name = f"{name}_patch{SHAPES[name].patch_size}_224"
    return {
        "model_name": name,
        "img_size": config.views.image_size,
        "patch_size": shape.patch_size,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": shape.mlp_ratio,
        "global_pool": "token",
        "num_classes": 0,
    }


def read_export(path: Path, network: Network, with_head: bool = False) -> Export:
    """The network of a checkpoint, a run folder, or what a training left: a classifier, or the encoder of a segmenter
    or detector. Raises UserError where there is none."""
    file = network_file(path)
    if kind_of(file) is not None:
        if with_head or network != "student":
            flag = "--with-head" if with_head else f"--network {network}"
            raise UserError(f"{flag}: {path} holds one network of a dense task and no run's; leave it out")
        return _of_dense(read_network(file))
    tuned = tuned_weights(path)
    if tuned is not None:
        if with_head or network != "student":
            flag = "--with-head" if with_head else f"--network {network}"
            raise UserError(f"{flag}: {path} holds a classifier and no run's networks; leave it out")
        found = read_tuned(tuned)
        return Export(
            found.tensors, found.arguments, found.shape, tuned, "classifier", found.classes, {}, None,
            found.mean, found.std, found.crop_ratio, found.finetune, found.backbone,
        )  # fmt: skip
    checkpoint = find_checkpoint(path)
    encoder, config = encoder_of(checkpoint, network)
    role = "labelling_teacher" if config.teacher.teachers == "single" and network != "student" else network
    head = checkpoint.part(f"{role}.head") if with_head else {}
    if with_head and not head:
        raise UserError(f"{checkpoint.path}: its {network} has no projection head")
    shape = shape_of(config.network)
    return Export(
        encoder.state_dict(), timm_arguments(config), shape, checkpoint.path, network, None, head, config
    )  # fmt: skip


def _of_dense(file: NetworkFile) -> Export:
    encoder = file.encoder
    arguments = file.arguments or _sizes_of_beit(encoder, file.image_size)
    shape = Shape(*(arguments[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")))
    return Export(
        encoder, arguments, shape, file.path, WORDS[file.kind], None, {}, None, file.mean, file.std,
        finetune=asdict(file.config), backbone=file.source, dense=file,
    )  # fmt: skip


def _sizes_of_beit(encoder: dict[str, Tensor], image_size: int) -> dict[str, Any]:
    """The sizes of a network that timm's arguments of a plain ViT do not describe; without a `model_name`."""
    try:
        width, _, patch, _ = encoder[PATCHES].shape
        hidden, heads = encoder["blocks.0.mlp.fc1.weight"].shape[0], encoder[BIASES].shape[1]
    except (KeyError, IndexError, ValueError):
        raise UserError("its encoder is neither a plain ViT nor a BEiT") from None
    depth = len({name.split(".")[1] for name in encoder if name.startswith("blocks.")})
    sizes = {"img_size": image_size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    return sizes | {"mlp_ratio": hidden / max(1, width), "num_classes": 0}


def at_size(export: Export, image_size: int) -> Export:
    """The same network for images of another side, its positions interpolated as timm does it.

    Raises:
        UserError: when the side is no multiple of the patch size.
    """
    if image_size in (0, export.arguments["img_size"]):
        return export
    side, rest = divmod(image_size, export.shape.patch_size)
    if rest or side < 1:
        raise UserError(f"--image-size {image_size} is no multiple of the patches' {export.shape.patch_size} pixels")
    before = export.tensors.get("pos_embed")
    if before is None:
        raise UserError(f"--image-size: {export.source} has no positions to interpolate")
    class_token = "cls_token" in export.tensors
    prefix = position_prefix(before, class_token + export.arguments.get("reg_tokens", 0))
    positions = fit_positions(before, side * side + prefix, prefix)
    return replace(
        export,
        tensors=export.tensors | {"pos_embed": positions},
        arguments=export.arguments | {"img_size": image_size},
    )
