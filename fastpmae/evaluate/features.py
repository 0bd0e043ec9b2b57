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
from fastpmae.run.stored_run import brought_here
from fastpmae_loaders import PlainViews, Samples, open_samples
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.help_texts import HELP_TEXTS
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.cli.terminal import tell
from fastpmae_loaders.engines.base import engine_for
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import loader_threads
from fastpmae_loaders.mixture import read_by, sources_named
from fastpmae_loaders.stores.address import Address
from fastpmae_loaders.stores.cache import CacheSettings
from fastpmae_loaders.values import checked
from fastpmae_loaders.write.outputs import open_output

Network = Literal["student", "labelling_teacher", "reconstruction_teacher", "random"]
Pool = Literal["class", "mean"]


@checked
def load_encoder(path: Address | Path | str, network: Network = "student") -> tuple[Encoder, Config]:
    """An encoder of a checkpoint or run folder, also at an address, in evaluation mode on the CPU, and the run's
    settings.

    Args:
        network: whose encoder; "random" draws the weights from the run's seed, for comparison.

    Raises:
        UserError: when the checkpoint cannot be read or the run has no such teacher.
    """
    with brought_here(path) as here:
        if tuned_weights(here) is not None:
            raise UserError(
                f"{path} holds a fine-tuned network: fastpmae-eval and fastpmae-export take it, this does not"
            )
        return encoder_of(find_checkpoint(here), network)


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
    checkpoint: Address | Path | str,
    beton: Samples | Address | Path | str | tuple[str, ...],
    *,
    network: Network = "student",
    pool: Pool = "class",
    batch_size: int = 64,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    workers: int = 0,
    crop_ratio: float = 0.875,
    cache: CacheSettings | None = None,
    progress: Progress | None = None,
) -> tuple[Float[np.ndarray, "images dim"], Int[np.ndarray, " images"]]:
    """Features of every image of a .beton or a set of them, resized and cut at the centre, in the file's order.

    Args:
        checkpoint: a checkpoint or a run folder, here or in a store.
        beton: whatever `open_samples` opens: images in a store too, and of several sources each image once, in the
            order of the sources.
        network: whose encoder (see `load_encoder`).
        pool: the class token, or the mean of the patch tokens.
        workers: loader threads; 0 takes all cores.
        crop_ratio: the shorter side is resized to the image size over this ratio, rounded down, and the centre cut out.
        cache: what keeps parts of images in stores on this machine.
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
    progress, images = progress or Progress(), open_samples(beton, cache=cache)
    views = PlainViews(
        images,
        batch_size,
        image_size=config.views.image_size,
        crop_ratio=crop_ratio,
        engine=engine_for(images, config.data.loader),
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
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")],
    beton: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="F.beton")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.npz")],
    network: Network = "student",
    pool: Pool = "class",
    batch_size: int = 64,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    workers: int = 0,
    crop_ratio: float = 0.875,
    cache: Path | None = None,
    cache_size: str = "100GB",
    force: bool = False,
) -> None:
    """Write the frozen features of every image of a .beton to OUT.npz, as `features` [n, dim] and `labels` [n].

    Args:
        checkpoint: A checkpoint or a run folder. It, the images and OUT.npz may lie in a store (s3://, gs://, az://).
        beton: The .beton file of the images, a set of them, a folder or tar shards; in quotes several of these.
        out: The .npz file to write.
        network: The network whose encoder is used; "random" draws its weights from the run's seed.
        pool: Features to write: the class token, or the mean of the patch tokens.
        batch_size: Images that the network computes at a time.
        device: Where to compute.
        workers: Loader threads; 0 takes all cores.
        crop_ratio: The shorter side is resized to the image size over this ratio, rounded down, and the centre cut out.
        cache: Folder that keeps parts of images in a store; by default fastpmae/stores in the user's folder of caches.
        cache_size: Size up to which that folder grows, as 200GB or 1.5TiB.
        force: Replace OUT.npz if it exists, but no file of a run and nothing that is read here.
    """
    images = sources_named(beton)
    read = [*read_by(images), *([] if Path(checkpoint).is_dir() else [checkpoint])]
    output = open_output(out, force=force, inputs=read)
    rows, labels = embed_images(
        checkpoint,
        images,
        network=network,
        pool=pool,
        batch_size=batch_size,
        device=device,
        workers=workers,
        crop_ratio=crop_ratio,
        cache=CacheSettings(cache, cache_size),
        progress=Progress(live=True),
    )
    with output.writing() as beside, beside.open("wb") as file:
        np.savez(file, features=rows, labels=labels)
    tell(f"{output.place}: {rows.shape[0]} features of {rows.shape[1]} numbers")


def main() -> int:
    """`fastpmae-embed`."""
    return exit_with_sentence(
        "fastpmae-embed", lambda: tyro.cli(embed_command, prog="fastpmae-embed", registry=HELP_TEXTS)
    )


if __name__ == "__main__":
    sys.exit(main())
