"""Pseudo-MAE and SdAE the usual way, which the trainer is measured against.

Written as a careful researcher would on top of public code: timm's parts in eager mode, MAE's decoder over all tokens
put back in order, each view embedded whole and once for each network before tokens are picked, every matrix of logits
and assignments written down, distances by cdist, EMA and AdamW one parameter at a time. The networks take the
trainer's weights by name.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import timm.layers
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastpmae import Config
from fastpmae.model.build import shape_of
from fastpmae.model.patches import IMAGENET_MEAN, IMAGENET_STD, sincos_positions
from fastpmae.model.teachers import Teachers
from fastpmae.model.vit import Student
from fastpmae_loaders import Batch

LayerNorm: Any = partial(nn.LayerNorm, eps=1e-6)


class PlainBatch(NamedTuple):
    """What a usual loader hands over: normalised images, and ids as in the trainer's batch."""

    simple: Float[Tensor, "batch 3 height width"]
    complex: Float[Tensor, "batch 3 height width"]
    visible: Int[Tensor, "batch visible"]
    folds: Int[Tensor, "batch masked"]
    fold_sizes: Sequence[int]


def plain_batch(batch: Batch) -> PlainBatch:
    """The trainer's batch in fp32, where it lies. `ToTensor` and `Normalize` are the work of a usual loader's
    processes."""
    where = batch.simple.device
    mean, std = (torch.tensor(numbers, device=where).view(1, 3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    simple, other = ((view.float() / 255 - mean) / std for view in (batch.simple, batch.complex))
    return PlainBatch(simple, other, batch.visible, batch.folds, batch.fold_sizes)


def positions(side: int, dim: int) -> nn.Parameter:
    table = torch.cat([torch.zeros(1, dim), sincos_positions(side, side, dim)])
    return nn.Parameter(table.unsqueeze(0), requires_grad=False)


def pick(tokens: Float[Tensor, "batch patches dim"], ids: Int[Tensor, "batch count"]) -> Tensor:
    return torch.gather(tokens, 1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class PlainEncoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        shape, size = shape_of(config.network), config.views.image_size
        rates = torch.linspace(0, config.network.drop_path, shape.depth).tolist()
        self.patch_embed = timm.layers.PatchEmbed(size, shape.patch_size, 3, shape.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.pos_embed = positions(size // shape.patch_size, shape.width)
        sizes = shape.width, shape.heads, shape.mlp_ratio
        self.blocks = nn.Sequential(
            *(Block(*sizes, qkv_bias=True, drop_path=rate, norm_layer=LayerNorm) for rate in rates)
        )
        self.norm = LayerNorm(shape.width)

    def forward(self, images: Tensor, ids: Int[Tensor, "batch count"]) -> Float[Tensor, "batch 1+count dim"]:
        return self.encode(pick(self.embed(images), ids))

    def embed(self, images: Tensor) -> Float[Tensor, "batch patches dim"]:
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def encode(self, tokens: Float[Tensor, "batch count dim"]) -> Float[Tensor, "batch 1+count dim"]:
        class_token = self.cls_token + self.pos_embed[:, :1]
        tokens = torch.cat((class_token.expand(len(tokens), -1, -1), tokens), dim=1)
        return self.norm(self.blocks(tokens))


class PlainDecoder(nn.Module):
    """MAE's and SdAE's: the class token, then all patches in their places, a prediction for every one of them."""

    def __init__(self, config: Config):
        super().__init__()
        model, shape = config.network, shape_of(config.network)
        dim = model.decoder_width
        self.embed = nn.Linear(shape.width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = positions(config.views.image_size // shape.patch_size, dim)
        blocks = [
            Block(dim, model.decoder_heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(model.decoder_depth)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.norm = LayerNorm(dim)
        self.output = nn.Linear(dim, shape.width)

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor) -> Float[Tensor, "batch 1+patches dim"]:
        tokens = self.embed(encoded)
        hidden = self.mask_token.repeat(len(tokens), masked.shape[1], 1)
        restore = torch.argsort(torch.cat((visible, masked), dim=1), dim=1)
        patches = pick(torch.cat((tokens[:, 1:], hidden), dim=1), restore) + self.pos_embed[:, 1:]
        tokens = torch.cat((tokens[:, :1] + self.pos_embed[:, :1], patches), dim=1)
        return self.output(self.norm(self.blocks(tokens)))


class PlainHead(nn.Module):
    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, bottleneck)
        self.class_prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.patch_prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))

    def forward(self, tokens: Float[Tensor, "rows dim"], prototypes: Tensor) -> Float[Tensor, "rows prototypes"]:
        hidden = F.gelu(self.fc1(tokens))
        hidden = F.gelu(self.fc2(hidden))
        return F.linear(F.normalize(self.fc3(hidden), dim=-1), F.normalize(prototypes, dim=-1))


class PlainNetwork(nn.Module):
    """A student, or a teacher without a decoder."""

    def __init__(self, config: Config, decoder: bool, head: bool):
        super().__init__()
        model = config.network
        self.encoder = PlainEncoder(config)
        self.decoder = PlainDecoder(config) if decoder else None
        sizes = shape_of(model).width, model.head_hidden, model.head_bottleneck, model.prototypes
        self.head = PlainHead(*sizes) if head else None


@torch.no_grad()
def sinkhorn(logits: Float[Tensor, "rows prototypes"], epsilon: float, iterations: int) -> Tensor:
    """Assignments of all rows as one matrix, no coarser than fp32, divided in place."""
    table = torch.exp(logits.to(torch.promote_types(logits.dtype, torch.float32)) / epsilon).t()
    prototypes, rows = table.shape
    table /= table.sum()
    for _ in range(iterations):
        table /= table.sum(dim=1, keepdim=True)
        table /= prototypes
        table /= table.sum(dim=0, keepdim=True)
        table /= rows
    table *= rows
    return table.t()


class PlainLosses(NamedTuple):
    total: Tensor
    reconstruction: Tensor
    class_label: Tensor
    patch_label: Tensor


class PlainMethod:
    """The whole method: networks with the trainer's weights, the losses, and one training step.

    Args:
        config: of the methods with token targets: `paper` and `sdae`.
        student, teachers: whose weights to copy.
        device: where it computes; on a GPU AdamW is torch's fused one.
    """

    def __init__(
        self, config: Config, student: Student, teachers: Teachers, device: torch.device | str = "cpu"
    ):  # fmt: skip
        self.config = config
        labels = teachers.labelling is not None
        self.student = PlainNetwork(config, decoder=True, head=labels)
        self.student.load_state_dict(student.state_dict())
        self.student.to(device)
        self.teachers: dict[str, PlainNetwork] = {}
        for name, teacher in teachers.modules().items():
            plain = PlainNetwork(config, decoder=False, head=teacher.head is not None)
            plain.load_state_dict(teacher.state_dict())
            # A teacher sees every token whole.
            self.teachers[name] = plain.to(device).eval().requires_grad_(False)
        self.momenta = {
            name: schedule.momentum
            for name, (_, schedule) in zip(self.teachers, teachers.scheduled(), strict=True)
            if schedule.cadence == "step"
        }
        decay = config.optimizer.weight_decay
        parameters = [(n, p) for n, p in self.student.named_parameters() if p.requires_grad]
        spared = [p for n, p in parameters if p.ndim == 1 or n.endswith("_token")]
        decayed = [p for n, p in parameters if not (p.ndim == 1 or n.endswith("_token"))]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": decay},
            {"params": spared, "weight_decay": 0.0},
        ]
        fused = torch.device(device).type == "cuda" or None
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.optimizer.betas, fused=fused)

    def folds(self, teacher: PlainNetwork, images: Tensor, batch: PlainBatch) -> tuple[list[Tensor], Tensor]:
        """The teacher's class token of each fold, and its patch tokens of all folds."""
        embedded = teacher.encoder.embed(images)
        folds = batch.folds.split(list(batch.fold_sizes), dim=1)
        encoded = [teacher.encoder.encode(pick(embedded, fold)) for fold in folds]
        return [tokens[:, 0] for tokens in encoded], torch.cat([tokens[:, 1:] for tokens in encoded], dim=1)

    @torch.no_grad()
    def teach(self, batch: PlainBatch) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Targets: tokens, the labelling teacher's tokens, and the class and patch assignments."""
        loss = self.config.loss
        _, tokens = self.folds(self.teachers["reconstruction_teacher"], batch.simple, batch)
        mean, variance = tokens.mean(dim=-1, keepdim=True), tokens.var(dim=-1, keepdim=True)
        target = (tokens - mean) / (variance + 1e-6) ** 0.5
        labelling = self.teachers.get("labelling_teacher")
        if labelling is None:
            return target, None, None, None
        assert labelling.head is not None
        classes, patches = self.folds(labelling, batch.complex, batch)
        class_logits = labelling.head(torch.stack(classes, dim=1).flatten(0, 1), labelling.head.class_prototypes)
        patch_logits = labelling.head(patches.flatten(0, 1), labelling.head.patch_prototypes)
        class_labels = sinkhorn(class_logits, loss.epsilon, loss.sinkhorn_iterations)
        patch_labels = sinkhorn(patch_logits, loss.epsilon, loss.sinkhorn_iterations)
        class_labels = class_labels.view(len(batch.folds), len(classes), -1).mean(dim=1)
        return target, patches, class_labels, patch_labels.view(*batch.folds.shape, -1)

    def learn(
        self, batch: PlainBatch, targets: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
    ) -> PlainLosses:
        """The student's pass and the losses."""
        student, loss = self.student, self.config.loss
        assert student.decoder is not None
        target, label_tokens, class_labels, patch_labels = targets
        decoded = student.decoder(student.encoder(batch.simple, batch.visible), batch.visible, batch.folds)
        classes, patches = decoded[:, 0], decoded[:, 1:]
        predicted = pick(patches, batch.folds)
        reconstruction = (1 - F.cosine_similarity(predicted, target, dim=-1)).mean()
        if student.head is None or label_tokens is None or class_labels is None or patch_labels is None:
            nothing = torch.zeros_like(reconstruction)
            return PlainLosses(reconstruction, reconstruction, nothing, nothing)
        temperature = loss.student_temperature
        class_scores = F.log_softmax(student.head(classes, student.head.class_prototypes) / temperature, dim=-1)
        of_class = -(class_labels * class_scores).sum(dim=-1).mean()
        with torch.no_grad():
            distance = torch.cdist(F.normalize(predicted, dim=-1), F.normalize(label_tokens, dim=-1))
            nearest = distance.argmin(dim=-1)
            labels = pick(patch_labels, nearest).flatten(0, 1)
        patch_logits = student.head(predicted.flatten(0, 1), student.head.patch_prototypes)
        of_patch = -(labels * F.log_softmax(patch_logits / temperature, dim=-1)).sum(dim=-1).mean()
        return PlainLosses(reconstruction + of_class + of_patch, reconstruction, of_class, of_patch)

    def update(self, losses: PlainLosses, lr: float) -> None:
        """One AdamW step, unless the loss is not finite."""
        if not torch.isfinite(losses.total.detach()):
            raise RuntimeError(f"the loss is {losses.total.item()}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """The teachers that follow every step do."""
        for name, momentum_at in self.momenta.items():
            momentum, teacher = momentum_at(step), self.teachers[name]
            theirs = dict(self.student.named_parameters())
            for key, parameter in teacher.named_parameters():
                parameter.data.mul_(momentum).add_((1 - momentum) * theirs[key].detach().data)
