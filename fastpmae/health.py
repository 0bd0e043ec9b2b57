"""Figures that make a collapse visible while the Sinkhorn assignment still hides it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fastpmae.losses import PseudoLabels
from fastpmae.step import Targets

MOST_TOKENS = 8192


@torch.no_grad()
def health(targets: Targets) -> dict[str, float]:
    """Prototypes in use, label entropy, spread and rank of the teachers' features, for one batch.

    Prototypes in use are counted by the largest raw logit of each row, before the assignment is balanced; entropies
    are in nats, to be read against `entropy_limit` = log P.
    """
    figures: dict[str, float] = {}
    for name, labels in (("class", targets.class_labels), ("patch", targets.patch_labels)):
        if labels is not None:
            nearest = [rows.argmax(dim=1) for rows in labels.logits.split(1024)]
            figures[f"{name}_prototypes_used"] = torch.cat(nearest).unique().numel()
            figures[f"{name}_label_entropy"] = label_entropy(labels)
            figures["entropy_limit"] = math.log(len(labels.logv))
    for name, tokens in (("reconstruction", targets.tokens), ("labelling", targets.label_tokens)):
        if tokens is not None:
            # Some thousand tokens, evenly spread, tell as much as all of them.
            rows = tokens.flatten(0, 1)
            figures[f"{name}_std"], figures[f"{name}_rank"] = spread(rows[:: 1 + len(rows) // MOST_TOKENS])
    return figures


def label_entropy(labels: PseudoLabels) -> float:
    """Mean entropy of the pseudo labels, in nats."""
    entropies = []
    for rows in labels.logits.split(1024):
        log_label = torch.log_softmax(rows.float() / labels.epsilon + labels.logv, dim=1)
        entropies.append(-(log_label.exp() * log_label).sum(dim=1))
    return torch.cat(entropies).mean().item()


def spread(tokens: Float[Tensor, "tokens dim"]) -> tuple[float, float]:
    """How far features differ from one another.

    Returns:
        The mean over the features of their standard deviation across tokens, for unit vectors scaled by sqrt(dim):
        1 where they point anywhere, 0 where all are the same. And the effective rank: the exponential of the entropy
        of the covariance's eigenvalues, between 1 and dim.
    """
    tokens = torch.nn.functional.normalize(tokens.double(), dim=1) * tokens.shape[1] ** 0.5
    centred = tokens - tokens.mean(dim=0)
    std = tokens.std(dim=0, correction=0).mean().item()
    eigenvalues = torch.linalg.eigvalsh(centred.mT @ centred / len(tokens)).clamp(min=0)
    total = eigenvalues.sum()
    if not total > 0:
        return std, 1.0
    share = eigenvalues / total
    return std, math.exp(-torch.xlogy(share, share).sum().item())
