"""A plain ViT as a backbone of dense tasks: maps after some of its blocks, resized to strides of 4 to 32 pixels."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import Format
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastpmae.evaluate.backbone import Backbone
from fastpmae_loaders.errors import UserError

Maps = list[Float[Tensor, "batch channels _height _width"]]
LEVELS = 4


def tapped_blocks(depth: int) -> tuple[int, int, int, int]:
    """The blocks whose tokens are read, counted from 0: 3, 5, 7, 11 of ViT-B, 7, 11, 15, 23 of ViT-L, as BEiT has them.

    Raises:
        UserError: for a network of fewer than four blocks.
    """
    first, second, third, last = (max(0, round(share * depth) - 1) for share in (1 / 3, 1 / 2, 2 / 3, 1))
    if not first < second < third < last:
        raise UserError(f"a pyramid reads the network after four of its blocks, and this one has {depth}")
    return first, second, third, last


def finest_scale(patch_size: int) -> int:
    """How many times finer than the patches the finest map is: a power of two, so that its stride is about 4 pixels."""
    return 2 ** max(0, round(math.log2(patch_size / 4)))


def size_multiple(patch_size: int) -> int:
    """What the sides of an image must be a multiple of, in pixels, for every map to be whole: 32 at patches of 16 or 8,
    28 at 14."""
    return patch_size * max(1, 2 ** (LEVELS - 1) // finest_scale(patch_size))


class TappedViT(nn.Module):
    """A ViT's tokens after some blocks, as maps, without the last norm.

    Its positions are interpolated for an image that is not of the size that it was built for. Position biases of
    attention (BEiT's) are for that size alone.

    Args:
        vit: timm's, without a classifier.
        taps: blocks, counted from 0.
        checkpointing: keep a block's input alone for the backward pass, and compute the rest again there.
    """

    def __init__(self, vit: VisionTransformer | Beit, taps: Sequence[int], checkpointing: bool = False):
        super().__init__()
        self.taps = list(taps)
        self.vit = vit
        patches: Any = vit.patch_embed
        self.patch_size = int(patches.patch_size[0])
        self.dim = int(vit.embed_dim)
        self.depth = len(vit.blocks)
        if isinstance(vit, VisionTransformer):
            vit.dynamic_img_size = True
            patches.strict_img_size = patches.flatten = False
            patches.output_fmt = Format.NHWC
        vit.set_grad_checkpointing(checkpointing)
        # What comes after the blocks is kept for whoever reads the weights later, and not trained.
        for name, parameter in vit.named_parameters():
            if name.startswith(("norm.", "fc_norm.")):
                parameter.requires_grad_(False)

    @property
    def fixed_side(self) -> int | None:
        """The side of the only images that it takes, in pixels; None where it takes any multiple of its patches."""
        patches: Any = self.vit.patch_embed
        return None if isinstance(self.vit, VisionTransformer) else int(patches.img_size[0])

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Maps:
        """A map [batch, dim, height/patch, width/patch] of each tap."""
        return self.vit.forward_intermediates(images, indices=self.taps, intermediates_only=True)  # pyright: ignore[reportReturnType]


def tapped(backbone: Backbone, drop_path: float, *, relative: bool = False, checkpointing: bool = False) -> TappedViT:
    """The network of an evaluation's weights with its four taps.

    Args:
        drop_path: rate of stochastic depth in the last block; it grows linearly from 0 in the first.
        relative: add relative position biases of attention that start at 0, and a LayerScale that starts at 1: the
            same network at first.

    Raises:
        UserError: for what is no plain ViT or has fewer than four blocks.
    """
    vit = backbone.build(drop_path=drop_path)
    if not isinstance(vit, VisionTransformer | Beit):
        raise UserError(f"{backbone.source} is no plain ViT but a {type(vit).__name__}: its blocks make no pyramid")
    if relative and isinstance(vit, VisionTransformer):
        vit = with_relative_positions(vit, drop_path)
    return TappedViT(vit, tapped_blocks(len(vit.blocks)), checkpointing)


def with_relative_positions(vit: VisionTransformer, drop_path: float) -> Beit:
    """The same function as a network of BEiT's architecture, for images of the size that `vit` was built for.

    BEiT's keys have no bias. A bias of the keys adds the same number to all of a query's scores and so changes nothing.

    Raises:
        UserError: for a ViT with parts that BEiT's lacks (registers, norms of queries and keys).
    """
    weights = vit.state_dict()
    network: Any = vit
    dim, depth = int(network.embed_dim), len(network.blocks)
    renamed = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    beit = Beit(
        img_size=network.patch_embed.img_size,
        patch_size=network.patch_embed.patch_size,
        num_classes=0,
        global_pool="token",
        embed_dim=dim,
        depth=depth,
        num_heads=network.blocks[0].attn.num_heads,
        mlp_ratio=network.blocks[0].mlp.fc1.out_features / dim,
        drop_path_rate=drop_path,
        init_values=1.0,
        use_abs_pos_emb=True,
        use_rel_pos_bias=True,
        use_fc_norm="norm.weight" not in weights,
    )
    found = {}
    for name, tensor in weights.items():
        block, _, part = name.rpartition("attn.qkv.bias")
        if block and not part:
            found[f"{block}attn.q_bias"], found[f"{block}attn.v_bias"] = tensor[:dim], tensor[2 * dim :]
            continue
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
    own = beit.state_dict()
    odd = sorted(name for name in found if name not in own or found[name].shape != own[name].shape)
    if odd:
        raise UserError(f"--relative-positions: there is no place for {odd[0]} in a network with relative positions")
    beit.load_state_dict({name: found.get(name, tensor) for name, tensor in own.items()})
    return beit


class Pyramid(nn.Module):
    """Maps of the patches' own stride, each resized to a stride of its own: about 4, 8, 16 and 32 pixels.

    Finer maps are made by transposed convolutions, as BEiT's and CAE's (two with a BatchNorm and a GELU between them
    for four times as fine), coarser ones by the maximum. A network of 16-pixel patches has the scales 4, 2, 1, 1/2.

    Args:
        dim: channels of every map, in and out.
        patch_size: in pixels.
        norm: makes the norm between two transposed convolutions.
    """

    def __init__(self, dim: int, patch_size: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()
        finest = finest_scale(patch_size)
        self.scales = tuple(finest / 2**level for level in range(LEVELS))
        self.resize = nn.ModuleList(_resized(dim, scale, norm) for scale in self.scales)

    def forward(self, maps: Maps) -> Maps:
        """Maps of falling resolution [batch, dim, scale * height, scale * width], one of each tap."""
        return [resize(each) for resize, each in zip(self.resize, maps, strict=True)]


def _resized(dim: int, scale: float, norm: Callable[[int], nn.Module]) -> nn.Module:
    if scale < 1:
        step = round(1 / scale)
        return nn.MaxPool2d(step, step)
    parts: list[nn.Module] = []
    for _ in range(round(math.log2(scale))):
        between = [norm(dim), nn.GELU()] if parts else []
        parts += [*between, nn.ConvTranspose2d(dim, dim, 2, 2)]
    return nn.Sequential(*parts) if parts else nn.Identity()


def parameter_groups(
    backbone: TappedViT, others: Sequence[nn.Module], *, lr: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Parameters for an optimizer by rate and decay, as BEiT, MAE and CAE group them for dense tasks.

    Of d blocks the last one learns at `layer_decay` times the rate, each one below it at as much of the one above, and
    the embedding at `layer_decay` ** (d + 1); what is new learns at the whole rate. Biases, norms, positions and the
    class token do not decay.

    Returns:
        Groups with `lr`, `lr_scale` and `weight_decay`.
    """
    vit: Any = backbone.vit
    plain = vit.no_weight_decay()
    groups: dict[tuple[float, float], dict[str, Any]] = {}

    def add(parameter: nn.Parameter, scale: float, decay: float) -> None:
        if parameter.requires_grad:
            how = {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay}
            groups.setdefault((scale, decay), how)["params"].append(parameter)

    for name, parameter in vit.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
        decays = parameter.ndim > 1 and name not in plain
        add(parameter, layer_decay ** (backbone.depth + 1 - layer), weight_decay if decays else 0.0)
    for module in others:
        for parameter in module.parameters():
            add(parameter, 1.0, weight_decay if parameter.ndim > 1 else 0.0)
    return list(groups.values())


def padded(
    images: Float[Tensor, "batch 3 height width"], multiple: int, least: int = 0
) -> Float[Tensor, "batch 3 padded_height padded_width"]:
    """Zeros (the mean colour of normalised images) to the right and below, up to a multiple and to `least` at least."""
    height, width = images.shape[-2:]
    below, right = (max(least - extent, -extent % multiple) for extent in (height, width))
    return torch.nn.functional.pad(images, (0, right, 0, below)) if below or right else images
