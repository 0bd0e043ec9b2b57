"""How a file of ours says what its ViT is: by arguments for timm's `create_model`, none of them believed unchecked."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastpmae.weights.foreign import PATCHES
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import short
from fastpmae_loaders.values import typed

NEEDED: dict[str, Any] = {
    "model_name": str, "img_size": int, "patch_size": int, "embed_dim": int, "depth": int, "num_heads": int,
    "mlp_ratio": float, "global_pool": Literal["token", "avg"], "num_classes": int,
}  # fmt: skip
"""Arguments that every file names."""
POSSIBLE: dict[str, Any] = {
    "fc_norm": bool, "init_values": float, "qk_norm": bool, "no_embed_class": bool, "reg_tokens": int,
    "class_token": bool,
}  # fmt: skip
"""Those that some name."""


def timm_arguments_of(model: VisionTransformer) -> dict[str, Any]:
    """What `timm.create_model` needs to build a ViT of these sizes with its classifier."""
    vit: Any = model
    # What timm made by a name may have parts that no size tells (another activation, a norm before the blocks).
    made = getattr(vit, "pretrained_cfg", None) or {}
    parts: dict[str, Any] = {}
    if not isinstance(vit.blocks[0].ls1, nn.Identity):
        parts["init_values"] = 1e-5  # that there is a LayerScale; its values are among the weights
    if not isinstance(vit.blocks[0].attn.q_norm, nn.Identity):
        parts["qk_norm"] = True
    if vit.no_embed_class:
        parts["no_embed_class"] = True
    if vit.num_reg_tokens:
        parts["reg_tokens"] = vit.num_reg_tokens
    if not vit.has_class_token:
        parts["class_token"] = False
    return {
        "model_name": made.get("architecture") or "vit_base_patch16_224",
        "img_size": vit.patch_embed.img_size[0],
        "patch_size": vit.patch_embed.patch_size[0],
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": vit.blocks[0].attn.num_heads,
        "mlp_ratio": vit.blocks[0].mlp.fc1.out_features / vit.embed_dim,
        "global_pool": vit.global_pool,
        "fc_norm": isinstance(vit.fc_norm, nn.LayerNorm),
        "num_classes": vit.num_classes,
        **parts,
    }


def checked_arguments(said: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments out of a file's header, each of its kind, and of the sizes that the file's tensors have.

    Args:
        tensors: the ViT's, under timm's names, with its classifier where it has one.

    Raises:
        UserError: for anything else, with the end of a sentence about the file.
    """
    require(isinstance(said, dict), "its header names no arguments for timm")
    unknown = sorted(said.keys() - NEEDED.keys() - POSSIBLE.keys())
    require(not unknown, f"timm has no such argument here: {short(unknown[0], 60)}" if unknown else "")
    missing = sorted(NEEDED.keys() - said.keys())
    require(not missing, f"{', '.join(missing)} missing")
    kinds = NEEDED | POSSIBLE
    arguments = {name: typed(value, kinds[name], name, strict=True) for name, value in said.items()}
    name = arguments["model_name"]
    known = re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", name) is not None and timm.is_model(name)
    require(known, f"timm has no model {short(name, 60)!r}")
    for key, value in arguments.items():
        least = 0 if key == "num_classes" else 1e-12
        sound = isinstance(value, str | bool) or (math.isfinite(value) and value >= least)
        require(sound, f"{key} is {value}")
    _check_sizes(arguments, tensors)
    return arguments


def _check_sizes(arguments: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The sizes that are said are those of the tensors."""
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    width, depth, classes = arguments["embed_dim"], arguments["depth"], arguments["num_classes"]
    patch = arguments["patch_size"]
    sizes: dict[str, tuple[int, ...]] = {
        PATCHES: (width, 3, patch, patch),
        "blocks.0.attn.qkv.weight": (3 * width, width),
        "blocks.0.mlp.fc1.weight": (round(arguments["mlp_ratio"] * width), width),
    }
    if classes:
        sizes |= {"head.weight": (classes, width), "head.bias": (classes,)}
    for name, size in sizes.items():
        require(name in tensors, f"it has no {name}")
        found = tuple(tensors[name].shape)
        require(found == size, f"its {name} is {found}, and its header says {size}")
    require(len(blocks) == depth, f"it has {len(blocks)} blocks, and its header says {depth}")
    require(width % arguments["num_heads"] == 0, f"{arguments['num_heads']} heads do not divide {width}")
    require(arguments["img_size"] % patch == 0, f"img_size {arguments['img_size']} is no multiple of {patch}")


def three_numbers(said: Any) -> tuple[float, float, float]:
    """A mean or a std. Raises UserError, with the end of a sentence, where it is none."""
    numbers = typed(said, tuple[float, float, float], "mean or std")
    require(all(map(math.isfinite, numbers)), "mean or std is not finite")
    return numbers


def require(holds: bool, sentence: str) -> None:
    """Raise UserError with the end of a sentence unless something holds."""
    if not holds:
        raise UserError(sentence)
