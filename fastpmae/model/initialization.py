"""Initial weights: as MAE's code starts its networks and DINO's its head, and as timm starts a ViT."""

import torch
from torch import nn

from fastpmae.model.head import Head
from fastpmae.model.vit import Encoder


@torch.no_grad()
def initialise_as_timm(encoder: Encoder, generator: torch.Generator) -> None:
    """An encoder's weights as timm 0.3.2 starts a ViT, positions and all: tokens, positions and products normal .02,
    norms 1 and 0, the patch embedding as torch starts a convolution."""
    encoder.cls_token.normal_(std=0.02, generator=generator)
    encoder.pos_embed.normal_(std=0.02, generator=generator)
    reach = encoder.patch_embed.proj.weight[0].numel() ** -0.5
    for parameter in encoder.patch_embed.proj.parameters():
        parameter.uniform_(-reach, reach, generator=generator)
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=0.02, generator=generator)
            module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Weights as MAE starts them (xavier-uniform products, normal .02 tokens), and the head as DINO (truncated .02).

    A head's prototypes are truncated .02 too, or uniform as torch starts a linear layer where it says so.
    """
    uniform = any(isinstance(module, Head) and module.uniform_prototypes for module in network.modules())
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # MAE takes the patch embedding for the product it is.
            weight = module.weight.data.flatten(1)
            if name.split(".")[0] == "head":
                nn.init.trunc_normal_(weight, std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for name, parameter in network.named_parameters():
        if name.endswith(("cls_token", "mask_token")):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif name.endswith("_prototypes") and uniform:
            reach = parameter.shape[1] ** -0.5
            nn.init.uniform_(parameter, -reach, reach, generator=generator)
        elif name.endswith("_prototypes"):
            nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
