"""The network under evaluation: a timm ViT, from our checkpoints, from other projects' files, or from timm itself."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fastpmae.evaluate.features import Network, Pool, encoder_of, pooled
from fastpmae.model.build import shape_of
from fastpmae.model.patches import IMAGENET_MEAN, IMAGENET_STD
from fastpmae.run.checkpoint import find_checkpoint
from fastpmae.run.init_weights import (
    few,
    fit_positions,
    header_of,
    is_ours,
    position_prefix,
    timm_arguments_in,
    tuned_weights,
    weights_file,
)
from fastpmae.run.stored_run import brought_here, in_words
from fastpmae.weights.foreign import PATCHES, Foreign, read_foreign
from fastpmae_kernels.backend import written_on
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.values import checked, local_path

Which = Literal["auto", "student", "labelling_teacher", "reconstruction_teacher", "random"]

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
"""Attention heads by width, where the weights do not tell."""
MOCO_HEADS = {384: 12}
"""MoCo v3's own ViT-S has twice as many."""
BEIT_MEAN = BEIT_STD = (0.5, 0.5, 0.5)
LARGEST_IMAGE = 4096
"""Pixels; images of a larger side come from positions that are no network's."""
BIASES = "blocks.0.attn.relative_position_bias_table"


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
        mean, std = (written_on(images.device, numbers).view(3, 1, 1) for numbers in (self.mean, self.std))
        return (images / 255 - mean) / std


@checked
def find_backbone(
    weights: str, which: Which = "auto", *, image_size: int = 0, heads: int = 0, size_flag: str = "--image-size"
) -> Backbone:
    """The network that a user names: a run folder, a file, or `timm:NAME`.

    Args:
        weights: our checkpoint or run folder, the folder of a fine-tuning or an export, a safetensors file, a .pth of
            anybody's ViT (see `fastpmae.weights.foreign`), each also at an address in a store, or `timm:` and the name
            of a pretrained model, which timm fetches.
        which: of a file with several networks; "auto" takes our student, and of others what they evaluate themselves.
        image_size: 0 takes the one that it was trained with.
        size_flag: what the user chooses it by.
        heads: 0 takes the usual number for the width, where the weights do not tell.

    Raises:
        UserError: when there are no such weights or they make no ViT.
    """
    if weights.startswith("timm:"):
        if which != "auto":
            raise UserError(f"--network {which} chooses among the networks of a file, and {weights} is one network")
        if heads:
            raise UserError(f"--heads {heads}: timm knows how many attention heads {weights} has; leave it out")
        return _of_timm(weights.removeprefix("timm:"), image_size, size_flag)
    named = Address.of_text(weights)
    if named is not None:
        with brought_here(named) as copy:
            found = find_backbone(str(copy), which, image_size=image_size, heads=heads, size_flag=size_flag)
        return replace(found, source=in_words(found.source, copy, named))
    path = weights_file(local_path(weights))
    tuned = tuned_weights(path)
    if tuned is None and (path.is_dir() or is_ours(path)):
        if heads:
            raise UserError(f"--heads {heads}: the settings of {path} say how many it has; leave it out")
        return _of_run(path, "student" if which == "auto" else which, image_size, size_flag)
    path = tuned or path
    if which == "random":
        raise UserError(f"--network random draws the start of a run of ours, and {path} is none")
    teacher = None if which == "auto" else which != "student"
    found = read_foreign(path, teacher)
    if teacher and not found.choice:
        raise UserError(f"--network {which}: {path} holds one network; leave it out")
    return _of_tensors(
        found.tensors,
        f"fine-tuned {found.layout}, {path}" if tuned else f"{found.layout}, {path.name}",
        found.choice,
        image_size,
        _heads_of(found, path, heads),
        _normalisation_of(found, path),
        size_flag,
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
    # registers are prefix tokens too
    if not getattr(vit, "has_class_token", prefix > 0):
        if "class" in pools:
            raise UserError("this network has no class token: use --pool mean")
        return [vit.fc_norm(tokens[:, prefix:].mean(dim=1)) for _ in pools]
    kept = tokens if prefix == 1 else torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1)
    return [vit.fc_norm(pooled(kept, pool)) for pool in pools]


def _heads_of(found: Foreign, path: Path, named: int) -> int:
    """How many attention heads a file's network has: as the file tells, as a user says, or as its width has usually.

    Raises:
        UserError: when the user says otherwise than the file, or nobody knows.
    """
    width = _extent(found.tensors[PATCHES], 0)
    table = found.tensors.get(BIASES)
    one = found.tensors.get("blocks.0.attn.q_norm.weight")
    told = timm_arguments_in(header_of(path)).get("num_heads", 0)
    told = told if isinstance(told, int) else 0
    if table is not None:
        told = _extent(table, 1)
    elif one is not None and _extent(one, 0):
        told = width // _extent(one, 0)
    if named and told and named != told:
        raise UserError(f"--heads {named}: {path} says that it has {told}; leave it out")
    usual = MOCO_HEADS.get(width, 0) if found.layout == "MoCo v3" else 0
    heads = told or named or usual or HEADS.get(width, 0)
    if heads < 1 or width % heads:
        raise UserError(f"{path}: say how many attention heads the network has, with --heads (its width is {width})")
    return heads


def _normalisation_of(found: Foreign, path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std by which a file's network wants its images: of its header, or its project's."""
    header = header_of(path)
    try:
        mean, std = _three(header["mean"]), _three(header["std"])
        if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError("pixels cannot be normalised by these")
        return mean, std
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        if found.layout == "BEiT":
            return BEIT_MEAN, BEIT_STD
        return IMAGENET_MEAN, IMAGENET_STD


def _three(said: str) -> tuple[float, float, float]:
    red, green, blue = json.loads(said)
    return float(red), float(green), float(blue)


def _of_run(path: Path, network: Network, image_size: int, size_flag: str) -> Backbone:
    checkpoint = find_checkpoint(path)
    encoder, config = encoder_of(checkpoint, network)
    tensors = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    size = image_size or config.views.image_size
    normal = IMAGENET_MEAN, IMAGENET_STD
    source = f"{config.run.preset}, {checkpoint.path}"
    return _of_tensors(tensors, source, network, size, shape_of(config.network).heads, normal, size_flag)


def _of_tensors(
    tensors: dict[str, Tensor],
    source: str,
    network: str,
    image_size: int,
    heads: int,
    normal: tuple[tuple[float, ...], tuple[float, ...]],
    size_flag: str,
) -> Backbone:
    """A plain ViT, or a BEiT where there are position biases, of the sizes that the tensors have."""
    source = printable(source)
    table = tensors.get(BIASES)
    if tensors[PATCHES].ndim != 4 or "cls_token" not in tensors or (table is None and "pos_embed" not in tensors):
        raise UserError(f"{source}: it is no plain ViT with a class token and absolute positions")
    width, _, patch, _ = tensors[PATCHES].shape
    if not patch or not width:
        raise UserError(f"{source} makes no ViT: {PATCHES} is {tuple(tensors[PATCHES].shape)}")
    if "blocks.0.mlp.fc1.weight" not in tensors:
        raise UserError(f"{source} makes no ViT: it has no blocks.0.mlp.fc1.weight")
    depth = _depth(tensors, source)
    if table is not None:
        trained = patch * (round(max(0, _extent(table, 0) - 3) ** 0.5) + 1) // 2
    else:
        try:
            prefix = position_prefix(tensors["pos_embed"], 1 + _registers(tensors))
        except UserError as error:
            raise UserError(f"{source} makes no ViT: {error}") from None
        trained = patch * round((tensors["pos_embed"].shape[1] - prefix) ** 0.5)
    size = image_size or trained
    _check_whole_patches(size, patch, size_flag)
    if size > LARGEST_IMAGE:
        raise UserError(
            f"{source} is for images of {size:,} pixels a side, more than {LARGEST_IMAGE:,}: choose with {size_flag}"
        )

    def build(classes: int = 0, pool: Pool = "class", drop_path: float = 0.0) -> nn.Module:
        # First without memory: what does not fit may be of any size.
        with torch.device("meta"):
            sketch = _vit(tensors, depth, size, heads, classes, pool, drop_path)
        weights = _fitted(sketch, tensors, source, classes)
        model = _vit(tensors, depth, size, heads, classes, pool, drop_path)
        model.load_state_dict(weights | {name: t for name, t in model.state_dict().items() if name not in weights})
        if classes:
            start_head(model)
        return model

    return Backbone(source, network, size, *normal, build)


def _check_whole_patches(size: int, patch: int, size_flag: str) -> None:
    if size % patch or size < patch:
        raise UserError(f"{size_flag} {size} is no multiple of the network's patches of {patch} pixels")


def _extent(tensor: Tensor, axis: int) -> int:
    """A tensor's size along an axis; 0 where it has no such axis."""
    return tensor.shape[axis] if tensor.ndim > axis else 0


def _registers(tensors: dict[str, Tensor]) -> int:
    """Tokens besides the class token that stand for no patch."""
    return _extent(tensors["reg_token"], 1) if "reg_token" in tensors else 0


def _depth(tensors: dict[str, Tensor], source: str) -> int:
    """How many blocks there are. Raises UserError where they are not numbered from 0 on."""
    numbers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    odd = sorted(numbers - {str(number) for number in range(len(numbers))})
    if odd:
        raise UserError(f"{source} makes no ViT: of its {len(numbers)} blocks one is called {short(odd[0])!r}")
    return len(numbers)


def _vit(
    tensors: dict[str, Tensor], depth: int, size: int, heads: int, classes: int, pool: Pool, drop_path: float
) -> nn.Module:
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    width, _, patch, _ = tensors[PATCHES].shape
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
        "mlp_ratio": _extent(tensors["blocks.0.mlp.fc1.weight"], 0) / width,
        "drop_path_rate": drop_path,
    }
    if BIASES not in tensors:
        registers = _registers(tensors)
        return VisionTransformer(
            **common,
            fc_norm=fc_norm,
            init_values=1e-5 if "blocks.0.ls1.gamma" in tensors else None,
            qk_norm="blocks.0.attn.q_norm.weight" in tensors,
            reg_tokens=registers,
            no_embed_class=position_prefix(tensors["pos_embed"], 1 + registers) == 0,
        )
    gamma = tensors.get("blocks.0.gamma_1")
    return Beit(
        **common,
        use_fc_norm=fc_norm,
        use_abs_pos_emb="pos_embed" in tensors,
        use_rel_pos_bias=True,
        init_values=None if gamma is None else 0.1,
    )


def _fitted(sketch: nn.Module, tensors: dict[str, Tensor], source: str, classes: int) -> dict[str, Tensor]:
    """The weights for a network as it is sketched, positions of another grid interpolated, without what a classifier
    adds. Raises UserError for what is missing, has no place, or is of another size."""
    from timm.models.beit import checkpoint_filter_fn

    own = sketch.state_dict()
    weights = dict(tensors)
    width = _extent(tensors[PATCHES], 0)
    if "pos_embed" in weights:
        positions = weights["pos_embed"]
        prefix = position_prefix(positions, 1 + _registers(tensors))
        if positions.shape[::2] == (1, width):
            weights["pos_embed"] = fit_positions(positions, own["pos_embed"].shape[1], prefix)
    if BIASES in weights:
        for name, table in weights.items():
            if name.endswith("relative_position_bias_table") and table.shape != weights[BIASES].shape:
                raise UserError(f"{source} makes no ViT: {short(name)} is {tuple(table.shape)}")
        if "pos_embed" in own and "pos_embed" in weights and weights["pos_embed"].shape != own["pos_embed"].shape:
            # Which timm's function would interpolate once more, as what it is not.
            raise UserError(
                f"{source} makes no ViT: pos_embed is {tuple(tensors['pos_embed'].shape)}, which fits no "
                f"{tuple(own['pos_embed'].shape)}"
            )
        # timm's function takes some names for those of whole networks: it is given what has a place alone.
        weights |= checkpoint_filter_fn({name: weights[name] for name in own if name in weights}, sketch)
    new = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} if classes else set()
    missing = sorted(own.keys() - weights.keys() - new)
    if missing:
        raise UserError(f"{source} lacks {len(missing)} of the network's weights, {missing[0]} among them")
    # A classifier of the patches' mean has a norm of its own in the place of the last one.
    left = sorted(weights.keys() - own.keys() - ({"norm.weight", "norm.bias"} if classes else set()))
    if left:
        # What is left out would be another network's figures in silence.
        raise UserError(f"{source} is no plain ViT: there is no place in one for {few(left)}")
    for name, tensor in own.items():
        if name in weights and weights[name].shape != tensor.shape:
            raise UserError(
                f"{source} makes no ViT: {name} is {tuple(weights[name].shape)}, the rest wants {tuple(tensor.shape)}"
            )
    return {name: weights[name] for name in own if name in weights}


def start_head(model: nn.Module) -> None:
    """A classifier that starts near nothing, as MAE's fine-tuning does."""
    head: Any = model.get_submodule("head")
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)


def _of_timm(name: str, image_size: int, size_flag: str) -> Backbone:
    """A model that timm fetches with its weights, or finds in a folder (`local-dir:PATH`)."""
    import timm

    def build(classes: int = 0, pool: Pool = "class", drop_path: float = 0.0) -> nn.Module:
        more: dict[str, Any] = {"img_size": image_size} if image_size else {}
        if classes:
            more["global_pool"] = "avg" if pool == "mean" else "token"
        if classes or drop_path:
            more["drop_path_rate"] = drop_path
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
    _check_whole_patches(size, model.patch_embed.patch_size[0], size_flag)
    return Backbone(f"timm, {name}", "", size, tuple(cfg["mean"]), tuple(cfg["std"]), build)
