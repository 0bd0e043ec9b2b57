"""The networks: a ViT encoder with timm's parameter names, the decoder, the student.

Nothing here knows of teachers, losses or the loop. Tokens are named by their place: `ids` are patch numbers, row by
row, and a network only ever sees the patches it is given.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpmae.model.attention import SequenceLengths
from fastpmae.model.head import Head, PrototypeLogits
from fastpmae.model.patches import positions_on, sincos_positions
from fastpmae.model.recompute import add_mlp, attend, norm_linear
from fastpmae_kernels import patch_tokens


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        norm: nn.LayerNorm,
        last: int | None = None,
        sequence_lengths: SequenceLengths | None = None,
    ) -> Float[Tensor, "batch last dim"]:
        """What each of the `last` tokens (by default all) takes from all of them, after `norm`."""
        return self.proj(attend(tokens, norm, self.qkv, self.heads, last, sequence_lengths))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        norm: nn.LayerNorm,
        scale: Float[Tensor, "batch 1 1"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens, each with what the layers make of it, after `norm`."""
        return add_mlp(tokens, norm, self.fc1, self.fc2, scale)


class Block(nn.Module):
    """A pre-norm transformer block; `keep` scales each of its two branches per image (stochastic depth)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        drop_path_scale: Float[Tensor, "batch 2"] | None = None,
        last: int | None = None,
        sequence_lengths: SequenceLengths | None = None,
    ) -> Float[Tensor, "batch last dim"]:
        """The tokens after the block, or the `last` of them where nothing reads the others.

        Args:
            sequence_lengths: of the sequences packed into one row.
        """
        mixed = self.attn(tokens, self.norm1, last, sequence_lengths)
        if last is not None:
            tokens = tokens[:, tokens.shape[1] - last :]
        if drop_path_scale is None:
            return self.mlp(tokens + mixed, self.norm2)
        drop_path_scale = drop_path_scale.to(tokens.dtype)[..., None, None]
        return self.mlp(tokens + drop_path_scale[:, 0] * mixed, self.norm2, drop_path_scale[:, 1])


class Blocks(nn.ModuleList):
    """Transformer blocks one after the other.

    Args:
        recompute_every: of every so many blocks one keeps nothing but its input for the backward pass, and is computed
            anew there; 0: none does.
    """

    def __init__(self, depth: int, dim: int, heads: int, mlp_ratio: float, recompute_every: int):
        super().__init__(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.recompute_every = recompute_every

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        drop_path_scale: Float[Tensor, "batch depth 2"] | None = None,
        last: int | None = None,
        sequence_lengths: SequenceLengths | None = None,
    ) -> Float[Tensor, "batch last dim"]:
        """The tokens after all blocks; `last` is the last block's."""
        for depth, block in enumerate(self):
            given = (
                tokens,
                None if drop_path_scale is None else drop_path_scale[:, depth],
                last if depth == len(self) - 1 else None,
                sequence_lengths,
            )
            if self.recompute_every and depth % self.recompute_every == 0 and torch.is_grad_enabled():
                # Nothing in a block is random: stochastic depth is drawn before.
                tokens = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(*given)
        return tokens


class PatchEmbed(nn.Module):
    """timm's patch embedding by name and shape, applied as a product to the patches that are asked for."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(
        self, images: UInt8[Tensor, "batch 3 height width"], ids: Int[Tensor, "batch count"]
    ) -> Float[Tensor, "batch count dim"]:
        weight = self.proj.weight.flatten(1)
        # The product would round the pixels to autocast's type anyway: they are written in it at once.
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return F.linear(patch_tokens(images, ids, self.patch_size, dtype), weight, self.proj.bias)


class Encoder(nn.Module):
    """A ViT that embeds and encodes only the patches it is asked for.

    Args:
        image_size, patch_size: in pixels; the patch size divides the image size. Images of another size are taken as
            the same extent in other patches (see `positions_on`).
        dim, depth, heads, mlp_ratio: the ViT's.
        recompute_every: see `Blocks`.
    """

    def __init__(
        self, image_size: int, patch_size: int, dim: int, depth: int, heads: int, mlp_ratio: float = 4.0,
        recompute_every: int = 0,
    ):  # fmt: skip
        super().__init__()
        side = image_size // patch_size
        self.dim, self.depth = dim, depth
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = torch.cat([torch.zeros(1, dim), sincos_positions(side, side, dim)])
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", positions.unsqueeze(0))
        self.blocks = Blocks(depth, dim, heads, mlp_ratio, recompute_every)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        ids: Int[Tensor, "batch count"],
        drop_path_scale: Float[Tensor, "batch depth 2"] | None = None,
    ) -> Float[Tensor, "batch 1+count dim"]:
        """The class token, then the tokens of the patches `ids` in that order, after the final norm."""
        return self.encode(self.embed(images, ids), drop_path_scale)

    def embed(
        self, images: UInt8[Tensor, "batch 3 height width"], ids: Int[Tensor, "batch count"]
    ) -> Float[Tensor, "batch count dim"]:
        """Patch embeddings with their positions, without the class token."""
        side = images.shape[-1] // self.patch_embed.patch_size
        return self.patch_embed(images, ids) + positions_on(self.pos_embed, side)[0, 1:][ids]

    def encode(
        self, tokens: Float[Tensor, "batch count dim"], drop_path_scale: Float[Tensor, "batch depth 2"] | None = None
    ) -> Float[Tensor, "batch 1+count dim"]:
        return self.norm(self.blocks(self.with_class_token(tokens), drop_path_scale))

    def with_class_token(self, tokens: Float[Tensor, "batch count dim"]) -> Float[Tensor, "batch 1+count dim"]:
        """Embedded patches behind the class token, as the blocks take them."""
        class_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return torch.cat([class_token.to(tokens.dtype), tokens], dim=1)

    def encode_folds(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        folds: Int[Tensor, "batch masked"],
        fold_sizes: Sequence[int],
    ) -> tuple[Float[Tensor, "batch folds dim"], Float[Tensor, "batch masked dim"]]:
        """Each fold of each image on its own, with a class token of its own (paper, section 3.1, multifold).

        Returns:
            The folds' class tokens, and all patch tokens in the order of `folds`.
        """
        batch, dim = len(images), self.dim
        embedded = self.embed(images, folds)
        stacks, start = [], 0
        # Folds differ in size by at most one, the larger first, so this is one stack of equal folds, or two.
        for size, same in itertools.groupby(fold_sizes):
            count = len(list(same))
            part = embedded[:, start : start + count * size]
            stacks.append(self.with_class_token(part.reshape(batch * count, size, dim)))
            start += count * size
        if len(stacks) == 1:
            encoded = [self.norm(self.blocks(stacks[0]))]
        else:
            sequence_lengths = tuple((len(stack), stack.shape[1]) for stack in stacks)
            packed = torch.cat([stack.flatten(0, 1) for stack in stacks]).unsqueeze(0)
            tokens = self.norm(self.blocks(packed, sequence_lengths=sequence_lengths))[0]
            parts = tokens.split([count * length for count, length in sequence_lengths])
            encoded = [part.view(stack.shape) for part, stack in zip(parts, stacks, strict=True)]
        by_image = [stack.view(batch, -1, *stack.shape[1:]) for stack in encoded]
        class_tokens = torch.cat([stack[:, :, 0] for stack in by_image], dim=1)
        return class_tokens, torch.cat([stack[:, :, 1:].flatten(1, 2) for stack in by_image], dim=1)


class Decoder(nn.Module):
    """A few blocks that predict the tokens of the masked patches from the encoded visible ones.

    Attention does not care for the order of tokens, so nothing is put back in its place: each token carries the
    position of its patch. The masked ones come last, in fold order, and before them the class token, which is in the
    sequence of every method, also where nothing reads what becomes of it (as in MAE's and SdAE's released code).
    """

    def __init__(
        self, image_size: int, patch_size: int, encoder_dim: int, output_dim: int, dim: int, depth: int, heads: int,
        recompute_every: int = 0,
    ):  # fmt: skip
        super().__init__()
        side = image_size // patch_size
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = torch.cat([torch.zeros(1, dim), sincos_positions(side, side, dim)])
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", positions.unsqueeze(0))
        self.blocks = Blocks(depth, dim, heads, 4.0, recompute_every)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.output = nn.Linear(dim, output_dim)

    def forward(
        self,
        encoded: Float[Tensor, "batch known encoder_dim"],
        visible: Int[Tensor, "batch known-1"],
        masked: Int[Tensor, "batch masked"],
        labels: bool = True,
    ) -> tuple[Float[Tensor, "batch output_dim"] | None, Float[Tensor, "batch masked output_dim"]]:
        """The class prediction and the predictions of the masked patches.

        Args:
            labels: whether the class prediction is read; where it is not, it is None.
        """
        # every patch is known or masked, so they tell their grid
        positions = positions_on(self.pos_embed, math.isqrt(visible.shape[1] + masked.shape[1]))[0, 1:]
        mask = self.mask_token + positions[masked]
        # Autocast gives bf16 here; positions and the sums along the blocks stay in the weights' own precision.
        known = self.embed(encoded).to(mask.dtype)
        visible_tokens = known[:, 1:] + positions[visible]
        tokens = torch.cat([visible_tokens, known[:, :1], mask], dim=1)
        # Nothing reads the predictions of visible patches: in the last block the others only look at them.
        read = masked.shape[1] + labels
        predicted = norm_linear(self.blocks(tokens, last=read), self.norm, self.output)
        if not labels:
            return None, predicted
        patches = predicted[:, 1:]
        # DistributedDataParallel copies a view at its first step and not later: the losses would be compiled twice.
        return predicted[:, 0], patches.contiguous() if torch.compiler.is_compiling() else patches


class Student(nn.Module):
    """Encoder over the visible patches, decoder, and (where pseudo labels are learnt) the head."""

    def __init__(self, encoder: Encoder, decoder: Decoder, head: Head | None):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.head = head

    def forward(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        visible: Int[Tensor, "batch visible"],
        masked: Int[Tensor, "batch masked"],
        drop_path_scale: Float[Tensor, "batch depth 2"] | None = None,
        chunk: int = 0,
    ) -> tuple[
        Float[Tensor, "batch masked dim"],
        PrototypeLogits | None,
        PrototypeLogits | None,
    ]:
        """Predicted tokens of the masked patches, and the class and patch logits over the prototypes (see `Head`).

        Args:
            chunk: rows of patch logits at a time, or 0.
        """
        class_prediction, masked_prediction = self.decoder(
            self.encoder(images, visible, drop_path_scale), visible, masked, self.head is not None
        )
        if self.head is None or class_prediction is None:
            return masked_prediction, None, None
        class_logits, patch_logits = self.head(class_prediction, masked_prediction.flatten(0, 1), chunk)
        return masked_prediction, class_logits, patch_logits
