"""The encoder as others load it: timm's names in a safetensors file."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from safetensors.torch import save_file

from fastpmae.architecture import SHAPES, shape_of
from fastpmae.config import Config
from fastpmae.embed import Network, load_encoder
from fastpmae.errors import exit_with_sentence
from fastpmae.files import appearing


def timm_arguments(config: Config) -> dict[str, Any]:
    """What `timm.create_model` needs to build the encoder of these settings."""
    shape = shape_of(config.model)
    name = config.model.model
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


def export_encoder(checkpoint: Path | str, out: Path | str, network: Network = "student") -> dict[str, Any]:
    """Write an encoder to a safetensors file whose names are timm's.

    Returns:
        The arguments for `timm.create_model`, which are also in the file's header as JSON under "timm". Images are
        normalised with ImageNet's mean and spread.

    Raises:
        UserError: when the checkpoint cannot be used or the file not written.
    """
    encoder, config = load_encoder(checkpoint, network)
    arguments = timm_arguments(config)
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    with appearing(Path(out)) as beside:
        save_file(tensors, beside, {"format": "pt", "timm": json.dumps(arguments)})
    return arguments


def export_command(
    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.safetensors")],
    network: Network = "student",
) -> None:
    """Write the encoder of a run to OUT.safetensors with timm's names, and print the lines that load it.

    Args:
        checkpoint: A checkpoint or a run folder.
        out: The file to write.
        network: Whose encoder.
    """
    arguments = export_encoder(checkpoint, out, network)
    name = arguments.pop("model_name")
    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    print("import timm")
    print("from safetensors.torch import load_file")
    print()
    print(f"model = timm.create_model({name!r}, {words})")
    print(f"model.load_state_dict(load_file({str(out)!r}))")


def main() -> int:
    """`fastpmae-export`."""
    return exit_with_sentence("fastpmae-export", lambda: tyro.cli(export_command, prog="fastpmae-export"))


if __name__ == "__main__":
    sys.exit(main())
