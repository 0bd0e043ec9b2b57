"""What a run's networks make of a few images: predictions, matches, attention, features, prototypes. Numbers only."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from fastpmae.config import Config
from fastpmae.evaluate.features import whole_tokens
from fastpmae.model.build import check, view_settings
from fastpmae.model.head import centred
from fastpmae.model.teachers import Teachers
from fastpmae.model.vit import Block, Encoder, Student
from fastpmae.pretraining.match_geometry import masked_overlaps
from fastpmae.pretraining.networks import make_networks
from fastpmae.pretraining.step import labelling_forward, teacher_forward
from fastpmae.run.checkpoint import Checkpoint, check_fits, restore_networks
from fastpmae_kernels import nearest_patch, sinkhorn
from fastpmae_loaders import Batch, PairedViews, Samples
from fastpmae_loaders.engines.base import engine_for
from fastpmae_loaders.errors import UserError


@dataclass(frozen=True)
class Analysis:
    """A batch as the student and the teachers see it."""

    config: Config
    step: int
    """Optimizer steps that the networks have behind them."""
    batch: Batch
    similarity: Float[Tensor, "batch masked"]
    """How near each predicted token is to its target: their cosine, in fold order."""
    match: Int[Tensor, "batch masked"] | None
    """The place in fold order of the teacher patch that each masked patch is matched with; None without labels."""
    overlap: Bool[Tensor, "batch masked"] | None
    """Whether the two share a part of the original image."""
    reachable: Bool[Tensor, "batch masked"] | None
    """Whether any of the teacher's masked patches does."""
    attention: Float[Tensor, "batch patches"]
    """What the class token of the whole simple view takes from each patch in the last block, mean over the heads."""
    colours: Float[Tensor, "batch patches 3"]
    """The first three principal components of the patch tokens of all images, each between 0 and 1."""


@dataclass(frozen=True)
class PrototypeUse:
    """The patches that lie nearest to the prototypes that are used most."""

    config: Config
    step: int
    images: int
    used: int
    """Prototypes that are the likeliest label of at least one patch."""
    prototypes: Int[Tensor, " shown"]
    shares: Float[Tensor, " shown"]
    """Share of all patches whose likeliest label it is."""
    patches: UInt8[Tensor, "shown best 3 side side"]
    """Pixels around each prototype's nearest patches, of different images, the nearest first."""


def networks_of(checkpoint: Checkpoint) -> tuple[Student, Teachers]:
    """A run's networks on the CPU, in evaluation mode.

    Raises:
        UserError: when the checkpoint holds other networks than its settings say.
    """
    check(checkpoint.config)
    config = checkpoint.phase.config
    check_fits(checkpoint, config)
    student, teachers = make_networks(config, 1, torch.device("cpu"), None)
    restore_networks(checkpoint, student, teachers)
    for module in (student, *teachers.modules().values()):
        module.eval()
    return student, teachers


def batch_of(config: Config, images: Samples, samples: int, index: tuple[int, ...] = ()) -> Batch:
    """The views that a run's loader makes of some images in its first epoch: the first of its order, or these."""
    settings = view_settings(config)
    with PairedViews(images, 1, engine_for(images, config.data.loader), settings, config.run.seed) as views:
        views.set_epoch(0)
        return views.batch_of(np.array(index or views.order(0)[:samples], np.int64))


@torch.no_grad()
def analyse(checkpoint: Checkpoint, images: Samples, samples: int = 6, index: tuple[int, ...] = ()) -> Analysis:
    """What the networks of a checkpoint make of some images.

    Raises:
        UserError: when the checkpoint or the images cannot be used.
    """
    student, teachers = networks_of(checkpoint)
    config = checkpoint.phase.config
    batch = batch_of(config, images, samples, index)
    predicted, _, _ = student(batch.simple, batch.visible, batch.folds)
    targets = teacher_forward(teachers, batch, config).targets
    match = overlap = reachable = None
    if targets.label_tokens is not None:
        loss = config.loss
        match = nearest_patch(predicted, targets.label_tokens, loss.match_metric, loss.match_scope, batch.fold_sizes)
        hits, candidates = masked_overlaps(batch, config)
        overlap = hits.gather(2, match.unsqueeze(2)).squeeze(2)
        reachable = (hits & candidates).any(dim=2)
    return Analysis(
        config,
        checkpoint.progress["step"],
        batch,
        F.cosine_similarity(predicted, targets.reconstruction, dim=2),
        match,
        overlap,
        reachable,
        class_attention(student.encoder, batch.simple),
        principal_colours(whole_tokens(student.encoder, batch.simple)[:, 1:]),
    )


@torch.no_grad()
def class_attention(
    encoder: Encoder, images: UInt8[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch patches"]:  # fmt: skip
    """The class token's attention to the patches of whole images in the last block, as a mean over the heads."""
    side = images.shape[-1] // encoder.patch_embed.patch_size
    ids = torch.arange(side * side, device=images.device).expand(len(images), -1)
    tokens = encoder.with_class_token(encoder.embed(images, ids))
    *before, last = encoder.blocks
    for block in before:
        tokens = block(tokens)
    assert isinstance(last, Block)
    heads, width = last.attn.heads, encoder.dim // last.attn.heads
    query, key, _ = last.attn.qkv(last.norm1(tokens)).unflatten(2, (3, heads, width)).unbind(2)
    products = torch.einsum("bhd,bthd->bht", query[:, 0], key) / math.sqrt(width)
    return products.softmax(dim=2)[:, :, 1:].mean(dim=1)


def principal_colours(tokens: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch patches 3"]:
    """The first three principal components over all tokens, each stretched so that 2 to 98 % of them fill 0 to 1.

    A component's sign is free: the one is taken in which its largest weight is positive.
    """
    rows = tokens.flatten(0, 1).double()
    rows = rows - rows.mean(dim=0)
    axes = torch.linalg.svd(rows, full_matrices=False).Vh[:3]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    values = rows @ (axes * largest.sign()).T
    low, high = (torch.quantile(values, share, dim=0) for share in (0.02, 0.98))
    colours = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    colours = F.pad(colours, (0, 3 - colours.shape[1]))
    return colours.unflatten(0, tokens.shape[:2]).float()


@torch.no_grad()
def prototype_use(
    checkpoint: Checkpoint, images: Samples, samples: int = 256, shown: int = 12, best: int = 8
) -> PrototypeUse:
    """The most used patch prototypes of a run's labelling teacher, by the patches that it sees in training.

    Raises:
        UserError: when the checkpoint or the images cannot be used, or when the run has no pseudo labels.
    """
    _, teachers = networks_of(checkpoint)
    config = checkpoint.phase.config
    if teachers.labelling is None:
        raise UserError(f"{checkpoint.path} holds no prototypes: {checkpoint.why_without}")
    batch = batch_of(config, images, min(samples, len(images)))
    plain = config.using(prototypes_chunk=0)
    _, (_, patch_logits) = labelling_forward(teachers.labelling, batch, plain)
    if config.loss.center_bottleneck:
        (patch_logits,) = centred([patch_logits])
    logits = patch_logits.matrix
    assert logits is not None
    labels = sinkhorn(logits, config.loss.epsilon, config.loss.sinkhorn_iterations).argmax(dim=1)
    counts = torch.bincount(labels, minlength=logits.shape[1])
    order = counts.argsort(descending=True, stable=True)[: min(shown, int((counts > 0).sum()))]
    count = len(batch)
    # of each image the one patch that is nearest, so that a row of pictures shows different images
    nearest, place = logits.view(count, -1, logits.shape[1])[:, :, order].max(dim=1)
    chosen = nearest.topk(min(best, count), dim=0).indices.T
    view = getattr(batch, config.views.labelling_view)
    ids = batch.folds.gather(1, place).T.gather(1, chosen)
    side = math.isqrt(batch.visible.shape[1] + batch.folds.shape[1])
    pixels = [_surroundings(view[one], number, side) for one, number in zip(chosen, ids, strict=True)]
    return PrototypeUse(
        config,
        checkpoint.progress["step"],
        count,
        int((counts > 0).sum()),
        order,
        counts[order] / counts.sum(),
        torch.stack(pixels),
    )


def _surroundings(
    images: UInt8[Tensor, "best 3 height width"], ids: Int[Tensor, " best"], side: int
) -> UInt8[Tensor, "best 3 around around"]:
    """Patches with a whole patch around them, or the image's edge repeated."""
    patch = images.shape[-1] // side
    wide = F.pad(images.float(), (patch,) * 4, mode="replicate").to(torch.uint8)
    tops, lefts = (ids // side * patch).tolist(), (ids % side * patch).tolist()
    return torch.stack(
        [
            image[:, top : top + 3 * patch, left : left + 3 * patch]
            for image, top, left in zip(wide, tops, lefts, strict=True)
        ]
    )
