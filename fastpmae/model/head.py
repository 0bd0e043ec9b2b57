"""The projection head, and logits over the prototypes in the form that costs least until they are read."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

import fastpmae_kernels as kernels
from fastpmae.distributed.dtensor import is_sharded
from fastpmae.model.chunked_loss import mean_in_chunks
from fastpmae.model.recompute import gelu_linear


class PrototypeLogits(NamedTuple):
    """Logits of rows of tokens over the prototypes, each the cosine of a token's feature with a prototype.

    Held in one of three forms: as a matrix; as its factors, to be multiplied out where the logits are read; or as the
    tokens themselves, which the head sees while their loss is computed. Whoever reads them need not know which.
    """

    matrix: Float[Tensor, "rows prototypes"] | None = None
    features: Float[Tensor, "rows bottleneck"] | None = None
    prototypes: Float[Tensor, "prototypes bottleneck"] | None = None
    tokens: Float[Tensor, "rows dim"] | None = None
    head: "Head | None" = None
    """What makes factors of the tokens; its weights get their gradients with the tokens."""
    chunk: int = 0
    """Rows that are multiplied out at a time; 0 for all of them."""

    def rows(self) -> int:
        """How many tokens these are the logits of."""
        for each in (self.matrix, self.features, self.tokens):
            if each is not None:
                return len(each)
        raise ValueError("logits of nothing")

    def split(self, rows: int) -> Iterator[Float[Tensor, "_rows prototypes"]]:
        """The logits as matrices of so many rows, one after the other; of tokens there are none to be had."""
        if self.matrix is not None:
            yield from self.matrix.split(rows)
            return
        assert self.features is not None
        assert self.prototypes is not None
        for features in self.features.split(rows):
            yield features @ self.prototypes.T

    def repeat_rows(self, times: int) -> "PrototypeLogits":
        """Each row so many times, one beside the other."""
        matrix, features, tokens = (
            None if rows is None else rows.repeat_interleave(times, dim=0)
            for rows in (self.matrix, self.features, self.tokens)
        )
        return PrototypeLogits(matrix, features, self.prototypes, tokens, self.head, self.chunk)

    def sinkhorn_bias(
        self, epsilon: float, iterations: int, group: dist.ProcessGroup | None = None
    ) -> Float[Tensor, " prototypes"]:
        """The bias that makes these logits pseudo labels, over the rows of every rank (see `fastpmae_kernels`)."""
        if self.matrix is not None:
            return kernels.sinkhorn_bias(self.matrix, epsilon, iterations, group)
        assert self.features is not None
        assert self.prototypes is not None
        with torch.autocast(self.features.device.type, enabled=False):
            return kernels.sinkhorn_bias_from_features(
                self.features, self.prototypes, epsilon, iterations, group, self.chunk
            )

    def cross_entropy(
        self,
        teacher: "PrototypeLogits",
        logv: Float[Tensor, " prototypes"],
        index: Int[Tensor, " rows"],
        epsilon: float,
        temperature: float,
        overwrite: bool = False,
    ) -> Float[Tensor, ""]:
        """The mean over these rows, a student's, of the cross-entropy with a teacher's pseudo label.

        Args:
            teacher: the logits of the labels; factors where these are tokens or factors in chunks.
            logv: what `sinkhorn_bias` gave for them at `epsilon`.
            index: the teacher's row for each of these.
            temperature: the student's.
            overwrite: nothing reads these logits afterwards, so that the gradient may take their place (but a leaf's).
        """
        if self.tokens is not None:
            return self._cross_entropy_in_chunks(teacher, logv, index, epsilon, temperature)
        settings = logv, index, epsilon, temperature
        if self.matrix is not None:
            assert teacher.matrix is not None
            return kernels.prototype_cross_entropy(
                self.matrix, teacher.matrix, *settings,
                overwrite=overwrite and not self.matrix.is_leaf, expected_gradient=1 / len(index),
            ).mean()  # fmt: skip
        assert self.features is not None
        assert self.prototypes is not None
        if teacher.matrix is not None:
            return kernels.prototype_cross_entropy_of_product(
                self.features, self.prototypes, teacher.matrix, *settings, expected_gradient=1 / len(index)
            ).mean()
        assert teacher.features is not None
        assert teacher.prototypes is not None
        with torch.autocast(index.device.type, enabled=False):
            return kernels.prototype_cross_entropy_from_features(
                self.features, self.prototypes, teacher.features, teacher.prototypes, *settings, self.chunk
            )

    def _cross_entropy_in_chunks(
        self,
        teacher: "PrototypeLogits",
        logv: Float[Tensor, " prototypes"],
        index: Int[Tensor, " rows"],
        epsilon: float,
        temperature: float,
    ) -> Float[Tensor, ""]:
        """The same with nothing whole of what the head makes of the tokens."""
        head, tokens, chunk = self.head, self.tokens, self.chunk
        assert head is not None
        assert tokens is not None

        def loss_of(part: Float[Tensor, "chunk dim"], rows: slice) -> Float[Tensor, ""]:
            return head.patch_factors(part, chunk).cross_entropy(teacher, logv, index[rows], epsilon, temperature)

        weights = [parameter for name, parameter in head.named_parameters() if name != "class_prototypes"]
        return mean_in_chunks(loss_of, tokens, weights, chunk)


def sinkhorn_biases(
    logits: Sequence[Sequence[PrototypeLogits]],
    epsilons: Sequence[float],
    iterations: int,
    group: dist.ProcessGroup | None = None,
) -> list[Float[Tensor, " _prototypes"]]:
    """The bias of each of several logits, balanced apart, whose sums travel between the ranks in as few messages as
    there can be.

    Args:
        logits: each as the blocks of rows that it consists of, all of one form; matrices are read where they lie.
        epsilons: of each.
    """
    matrices = [[block.matrix for block in blocks if block.matrix is not None] for blocks in logits]
    whole = [blocks for blocks in matrices if blocks]
    theirs = [epsilon for blocks, epsilon in zip(matrices, epsilons, strict=True) if blocks]
    together = iter(kernels.sinkhorn_biases(whole, theirs, iterations, group) if whole else ())
    return [
        next(together) if matrix else _joined(blocks).sinkhorn_bias(epsilon, iterations, group)
        for matrix, blocks, epsilon in zip(matrices, logits, epsilons, strict=True)
    ]


def centred(
    blocks: Sequence[PrototypeLogits], group: dist.ProcessGroup | None = None, chunk: int = 0
) -> list[PrototypeLogits]:
    """Logits of features from which their mean has been taken, over the rows of all blocks and of every rank.

    Args:
        blocks: as `Head.uncentred` gives them, all of class or all of patch tokens.
        chunk: leaves them as factors, to be multiplied out for so many rows at a time; 0 multiplies them out here.
    """
    features, prototypes = [block.features for block in blocks if block.features is not None], blocks[0].prototypes
    assert prototypes is not None
    finer = torch.promote_types(features[0].dtype, torch.float32)
    features = [rows.to(finer) for rows in features]
    sums = torch.stack([rows.sum(dim=0, dtype=torch.float64) for rows in features]).sum(dim=0)
    sums = torch.cat([sums, sums.new_full((1,), sum(map(len, features)))])
    if group is not None:
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    mean = (sums[:-1] / sums[-1]).to(finer)
    units = [F.normalize(rows - mean, dim=-1) for rows in features]
    if chunk == 0:
        return [PrototypeLogits(F.linear(rows, prototypes)) for rows in units]
    kind = mean.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else mean.dtype
    return [PrototypeLogits(features=rows.to(dtype), prototypes=prototypes.to(dtype), chunk=chunk) for rows in units]


def _joined(blocks: Sequence[PrototypeLogits]) -> PrototypeLogits:
    """Factors of blocks of rows as those of all rows."""
    if len(blocks) == 1:
        return blocks[0]
    features = torch.cat([block.features for block in blocks if block.features is not None])
    return blocks[0]._replace(features=features)


class Head(nn.Module):
    """Tokens to prototype logits: an MLP, a unit vector, and its cosine with each prototype (MC-SSL, DINO).

    The prototypes are the rows of two weight-normed layers without bias whose gain is frozen at 1, one layer for
    class tokens and one for patch tokens.

    Args:
        uniform_prototypes: how `initialise` starts them.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int, *, uniform_prototypes: bool = False):
        super().__init__()
        self.uniform_prototypes = uniform_prototypes
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, bottleneck)
        self.class_prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.patch_prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))

    def forward(
        self, class_tokens: Float[Tensor, "classes dim"], patch_tokens: Float[Tensor, "patches dim"], chunk: int = 0
    ) -> tuple[PrototypeLogits, PrototypeLogits]:
        """Logits of class and patch tokens.

        With `chunk` above 0 those of the patches, which are many, are left as factors; where a gradient is due the
        tokens are left as they are (not under torch.compile, which cannot trace what becomes of them, nor under FSDP2:
        the weights are whole in here alone). Under torch.compile they are factors wherever a gradient is due, whole or
        in chunks: it would copy the gradient of logits that it has multiplied out.
        """
        class_logits = PrototypeLogits(F.linear(*self.factors(class_tokens, self.class_prototypes)))
        due, compiled = torch.is_grad_enabled(), torch.compiler.is_compiling()
        if chunk == 0 and not (due and compiled):
            return class_logits, PrototypeLogits(F.linear(*self.factors(patch_tokens, self.patch_prototypes)))
        if due and not compiled and not is_sharded(self):
            return class_logits, PrototypeLogits(tokens=patch_tokens, head=self, chunk=chunk)
        return class_logits, self.patch_factors(patch_tokens, chunk)

    def uncentred(
        self, class_tokens: Float[Tensor, "classes dim"], patch_tokens: Float[Tensor, "patches dim"]
    ) -> tuple[PrototypeLogits, PrototypeLogits]:
        """Features of class and patch tokens before they are centred and made unit vectors, with their prototypes."""
        return (
            PrototypeLogits(features=self.mlp(class_tokens), prototypes=F.normalize(self.class_prototypes, dim=-1)),
            PrototypeLogits(features=self.mlp(patch_tokens), prototypes=F.normalize(self.patch_prototypes, dim=-1)),
        )

    def patch_factors(self, tokens: Float[Tensor, "patches dim"], chunk: int) -> PrototypeLogits:
        """The logits of patch tokens as factors, in the precision that their product would have here."""
        features, prototypes = self.factors(tokens, self.patch_prototypes)
        kind = tokens.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype
        return PrototypeLogits(features=features.to(dtype), prototypes=prototypes.to(dtype), chunk=chunk)

    def factors(
        self, tokens: Float[Tensor, "rows dim"], prototypes: Float[Tensor, "prototypes bottleneck"]
    ) -> tuple[Float[Tensor, "rows bottleneck"], Float[Tensor, "prototypes bottleneck"]]:
        """Unit vectors whose products are the logits of tokens over `prototypes`."""
        return F.normalize(self.mlp(tokens), dim=-1), F.normalize(prototypes, dim=-1)

    def mlp(self, tokens: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows bottleneck"]:
        """Features as they are before they become unit vectors."""
        return gelu_linear(gelu_linear(self.fc1(tokens), self.fc2), self.fc3)
