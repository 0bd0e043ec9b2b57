"""Frozen features of an image's patches, at whatever size the image is."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from timm.layers import Format
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastpmae.distributed.ranks import to_device
from fastpmae.evaluate.backbone import Backbone
from fastpmae.evaluate.datasets import half
from fastpmae.evaluate.dense.context import Grid, grid_of
from fastpmae.evaluate.dense.labelled import Pixels
from fastpmae.model.initialization import initialise
from fastpmae.model.patches import sincos_positions
from fastpmae_loaders.errors import UserError

LAYER_SCALES = {"gamma": 1e-5, "gamma_1": 0.1, "gamma_2": 0.1}
"""What timm's ViT and its BEiT start them at, where the module does not say."""


@dataclass(frozen=True)
class PatchNetwork:
    """A network that gives a feature to each patch.

    Attributes:
        model: timm's ViT without a classifier, in evaluation mode.
        patch: side of a patch in pixels.
        side: of the only images that it takes, in pixels; None where it takes any.
    """

    model: nn.Module
    backbone: Backbone
    device: torch.device
    patch: int
    side: int | None

    def grid(self, height: int, width: int, short_side: int) -> Grid:
        """How an image is cut into patches. One with position biases sees every image as its own square."""
        if self.side is not None:
            return Grid(height, width, (self.side, self.side), self.patch)
        return grid_of(height, width, self.patch, short_side)

    @torch.inference_mode()
    def features(self, image: Pixels, grid: Grid) -> Float[Tensor, "rows columns dim"]:
        """The last norm's output at each patch, in fp32 on the device; edges are repeated to whole patches."""
        pixels = torch.from_numpy(np.ascontiguousarray(scaled(image, grid))).permute(2, 0, 1)[None]
        down, right = grid.rows * grid.patch - pixels.shape[2], grid.columns * grid.patch - pixels.shape[3]
        images = self.backbone.normalised(to_device(pixels, self.device))
        images = F.pad(images, (0, right, 0, down), mode="replicate")
        vit: Any = self.model
        with half(self.device):
            tokens = vit.forward_features(images)[0, vit.num_prefix_tokens :]
        return tokens.float().view(grid.rows, grid.columns, -1)

    def restarted(self, seed: int) -> "PatchNetwork":
        """The same network before any training: weights drawn as MAE starts them."""
        model = copy.deepcopy(self.model).cpu()
        start_anew(model, torch.Generator().manual_seed(seed))
        return PatchNetwork(model.to(self.device), self.backbone, self.device, self.patch, self.side)


@torch.no_grad()
def start_anew(vit: nn.Module, generator: torch.Generator) -> None:
    """Nothing of timm's ViT stays as it was trained: products, norms and the class token start as MAE's, positions are
    its sines and cosines, registers are drawn as the class token is, and the rest is as timm starts it."""
    for parameter in vit.parameters():
        parameter.fill_(torch.nan)  # what stays so MAE has not
    initialise(vit, generator)
    for name, parameter in vit.named_parameters():
        if not parameter.isnan().any():
            continue
        of, _, last = name.rpartition(".")
        if last == "pos_embed":
            patch_embed: Any = vit.get_submodule("patch_embed")
            rows, columns = patch_embed.grid_size
            positions = sincos_positions(rows, columns, parameter.shape[2])
            parameter.zero_()
            parameter[0, -len(positions) :] = positions
        elif last in LAYER_SCALES:
            parameter.fill_(getattr(vit.get_submodule(of), "init_values", LAYER_SCALES[last]))
        elif "bias" in last:
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=generator)


def scaled(image: Pixels, grid: Grid) -> Pixels:
    """The image as the network sees it: bilinear with antialiasing, as Pillow scales."""
    if grid.scaled == image.shape[:2]:
        return image
    return np.array(Image.fromarray(image).resize((grid.scaled[1], grid.scaled[0]), Image.Resampling.BILINEAR))


def patch_network(backbone: Backbone, device: torch.device) -> PatchNetwork:
    """The network of an evaluation's weights, for images of any size: its positions are interpolated.

    Raises:
        UserError: for a network whose patches have no features of their own.
    """
    vit: Any = backbone.build()
    if not hasattr(vit, "patch_embed") or not hasattr(vit, "num_prefix_tokens"):
        raise UserError(f"{backbone.source} is no ViT but a {type(vit).__name__}")
    side = None
    if isinstance(vit, VisionTransformer):
        embed: Any = vit.patch_embed
        vit.dynamic_img_size = True
        embed.strict_img_size = embed.flatten = False
        embed.output_fmt = Format.NHWC
    else:
        side = int(vit.patch_embed.img_size[0])
    model = vit.to(device).eval().requires_grad_(False)
    return PatchNetwork(model, backbone, device, int(vit.patch_embed.patch_size[0]), side)


class Kept:
    """What a function makes of each of some images: kept in memory in fp16 while there is room, else made again."""

    def __init__(self, make: Callable[[int], Float[Tensor, "rows columns dim"]], room: int):
        self.make, self.room = make, room
        self.found: dict[int, Tensor] = {}

    def __call__(self, place: int) -> Float[Tensor, "rows columns dim"]:
        """Of one image, in fp32."""
        if place in self.found:
            return self.found[place].float()
        made = self.make(place)
        small = made.half()
        size = small.numel() * small.element_size()
        # a feature beyond fp16's range would come back as infinite
        if size <= self.room and bool(small.isfinite().all()):
            self.room -= size
            self.found[place] = small
        return made
