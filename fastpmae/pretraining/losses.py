"""The three losses of the paper (equations 1 to 5) and MAE's, as functions of tokens and logits."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fastpmae.model.vit import Factors, Unseen
from fastpmae.pretraining.chunked_loss import mean_in_chunks
from fastpmae_kernels import (
    patch_tokens,
    prototype_cross_entropy,
    prototype_cross_entropy_from_features,
    prototype_cross_entropy_of_product,
    sinkhorn_bias_from_features,
    sinkhorn_biases,
)

Logits = Float[Tensor, "_rows _prototypes"] | Factors


class PseudoLabels(NamedTuple):
    """Pseudo labels as the loss reads them: label r is `softmax(logits[r] / epsilon + logv)`."""

    logits: Logits
    logv: Float[Tensor, " prototypes"]
    epsilon: float


def reconstruction_target(tokens: Float[Tensor, "batch masked dim"]) -> Float[Tensor, "batch masked dim"]:
    """The teacher's tokens, each with mean 0 and variance 1 over its features (equation 2, unbiased variance)."""
    variance, mean = torch.var_mean(tokens.float() if tokens.dtype != torch.float64 else tokens, -1, keepdim=True)
    return (tokens - mean) / (variance + 1e-6).sqrt()


def reconstruction_loss(
    predicted: Float[Tensor, "batch masked dim"],
    target: Float[Tensor, "batch masked dim"],
    axis: Literal["feature", "token"] = "feature",
    fold_sizes: Sequence[int] = (),
) -> Float[Tensor, ""]:
    """L_m: one minus the cosine, over the features of each masked token (equation 1).

    Args:
        axis: "token" takes the cosine of each feature over the tokens of each fold instead, and the mean over folds and
            features, as SdAE's released code does (engine_pretrain.py: the folds are rows of its batch).
        fold_sizes: how many of the masked tokens are in each fold, in their order; only "token" asks for them.
    """
    predicted = predicted.to(target.dtype)
    if axis == "feature":
        return 1 - F.cosine_similarity(predicted, target, dim=2, eps=1e-8).mean()
    folds = zip(predicted.split(list(fold_sizes), 1), target.split(list(fold_sizes), 1), strict=True)
    return 1 - torch.stack([F.cosine_similarity(*fold, dim=1, eps=1e-8) for fold in folds]).mean()


def pixel_target(
    images: UInt8[Tensor, "batch 3 height width"], masked: Int[Tensor, "batch masked"], patch_size: int
) -> Float[Tensor, "batch masked pixels"]:
    """MAE's target: each patch with mean 0 and variance 1 over its values, pixel by pixel and channels last.

    The mean and std of a patch are taken over its normalised values, all channels together.
    """
    values = patch_tokens(images, masked, patch_size).unflatten(-1, (3, -1)).mT.flatten(-2)
    variance, mean = torch.var_mean(values, -1, keepdim=True)
    return (values - mean) / (variance + 1e-6).sqrt()


def pixel_loss(
    predicted: Float[Tensor, "batch masked values"], target: Float[Tensor, "batch masked values"]
) -> Float[Tensor, ""]:
    """MAE's loss: the mean squared error over the masked patches."""
    finer = torch.promote_types(predicted.dtype, target.dtype)
    return F.mse_loss(predicted.to(finer), target.to(finer))


def pseudo_labels(
    logits: Sequence[Logits], epsilon: float, iterations: int, group: dist.ProcessGroup | None = None
) -> list[PseudoLabels]:
    """Labels of the rows of each matrix, balanced apart, and together with the rows of every rank of `group`."""
    return pseudo_labels_of_micro_batches([logits], epsilon, iterations, group)[0]


def pseudo_labels_of_micro_batches(
    parts: Sequence[Sequence[Logits]], epsilon: float, iterations: int, group: dist.ProcessGroup | None = None
) -> list[list[PseudoLabels]]:
    """Labels of the matrices of each part of a batch, as if the parts' rows stood in one matrix: nothing is copied."""
    matrices: list[list[Logits]] = [list(blocks) for blocks in zip(*parts, strict=True)]
    plain = [blocks for blocks in matrices if not isinstance(blocks[0], Factors)]
    biases = sinkhorn_biases(plain, epsilon, iterations, group)  # pyright: ignore[reportArgumentType]
    for place, blocks in enumerate(matrices):
        factors = [block for block in blocks if isinstance(block, Factors)]
        if factors:
            features = torch.cat([each.features for each in factors]) if len(factors) > 1 else factors[0].features
            with torch.autocast(features.device.type, enabled=False):
                _, prototypes, chunk = factors[0]
                bias = sinkhorn_bias_from_features(features, prototypes, epsilon, iterations, group, chunk)
            biases.insert(place, bias)
    return [[PseudoLabels(*labels, epsilon) for labels in zip(part, biases, strict=True)] for part in parts]


def class_loss(
    student_logits: Float[Tensor, "batch prototypes"], labels: PseudoLabels, folds: int, temperature: float
) -> Float[Tensor, ""]:
    """L_c: the student's class token against the mean label of the teacher's class tokens of all folds (equation 4).

    The cross-entropy is linear in its target, so the mean over the folds of the losses is the loss of the mean.

    Args:
        labels: of batch x folds rows, the folds of one image side by side.
    """
    assert isinstance(labels.logits, Tensor)
    rows = student_logits.repeat_interleave(folds, dim=0)
    index = torch.arange(len(rows), device=rows.device)
    return prototype_cross_entropy(
        rows, labels.logits, labels.logv, index, labels.epsilon, temperature, expected_gradient=1 / len(rows)
    ).mean()


def patch_loss(
    student_logits: Float[Tensor, "rows prototypes"] | Factors | Unseen,
    labels: PseudoLabels,
    match: Int[Tensor, "batch masked"],
    temperature: float,
) -> Float[Tensor, ""]:
    """L_p: each masked patch of the student against the label of its matched teacher patch (equation 3).

    Args:
        student_logits: the gradient is written over them, so nothing may read them afterwards (a leaf's are spared).
            No logits, but factors or tokens, where the labels' logits are factors; factors also under torch.compile.
    """
    batch, masked = match.shape
    rows = batch * masked
    index = (match + torch.arange(batch, device=match.device).unsqueeze(1) * masked).flatten()
    if isinstance(student_logits, Factors) and isinstance(labels.logits, Tensor):
        return prototype_cross_entropy_of_product(
            *student_logits[:2], labels.logits, labels.logv, index, labels.epsilon, temperature,
            expected_gradient=1 / rows,
        ).mean()  # fmt: skip
    if not isinstance(student_logits, Tensor):
        return _patch_loss_in_chunks(student_logits, labels, index, temperature)
    assert isinstance(labels.logits, Tensor)
    spared = student_logits.is_leaf
    return prototype_cross_entropy(
        student_logits, labels.logits, labels.logv, index, labels.epsilon, temperature,
        overwrite=not spared, expected_gradient=1 / rows,
    ).mean()  # fmt: skip


def _patch_loss_in_chunks(
    student: Factors | Unseen, labels: PseudoLabels, index: Int[Tensor, " rows"], temperature: float
) -> Float[Tensor, ""]:
    """The same where the logits of neither side are ever written whole, nor what the head makes of `Unseen` tokens."""
    theirs, chunk = labels.logits, student.chunk
    assert isinstance(theirs, Factors)

    def loss_of(ours: Factors, rows: slice) -> Float[Tensor, ""]:
        with torch.autocast(index.device.type, enabled=False):
            return prototype_cross_entropy_from_features(
                *ours[:2], *theirs[:2], labels.logv, index[rows], labels.epsilon, temperature, chunk
            )

    if isinstance(student, Factors):
        return loss_of(student, slice(None))
    head, tokens, _ = student
    weights = [parameter for name, parameter in head.named_parameters() if name != "class_prototypes"]
    return mean_in_chunks(lambda part, rows: loss_of(head.patch_factors(part, chunk), rows), tokens, weights, chunk)
