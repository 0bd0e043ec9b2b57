"""An encoder as Hugging Face's transformers opens it: ViTModel's names and its config.json, written without it."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastpmae.model.build import Shape
from fastpmae.run.init_weights import few, with_class_position
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.recipes import resized_side

OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
INSIDE = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def transformers_names(tensors: dict[str, Float[Tensor, "..."]]) -> dict[str, Float[Tensor, "..."]]:
    """timm's tensors under ViTModel's names, the joint query, key and value product cut in three.

    These are the names of transformers 4 and of every ViT on the hub, which transformers 5 reads as well.

    Raises:
        UserError: for what ViTModel has no place for (LayerScale, registers), or a ViT that lacks what it needs.
    """
    tensors = dict(tensors)
    missing = [
        name for name in ("cls_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias") if name not in tensors
    ]
    if missing:
        raise UserError(f"transformers' ViTModel needs {few(missing)}, which this network lacks: use --format timm")
    renamed: dict[str, Tensor] = {}
    left = []
    for name, tensor in tensors.items():
        words = name.split(".")
        stem, _, kind = name.rpartition(".")
        layer, inner = ".".join(["encoder.layer", *words[1:2]]), ".".join(words[2:-1])
        if name in OUTSIDE:
            renamed[OUTSIDE[name]] = tensor
        elif stem in OUTSIDE:
            renamed[f"{OUTSIDE[stem]}.{kind}"] = tensor
        elif words[0] == "blocks" and inner == "attn.qkv":
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{layer}.attention.attention.{part}.{kind}"] = third
        elif words[0] == "blocks" and inner in INSIDE:
            renamed[f"{layer}.{INSIDE[inner]}.{kind}"] = tensor
        else:
            left.append(name)
    if left:
        raise UserError(f"transformers' ViTModel has no place for {few(left)}: use --format timm")
    renamed[OUTSIDE["pos_embed"]] = with_class_position(tensors["pos_embed"])
    return {name: tensor.contiguous().clone() for name, tensor in renamed.items()}


def model_config(shape: Shape, image_size: int, classes: list[str] | None) -> dict[str, Any]:
    """What config.json says: the sizes of the network, and the classes where it has a classifier."""
    config: dict[str, Any] = {
        "architectures": ["ViTModel" if classes is None else "ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": int(shape.width * shape.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "image_size": image_size,
        "patch_size": shape.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "torch_dtype": str(torch.float32).removeprefix("torch."),
    }
    if classes is not None:
        config["id2label"] = {str(number): name for number, name in enumerate(classes)}
        config["label2id"] = {name: number for number, name in enumerate(classes)}
    return config


def image_config(image_size: int, mean: tuple[float, ...], std: tuple[float, ...], crop_ratio: float) -> dict[str, Any]:
    """What preprocessor_config.json says: images as they were evaluated (shorter side resized, the centre cut out)."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": resized_side(image_size, crop_ratio)},
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
