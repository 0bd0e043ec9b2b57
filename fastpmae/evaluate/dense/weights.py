"""`segmenter.safetensors` and `detector.safetensors`: written with all that they need, read as files of strangers."""

import json
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from fastpmae.evaluate.backbone import Backbone
from fastpmae.evaluate.classifier import timm_arguments_of
from fastpmae.evaluate.dense.rcnn import Detector
from fastpmae.evaluate.dense.upernet import Segmenter
from fastpmae.run.init_weights import TUNED
from fastpmae.weights.tensor_file import save_tensors
from fastpmae_loaders.files import atomic_write


def write_network(
    folder: Path, kind: str, model: Segmenter | Detector, backbone: Backbone, told: dict[str, Any]
) -> None:
    """Leave a trained network in a folder. Its encoder's tensors begin with `backbone.vit.`, under timm's names.

    Args:
        kind: "segment" or "detect".
        told: the settings under `kind`, and what the classes are called, for the header.
    """
    vit = model.backbone.vit
    arguments = timm_arguments_of(vit) if isinstance(vit, VisionTransformer) else {}
    header = {
        "format": "pt",
        "timm": json.dumps(arguments),
        "backbone": backbone.source,
        "mean": json.dumps(backbone.mean),
        "std": json.dumps(backbone.std),
        "image_size": json.dumps(backbone.image_size),
        **{name: json.dumps(value) for name, value in told.items()},
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / TUNED[kind]) as beside:
        save_tensors(tensors, beside, header)
