"""ViTs under other names than timm's: those of Hugging Face's transformers and of torchvision, brought to timm's."""

import re
from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

TRANSFORMERS = (
    (r"embeddings\.(cls_token)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"layernorm\.(\w+)", r"norm.\1"),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
)
"""ViTModel's names (see `fastpmae.export.transformers`), and what timm calls the same."""
TORCHVISION = (
    (r"class_token", "cls_token"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"conv_proj\.(\w+)", r"patch_embed.proj.\1"),
    (r"encoder\.ln\.(\w+)", r"norm.\1"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
)
"""Those of torchvision's VisionTransformer."""
BEGINNINGS = {
    "transformers": ("embeddings.patch_embeddings.projection.weight", TRANSFORMERS, ("pooler.", "classifier.")),
    "torchvision": ("conv_proj.weight", TORCHVISION, ("heads.",)),
}
"""A tensor that tells the project, its names, and what is no part of the encoder."""
OTHERS = {
    "rope_embed.periods": "DINOv3's ViT, which turns its tokens by their places and has no positions to add",
    "visual.conv1.weight": "OpenAI's CLIP, which timm has as timm:NAME",
    "vision_model.embeddings.patch_embedding.weight": "transformers' CLIP or SigLIP, which timm has as timm:NAME",
    "layer4.0.conv1.weight": "a ResNet",
    "layers.0.blocks.0.norm1.weight": "a Swin transformer",
    "stages.0.0.gamma": "a ConvNeXt",
}
"""Networks that are often met and are no plain ViT, by the end of a tensor's name."""

Project = Literal["transformers", "torchvision"]


def project_of(names: Mapping[str, object]) -> tuple[Project, str] | None:
    """Whose names these are, and what stands before them; None where nobody's that are known here."""
    for project, (tell, _, _) in BEGINNINGS.items():
        found = next((name for name in names if name == tell or name.endswith("." + tell)), None)
        if found is not None:
            return project, found.removesuffix(tell)  # pyright: ignore[reportReturnType]
    return None


def timm_name(name: str, project: Project) -> str | None:
    """What timm calls a tensor of a project's; None for what is no part of the encoder.

    Query, key and value, which timm keeps as one `qkv`, get a name each (see `joined`). A name that nobody knows stays.
    """
    _, pairs, outside = BEGINNINGS[project]
    if name.startswith(outside):
        return None
    for pattern, to in pairs:
        found = re.fullmatch(pattern, name)
        if found is not None:
            return found.expand(to)
    return name


def joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With query, key and value as the one tensor `qkv` that timm has; a part without the others keeps its name."""
    tensors = dict(tensors)
    for name in list(tensors):
        found = re.fullmatch(r"(.*\.attn\.)query(\.\w+)", name)
        if found is None:
            continue
        parts = [f"{found[1]}{part}{found[2]}" for part in ("query", "key", "value")]
        held = [tensors[part] for part in parts if part in tensors]
        if len(held) == 3 and len({part.shape for part in held}) == 1 and held[0].ndim:
            for part in parts:
                del tensors[part]
            tensors[f"{found[1]}qkv{found[2]}"] = torch.cat(held)
    return tensors


def known_other(names: Collection[str]) -> str:
    """What a file without a plain ViT seems to hold, in words that follow a comma; empty where nobody knows."""
    for tell, words in OTHERS.items():
        if any(name == tell or name.endswith("." + tell) for name in names):
            return f", but {words}"
    return ""
