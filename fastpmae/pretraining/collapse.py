"""Figures that tell whether the labels teach, and that show a collapse while the Sinkhorn assignment hides it."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from fastpmae.pretraining.losses import PseudoLabels
from fastpmae.pretraining.step import Targets
from fastpmae.run.device_metrics import Figures, to_host

MOST_TOKENS = 8192
FLAT = 0.2
"""Nats of class divergence below which the labels teach nothing that could be measured (docs/learning.md)."""
ENOUGH_ROWS = 5
AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Logits that are looked at together, two fp32 numbers for each: what a CPU's cache and what a GPU's cores ask for."""


def collapse_metrics(
    targets: Targets,
    label_losses: tuple[Float[Tensor, ""], Float[Tensor, ""]] | None = None,
    match: Int[Tensor, "batch masked"] | None = None,
) -> dict[str, float]:
    """Prototypes in use, label entropy, divergence, spread and rank of the teachers' features, for one micro-batch.

    Prototypes in use are counted by the largest raw logit of each row, before the assignment is balanced; entropies
    are in nats, to be read against `entropy_limit` = log P. A divergence is what of a label loss the student could
    still learn, in nats: the loss is the entropy of the labels, which nothing lowers, and their divergence from what
    the student says. Where it is near 0 from the start, there is nothing in the labels that the student does not know.
    A class token has the mean label of its image's folds to learn (equation 4), and it is that label's entropy which
    counts: what the folds say apart from their mean is `class_fold_divergence`, which no student can learn.

    Args:
        label_losses: of class and patch tokens, for this micro-batch; without them no divergence is told.
        match: that the patch loss has used.
    """
    return to_host(collapse_figures(targets, label_losses, match))()


@torch.no_grad()
def collapse_figures(
    targets: Targets,
    label_losses: tuple[Float[Tensor, ""], Float[Tensor, ""]] | None = None,
    match: Int[Tensor, "batch masked"] | None = None,
) -> Figures:
    """The figures of `collapse_metrics`, without waiting for the device."""
    numbers: list[Tensor] = []
    names: list[str] = []
    limits: dict[str, float] = {}
    for name, labels in (("class", targets.class_labels), ("patch", targets.patch_labels)):
        if labels is not None:
            of_patches = name == "patch"
            folds = 1 if of_patches else labels.logits.rows() // len(targets.reconstruction)
            used, entropy, of_mean = _labels(labels, folds)
            numbers += [used, entropy.mean(dtype=torch.float64)]
            names += [f"{name}_prototypes_used", f"{name}_label_entropy"]
            limits["entropy_limit"] = math.log(len(labels.logv))
            if folds > 1:
                numbers.append(of_mean.mean(dtype=torch.float64) - entropy.mean(dtype=torch.float64))
                names.append("class_fold_divergence")
            if label_losses is not None:
                if of_patches and match is not None:  # the loss reads the labels of the matched patches
                    of_mean = of_mean.view(match.shape).gather(1, match)
                numbers.append(label_losses[of_patches].double() - of_mean.mean(dtype=torch.float64))
                names.append(f"{name}_divergence")
    matrices: list[Tensor] = []
    ranks: list[str] = []
    for name, tokens in (("reconstruction", targets.tokens), ("labelling", targets.label_tokens)):
        if tokens is not None:
            # Some thousand tokens, evenly spread, tell as much as all of them.
            rows = tokens.flatten(0, 1)
            std, covariance = _token_std(rows[:: 1 + len(rows) // MOST_TOKENS])
            numbers.append(std)
            names.append(f"{name}_std")
            matrices.append(covariance)
            ranks.append(f"{name}_rank")

    def named(found: list[float], covariances: list[Tensor]) -> dict[str, float]:
        entries = dict(zip(names, found, strict=True)) | limits
        return entries | {name: effective_rank(each) for name, each in zip(ranks, covariances, strict=True)}

    device = targets.reconstruction.device
    whole = torch.stack(numbers) if numbers else torch.zeros(0, dtype=torch.float64, device=device)
    return Figures(whole, named, tuple(matrices))


class FlatLabels:
    """Warns, once, of class labels that late in a run still hold nothing that the student does not say already.

    Args:
        late: step from which on it looks.
        say: takes the warning.
    """

    def __init__(self, late: int, say: Callable[[str], None]):
        self.late, self.say = late, say
        self.seen = 0

    def look(self, figures: dict[str, float]) -> None:
        """Take in a row's figures."""
        divergence = figures.get("class_divergence")
        if divergence is None or figures["step"] < self.late or self.seen < 0:
            return
        self.seen = self.seen + 1 if divergence < FLAT else -1
        if self.seen == ENOUGH_ROWS:
            self.seen = -1
            self.say(
                f"warning: the class labels are nearly flat (class_divergence {divergence:.2f} nats, and under {FLAT} "
                f"in {ENOUGH_ROWS} rows): they teach the class token little. --class-epsilon 0.025 with "
                "--labelling-momentum 0.99 1 makes them form sooner; --lambda-c 0 does without them"
            )


def label_entropy(labels: PseudoLabels) -> float:
    """Mean entropy of the pseudo labels, in nats."""
    return _labels(labels, 1)[1].mean(dtype=torch.float64).item()


def token_std(tokens: Float[Tensor, "tokens dim"]) -> tuple[float, float]:
    """How far features differ from one another.

    Returns:
        The mean over the features of their standard deviation across tokens, for unit vectors scaled by sqrt(dim):
        1 where they point anywhere, 0 where all are the same. And their effective rank.
    """
    std, covariance = _token_std(tokens)
    return std.item(), effective_rank(covariance.cpu())


def effective_rank(covariance: Float64[Tensor, "dim dim"]) -> float:
    """The exponential of the entropy of the eigenvalues, between 1 and dim."""
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    total = eigenvalues.sum()
    if not total > 0:
        return 1.0
    share = eigenvalues / total
    return math.exp(-torch.xlogy(share, share).sum().item())


def _labels(
    labels: PseudoLabels, together: int
) -> tuple[Float64[Tensor, ""], Float[Tensor, " rows"], Float[Tensor, " means"]]:
    """How many prototypes are in use, the entropy of each label, and of the mean of so many labels at a time."""
    logv = labels.logv
    used = torch.zeros(len(logv), dtype=torch.bool, device=logv.device)
    entropies, of_means = [], []
    count = max(1, AT_ONCE.get(logv.device.type, AT_ONCE["cpu"]) // len(logv) // together) * together
    # The same memory for all parts: fresh pages cost a CPU more than the sums in them.
    logits, weights = torch.empty(2, count, len(logv), dtype=torch.float32, device=logv.device)
    for rows in labels.logits.split(count):
        used.index_fill_(0, rows.max(dim=1).indices, True)
        logit = torch.add(logv, rows, alpha=1 / labels.epsilon, out=logits[: len(rows)])
        logit -= logit.amax(dim=1, keepdim=True)
        weight = torch.exp(logit, out=weights[: len(rows)])
        norm = weight.sum(dim=1)
        entropies.append(norm.log() - logit.mul_(weight).sum(dim=1) / norm)
        if together > 1:
            mean = weight.div_(norm.unsqueeze(1)).view(-1, together, len(logv)).mean(dim=1)
            of_means.append(-torch.xlogy(mean, mean).sum(dim=1))
    entropy = torch.cat(entropies)
    return used.sum(dtype=torch.float64), entropy, torch.cat(of_means) if of_means else entropy


def _token_std(tokens: Float[Tensor, "tokens dim"]) -> tuple[Float64[Tensor, ""], Float64[Tensor, "dim dim"]]:
    """`token_std`'s first figure, and the covariance whose eigenvalues tell its second, times some number."""
    centred = torch.nn.functional.normalize(tokens.float(), dim=1) * tokens.shape[1] ** 0.5
    # Features that hardly differ are taken from one another before any sum rounds their difference away.
    centred = centred - centred[0]
    centred -= centred.mean(dim=0)
    std = centred.square().mean(dim=0, dtype=torch.float64).sqrt().mean()
    centred /= centred.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    # The sums alone need fp64: in fp32 their rounding would count as directions where there is but one.
    exact = centred.double()
    return std, exact.mT @ exact
