"""A linear layer on the patches of a frozen network: a BatchNorm and a 1 x 1 convolution, as DINOv2 reports it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastpmae.evaluate.dense.context import Grid, at_mask_size
from fastpmae.evaluate.dense.labelled import IGNORE
from fastpmae_loaders import epoch_order
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import UserError


@dataclass(frozen=True)
class LinearSettings:
    """How the linear layer is trained: by AdamW on whole images, its rate falling to 0 on a cosine."""

    steps: int
    batch_size: int
    rate: float
    weight_decay: float
    seed: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UserError(f"--steps {self.steps} and --step-images {self.batch_size} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed} must be between 0 and 2**63 - 1")
        if not self.rate > 0 or self.weight_decay < 0:
            raise UserError(f"--lr {self.rate} must be above 0, and --weight-decay {self.weight_decay} not below")


class PatchLinear(nn.Module):
    """BatchNorm over all patches of a batch, then a class's score at each patch."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.layer = nn.Linear(dim, classes)

    def forward(self, patches: Float[Tensor, "patches dim"]) -> Float[Tensor, "patches classes"]:
        """Scores; at one place of a map this is a 1 x 1 convolution."""
        return self.layer(self.norm(patches))


def train_patch_linear(
    features: Callable[[int], Float[Tensor, "rows columns dim"]],
    labels: Callable[[int], tuple[Int[np.ndarray, "height width"], Grid]],
    images: int,
    classes: int,
    settings: LinearSettings,
    device: torch.device,
    progress: Progress,
) -> PatchLinear:
    """Train on the cross-entropy of each pixel, the scores brought to the mask's size; in evaluation mode after.

    Args:
        features: of the patches of a training image.
        labels: its mask, and how it was cut into patches.
    """
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(settings.seed)
    model: PatchLinear | None = None
    optimizer = schedule = None
    batch = min(settings.batch_size, images)
    done = epoch = 0
    with progress.count(settings.steps, "steps"):
        while done < settings.steps:
            order = epoch_order(settings.seed, epoch, images)
            epoch += 1
            for begin in range(0, images // batch * batch, batch):
                chosen = order[begin : begin + batch].tolist()
                maps = [features(place).to(device) for place in chosen]
                if model is None:
                    model = PatchLinear(maps[0].shape[-1], classes).to(device)
                    optimizer = torch.optim.AdamW(
                        model.parameters(), lr=settings.rate, weight_decay=settings.weight_decay
                    )
                    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
                assert optimizer is not None
                assert schedule is not None
                optimizer.zero_grad()
                # a batch of void alone teaches nothing, and its mean is not a number
                if _backward(model, maps, [labels(place) for place in chosen], device):
                    optimizer.step()
                schedule.step()
                done += 1
                progress.advance()
                if done == settings.steps:
                    break
    torch.random.set_rng_state(torch_state)
    assert model is not None
    return model.eval()


def _backward(
    model: PatchLinear,
    maps: list[Float[Tensor, "_rows _columns dim"]],
    labels: list[tuple[Int[np.ndarray, "_height _width"], Grid]],
    device: torch.device,
) -> bool:
    """Add the gradient of the mean cross-entropy over the pixels with a class; whether there are any.

    The scores of one image's pixels are held at a time.
    """
    sizes = [(found.shape[0], found.shape[1]) for found in maps]
    scores = model(torch.cat([found.flatten(0, 1) for found in maps]))
    count = sum(int((mask != IGNORE).sum()) for mask, _ in labels)
    if not count:
        return False
    leaf = scores.detach().requires_grad_()
    parts = leaf.split([rows * columns for rows, columns in sizes])
    for part, size, (mask, grid) in zip(parts, sizes, labels, strict=True):
        truth = torch.from_numpy(mask.astype(np.int64)).to(device)
        pixels = at_mask_size(part.view(*size, -1), grid)
        loss = F.cross_entropy(pixels[None], truth[None], ignore_index=IGNORE, reduction="sum")
        loss.backward(torch.ones_like(loss) / count)
    scores.backward(leaf.grad)
    return True
