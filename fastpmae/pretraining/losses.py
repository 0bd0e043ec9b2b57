"""The three losses of the paper (equations 1 to 5) and MAE's, as functions of tokens and logits."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fastpmae.model.head import PrototypeLogits, sinkhorn_biases
from fastpmae_kernels import patch_tokens


class PseudoLabels(NamedTuple):
    """Pseudo labels as the loss reads them: label r is `softmax(logits[r] / epsilon + logv)`."""

    logits: PrototypeLogits
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
    micro_batches: Sequence[Sequence[PrototypeLogits]],
    epsilons: Sequence[float],
    iterations: int,
    group: dist.ProcessGroup | None = None,
) -> list[list[PseudoLabels]]:
    """Labels of the rows of each micro-batch's logits, as if the rows of all of them stood together, and with those of
    every rank of `group`; class and patch logits apart. Nothing is copied.

    Args:
        micro_batches: for each its logits, of each kind of token.
        epsilons: of each kind of token.
    """
    biases = sinkhorn_biases(list(zip(*micro_batches, strict=True)), epsilons, iterations, group)
    return [
        [PseudoLabels(*labels) for labels in zip(logits, biases, epsilons, strict=True)] for logits in micro_batches
    ]


def class_loss(
    student_logits: PrototypeLogits, labels: PseudoLabels, folds: int, temperature: float
) -> Float[Tensor, ""]:
    """L_c: the student's class token against the mean label of the teacher's class tokens of all folds (equation 4).

    The cross-entropy is linear in its target, so the mean over the folds of the losses is the loss of the mean.

    Args:
        labels: of batch x folds rows, the folds of one image side by side.
    """
    repeated = student_logits.repeat_rows(folds)
    index = torch.arange(repeated.rows(), device=labels.logv.device)
    return repeated.cross_entropy(labels.logits, labels.logv, index, labels.epsilon, temperature)


def patch_loss(
    student_logits: PrototypeLogits, labels: PseudoLabels, match: Int[Tensor, "batch masked"], temperature: float
) -> Float[Tensor, ""]:
    """L_p: each masked patch of the student against the label of its matched teacher patch (equation 3).

    Args:
        student_logits: the gradient is written over them, so nothing may read them afterwards (a leaf's are spared).
    """
    batch, masked = match.shape
    index = (match + torch.arange(batch, device=match.device).unsqueeze(1) * masked).flatten()
    return student_logits.cross_entropy(labels.logits, labels.logv, index, labels.epsilon, temperature, overwrite=True)
