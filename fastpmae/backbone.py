"""The network under evaluation: a timm ViT, from our checkpoints, from other projects' files, or from timm itself."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from jaxtyping import Float, UInt8
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch import Tensor, nn

from fastpmae.architecture import shape_of
from fastpmae.checkpoint import find_checkpoint
from fastpmae.embed import Network, Pool, encoder_of, pooled
from fastpmae.errors import UserError
from fastpmae.layouts import read_foreign
from fastpmae.weights import fit_positions, is_ours

Which = Literal["auto", "student", "labelling_teacher", "reconstruction_teacher", "random"]

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
"""Attention heads by width, where the weights do not tell."""
MOCO_HEADS = {384: 12}
"""MoCo v3's own ViT-S has twice as many."""


@dataclass(frozen=True)
class Backbone:
    """Weights that a network can be built from, and how images come to it."""

    source: str
    """What it is, in words."""
    network: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    build: Callable[..., nn.Module]
    """(classes, image_size, pool, drop_path) -> a timm ViT with these weights; classes 0 leaves the classifier out."""

    def normalised(
        self, images: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:  # fmt: skip
        """Bytes as the network wants them."""
        mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (self.mean, self.std))
        return (images / 255 - mean) / std


def find_backbone(weights: str, which: Which = "auto", *, image_size: int = 0, heads: int = 0) -> Backbone:
    """The network that a user names: a run folder, a file, or `timm:NAME`.

    Args:
        weights: our checkpoint or run folder, a safetensors file, a .pth of MAE, SdAE, DINO, iBOT, MoCo v3 or BEiT,
            or `timm:` and the name of a pretrained model, which timm fetches.
        which: of a file with several networks; "auto" takes our student, and of others what they evaluate themselves.
        image_size: 0 takes the one that it was trained with.
        heads: 0 takes the usual number for the width, where the weights do not tell.

    Raises:
        UserError: when there are no such weights or they make no ViT.
    """
    if weights.startswith("timm:"):
        return _of_timm(weights.removeprefix("timm:"), image_size)
    path = Path(weights)
    if path.is_dir() or is_ours(path):
        return _of_run(path, "student" if which == "auto" else which, image_size)
    if which == "random":
        raise UserError(f"--network random draws the start of a run of ours, and {path} is none")
    teacher = None if which == "auto" else which != "student"
    found = read_foreign(path, teacher)
    width = len(found.tensors["patch_embed.proj.weight"])
    own = MOCO_HEADS.get(width) if found.layout == "MoCo v3" else None
    return _of_tensors(
        found.tensors,
        f"{found.layout}, {path.name}",
        found.choice,
        image_size,
        heads or own or _exported_heads(path) or HEADS.get(width, 0),
        inception=found.layout == "BEiT",
    )


def features(
    model: nn.Module, images: Float[Tensor, "batch 3 height width"], pools: tuple[Pool, ...] = ("class",)
) -> list[Float[Tensor, "batch dim"]]:
    """What a network without a classifier makes of normalised images: the class token, or the mean of the patches.

    Raises:
        UserError: when the network has no class token and it is asked for.
    """
    vit: Any = model
    tokens = vit.forward_features(images)
    prefix = vit.num_prefix_tokens
    if prefix == 0 and "class" in pools:
        raise UserError("this network has no class token: use --pool mean")
    kept = tokens if prefix <= 1 else torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1)
    if prefix == 0:
        return [vit.fc_norm(kept.mean(dim=1)) for _ in pools]
    return [vit.fc_norm(pooled(kept, pool)) for pool in pools]


def _exported_heads(path: Path) -> int:
    """The attention heads that a file of `fastpmae-export` names in its header; 0 where it does not."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            heads = json.loads((file.metadata() or {}).get("timm", "{}")).get("num_heads", 0)
    except (safetensors.SafetensorError, OSError, ValueError, AttributeError):
        return 0
    return heads if isinstance(heads, int) else 0


def _of_run(path: Path, network: Network, image_size: int) -> Backbone:
    checkpoint = find_checkpoint(path)
    encoder, config = encoder_of(checkpoint, network)
    tensors = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    size = image_size or config.views.image_size
    return _of_tensors(tensors, f"{config.run.preset}, {checkpoint.path}", network, size, shape_of(config.model).heads)


def _of_tensors(
    tensors: dict[str, Tensor], source: str, network: str, image_size: int, heads: int, inception: bool = False
) -> Backbone:
    """A plain ViT, or a BEiT where there are position biases, of the sizes that the tensors have."""
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    table = tensors.get("blocks.0.attn.relative_position_bias_table")
    if table is not None:
        heads = table.shape[1]
        trained = patch * (round((len(table) - 3) ** 0.5) + 1) // 2
    elif "pos_embed" in tensors and "cls_token" in tensors:
        trained = patch * round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
    else:
        raise UserError(f"{source}: it is no plain ViT with a class token and absolute positions")
    if not heads or width % heads:
        raise UserError(f"{source}: say how many attention heads the network has, with --heads (its width is {width})")
    size = image_size or trained
    if size % patch:
        raise UserError(f"--image-size {size} is no multiple of the network's patches of {patch} pixels")

    def build(classes: int = 0, pool: Pool = "class", drop_path: float = 0.0) -> nn.Module:
        model = _vit(tensors, size, heads, classes, pool, drop_path)
        _load(model, tensors, source, classes)
        return model

    mean, std = (
        (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
        if inception
        else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return Backbone(source, network, size, mean, std, build)


def _vit(tensors: dict[str, Tensor], size: int, heads: int, classes: int, pool: Pool, drop_path: float) -> nn.Module:
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    # Networks that were trained on the mean of the patches keep their last norm behind it.
    fc_norm = "norm.weight" not in tensors or (classes > 0 and pool == "mean")
    common: dict[str, Any] = {
        "img_size": size,
        "patch_size": patch,
        "num_classes": classes,
        "global_pool": "avg" if pool == "mean" else "token",
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "drop_path_rate": drop_path,
    }
    if "blocks.0.attn.relative_position_bias_table" not in tensors:
        return VisionTransformer(**common, fc_norm=fc_norm)
    gamma = tensors.get("blocks.0.gamma_1")
    return Beit(
        **common,
        use_fc_norm=fc_norm,
        use_abs_pos_emb="pos_embed" in tensors,
        use_rel_pos_bias=True,
        init_values=None if gamma is None else 0.1,
    )


def _load(model: nn.Module, tensors: dict[str, Tensor], source: str, classes: int) -> None:
    """Put the weights in, with positions of another grid interpolated; what a classifier adds stays as it starts."""
    from timm.models.beit import checkpoint_filter_fn

    own = model.state_dict()
    weights = dict(tensors)
    if "pos_embed" in weights:
        weights["pos_embed"] = fit_positions(weights["pos_embed"], own["pos_embed"].shape[1])
    if "blocks.0.attn.relative_position_bias_table" in weights:
        weights = checkpoint_filter_fn(weights, model)
    new = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} if classes else set()
    missing = sorted(own.keys() - weights.keys() - new)
    if missing:
        raise UserError(f"{source} lacks {len(missing)} of the network's weights, {missing[0]} among them")
    for name, tensor in own.items():
        if name in weights and weights[name].shape != tensor.shape:
            raise UserError(
                f"{source} makes no ViT: {name} is {tuple(weights[name].shape)}, the rest wants {tuple(tensor.shape)}"
            )
    model.load_state_dict({name: weights.get(name, tensor) for name, tensor in own.items()})
    if classes:
        start_head(model)


def start_head(model: nn.Module) -> None:
    """A classifier that starts near nothing, as MAE's fine-tuning does."""
    head: Any = model.get_submodule("head")
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)


def _of_timm(name: str, image_size: int) -> Backbone:
    """A model that timm fetches with its weights, or finds in a folder (`local-dir:PATH`)."""
    import timm

    def build(classes: int = 0, pool: Pool = "class", drop_path: float = 0.0) -> nn.Module:
        more: dict[str, Any] = {"img_size": image_size} if image_size else {}
        if classes:
            more |= {"global_pool": "avg" if pool == "mean" else "token", "drop_path_rate": drop_path}
        model = timm.create_model(name, pretrained=True, num_classes=classes, **more)
        if classes:
            start_head(model)
        return model

    try:
        model: Any = build()
    except Exception as error:  # from the network, the hub or timm: one sentence each, whatever its kind
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"timm:{name} cannot be had: {first}") from None
    if not (hasattr(model, "fc_norm") and hasattr(model, "num_prefix_tokens")):
        raise UserError(f"timm:{name} is no ViT but a {type(model).__name__}")
    cfg = model.pretrained_cfg
    size = model.patch_embed.img_size[0]
    return Backbone(f"timm, {name}", "", size, tuple(cfg["mean"]), tuple(cfg["std"]), build)
