"""Frozen features: what an encoder makes of whole images."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fastpmae.config import Config
from fastpmae.distributed.ranks import choose_device, to_device
from fastpmae.model.build import check, make_encoder, make_student
from fastpmae.model.vit import Encoder
from fastpmae.run.checkpoint import Checkpoint, check_fits, find_checkpoint, require
from fastpmae.run.init_weights import tuned_weights
from fastpmae_loaders import Beton, PlainViews
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.outputs import check_output
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.cli.terminal import tell
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.machine import loader_threads
from fastpmae_loaders.sources.beton_set import is_set, open_set
from fastpmae_loaders.values import checked

Network = Literal["student", "labelling_teacher", "reconstruction_teacher", "random"]
Pool = Literal["class", "mean"]


@checked
def load_encoder(path: Path | str, network: Network = "student") -> tuple[Encoder, Config]:
    """An encoder of a checkpoint or run folder, in evaluation mode on the CPU, and the run's settings.

    Args:
        network: whose encoder; "random" draws the weights from the run's seed, for comparison.

    Raises:
        UserError: when the checkpoint cannot be read or the run has no such teacher.
    """
    if tuned_weights(Path(path)) is not None:
        raise UserError(f"{path} holds a fine-tuned network: fastpmae-eval and fastpmae-export take it, this does not")
    return encoder_of(find_checkpoint(Path(path)), network)


def encoder_of(checkpoint: Checkpoint, network: Network) -> tuple[Encoder, Config]:
    """The same of a checkpoint that is read already."""
    config = checkpoint.config_of_encoder
    check(config)
    check_fits(checkpoint, config)
    if network == "random":
        return make_student(config, torch.Generator().manual_seed(config.run.seed)).encoder.eval(), config
    single = config.teacher.teachers == "single"
    role = "labelling_teacher" if single and network != "student" else network
    weights = checkpoint.part(f"{role}.encoder")
    if not weights:
        raise UserError(f"{checkpoint.path} holds no {network}: {checkpoint.why_without}")
    with torch.device("meta"):
        like = make_encoder(config).state_dict()
    require(checkpoint, f"{role}.encoder", like)
    encoder = make_encoder(config)
    encoder.load_state_dict(weights)
    return encoder.eval(), config


@torch.no_grad()
def whole_tokens(encoder: Encoder, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens dim"]:
    """The class token and every patch token of whole images, after the final norm."""
    side = images.shape[-1] // encoder.patch_embed.patch_size
    return encoder(images, torch.arange(side * side, device=images.device).expand(len(images), -1))


def pooled(tokens: Float[Tensor, "batch tokens dim"], pool: Pool) -> Float[Tensor, "batch dim"]:
    """The class token, or the mean of the patch tokens."""
    return tokens[:, 0] if pool == "class" else tokens[:, 1:].mean(dim=1)


def features(
    encoder: Encoder, images: UInt8[Tensor, "batch 3 height width"], pool: Pool = "class"
) -> Float[Tensor, "batch dim"]:
    """Frozen features of whole images."""
    return pooled(whole_tokens(encoder, images), pool)


@checked
def embed_images(
    checkpoint: Path | str,
    beton: Path | str,
    *,
    network: Network = "student",
    pool: Pool = "class",
    batch_size: int = 64,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    workers: int = 0,
    crop_ratio: float = 0.875,
    progress: Progress | None = None,
) -> tuple[Float[np.ndarray, "images dim"], Int[np.ndarray, " images"]]:
    """Features of every image of a .beton or a set of them, resized and cut at the centre, in the file's order.

    Args:
        checkpoint: a checkpoint or a run folder.
        network: whose encoder (see `load_encoder`).
        pool: the class token, or the mean of the patch tokens.
        workers: loader threads; 0 takes all cores.
        crop_ratio: the shorter side is resized to the image size over this ratio, rounded down, and the centre cut out.
        progress: counts the images.

    Returns:
        Features in fp32 and labels in int64.

    Raises:
        UserError: when the checkpoint or the images cannot be used.
    """
    encoder, config = load_encoder(checkpoint, network)
    chosen = choose_device(device)
    encoder.to(chosen)
    rows, labels = [], []
    progress, images = progress or Progress(), open_set(beton) if is_set(beton) else Beton(beton)
    views = PlainViews(
        images,
        batch_size,
        image_size=config.views.image_size,
        crop_ratio=crop_ratio,
        engine=config.data.loader,
        workers=loader_threads(workers),
        pin_memory=chosen.type == "cuda",
    )
    with views, progress.count(len(images), "images"):
        for pictures, label, _ in views:
            rows.append(features(encoder, to_device(pictures, chosen), pool).float().cpu().numpy())
            labels.append(label.numpy())
            progress.advance(len(pictures))
    return np.concatenate(rows), np.concatenate(labels)


def embed_command(
    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")],
    beton: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="F.beton")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.npz")],
    network: Network = "student",
    pool: Pool = "class",
    batch_size: int = 64,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    workers: int = 0,
    crop_ratio: float = 0.875,
    force: bool = False,
) -> None:
    """Write the frozen features of every image of a .beton to OUT.npz, as `features` [n, dim] and `labels` [n].

    Args:
        checkpoint: A checkpoint or a run folder.
        beton: The .beton file of the images.
        out: The .npz file to write.
        network: The network whose encoder is used; "random" draws its weights from the run's seed.
        pool: Features to write: the class token, or the mean of the patch tokens.
        batch_size: Images that the network computes at a time.
        device: Where to compute.
        workers: Loader threads; 0 takes all cores.
        crop_ratio: The shorter side is resized to the image size over this ratio, rounded down, and the centre cut out.
        force: Replace OUT.npz if it exists, but no file of a run and nothing that is read here.
    """
    check_output(out, force=force, inputs=[checkpoint, beton] if checkpoint.is_file() else [beton])
    rows, labels = embed_images(
        checkpoint,
        beton,
        network=network,
        pool=pool,
        batch_size=batch_size,
        device=device,
        workers=workers,
        crop_ratio=crop_ratio,
        progress=Progress(live=True),
    )
    with atomic_write(out, force) as beside, beside.open("wb") as file:
        np.savez(file, features=rows, labels=labels)
    tell(f"{out}: {rows.shape[0]} features of {rows.shape[1]} numbers")


def main() -> int:
    """`fastpmae-embed`."""
    return exit_with_sentence("fastpmae-embed", lambda: tyro.cli(embed_command, prog="fastpmae-embed"))


if __name__ == "__main__":
    sys.exit(main())
