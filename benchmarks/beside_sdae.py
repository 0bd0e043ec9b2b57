"""`sdae-code` beside SdAE's own training loop, in float64 on the CPU: the same weights, images and masks in both.

`python -m benchmarks.beside_sdae CHECKOUT TIMM`: a checkout of AbrahamYabo/SdAE, and a folder that holds timm 0.3.2,
which it needs (`pip download --no-deps timm==0.3.2`, unpacked). Prints how far losses, gradients, weights after three
AdamW steps and the teacher after its epoch are apart; status 1 where any of them is further than rounding. Two minutes
of one core at ViT-S.
"""

import argparse
import collections.abc
import contextlib
import importlib
import io
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpmae import PRESETS
from fastpmae.distributed.ranks import Ranks
from fastpmae.model.patches import IMAGENET_MEAN, IMAGENET_STD
from fastpmae.pretraining.networks import make_networks
from fastpmae.pretraining.optimizer import learning_rate, make_optimizer, update
from fastpmae.pretraining.step import compute_targets, student_loss
from fastpmae_loaders import Batch
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.errors import UserError

STEPS, EPOCH, EPOCHS, IMAGES, RATE = 3, 70, 300, 2, 0.05
"""Three steps of an epoch after the warm-up, at a rate that moves every weight."""
PATCHES, VISIBLE, FOLDS = 196, 49, 3
LIMIT = 1e-11
NAMES = {"decoder_embed": "embed", "mask_token": "mask_token", "decoder_blocks": "blocks", "decoder_norm": "norm",
         "decoder_pred": "output", "decoder_pos_embed": "pos_embed"}  # fmt: skip
"""The parts of their decoder, and of ours."""


def our_name(name: str) -> str:
    """A tensor of their student as ours calls it."""
    first, *rest = name.split(".")
    return ".".join(["decoder", NAMES[first], *rest]) if first in NAMES else f"encoder.{name}"


def their_modules(checkout: Path, timm: Path) -> dict[str, Any]:
    """Their modules, which ask for parts of torch 1.7 and numpy 1.19 that are gone.

    Raises:
        UserError: when a folder is not what it should be.
    """
    if not (checkout / "engine_pretrain.py").exists():
        raise UserError(f"{checkout} is no checkout of AbrahamYabo/SdAE: it has no engine_pretrain.py")
    six: Any = types.ModuleType("torch._six")
    six.inf, six.container_abcs, six.int_classes, six.string_classes = math.inf, collections.abc, int, str
    sys.modules["torch._six"] = six
    setattr(np, "float", float)  # noqa: B010, what a type checker knows to be gone
    sys.path[:0] = [str(checkout), str(timm)]
    if importlib.import_module("timm").__version__ != "0.3.2":
        raise UserError(f"{timm} holds no timm 0.3.2, which SdAE needs")
    names = ("models_mae", "models_teacher", "engine_pretrain", "util.cosine_scheduler", "timm.optim.optim_factory")
    found: dict[str, Any] = {name.split(".")[-1]: importlib.import_module(name) for name in names}
    # One process on a CPU: nothing is waited for, gathered, or computed in half.
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.is_available = lambda: False
    torch.cuda.amp.autocast = contextlib.nullcontext
    found["engine_pretrain"].misc.all_reduce_mean = lambda value: value
    found["engine_pretrain"].misc.MetricLogger.synchronize_between_processes = lambda self: None
    return found


class Wrapped(nn.Module):
    """A network behind `.module`, as their loop expects it of DistributedDataParallel."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.module(*given, **named)


def trained_by_theirs(
    theirs: dict[str, Any], student: nn.Module, teacher: nn.Module, images: list[Tensor], seed: int
) -> list[tuple[float, dict[str, Tensor]]]:
    """Train both networks with their loop; each step's loss, and its gradients by our names."""
    steps: list[tuple[float, dict[str, Tensor]]] = []
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    batches = [((part.double() / 255 - mean) / std, None) for part in images]

    def scaler(loss: Tensor, optimizer: Any, **_: Any) -> None:
        loss.backward()
        found = {our_name(name): p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        steps.append((float(loss), found))
        optimizer.step()

    groups = theirs["optim_factory"].add_weight_decay(student, PRESETS["sdae-code"].optimizer.weight_decay)
    rate = RATE * IMAGES / 256
    numbers = types.SimpleNamespace(accum_iter=1, mask_ratio=0.75, lr=rate, min_lr=0.0, warmup_epochs=60, epochs=EPOCHS)
    torch.manual_seed(seed)  # nothing but the masks is drawn
    with contextlib.redirect_stdout(io.StringIO()):
        theirs["engine_pretrain"].train_one_epoch_ema(
            Wrapped(student), Wrapped(teacher), teacher, batches,
            torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95)), torch.device("cpu"), EPOCH, scaler,
            momentum_schedule=theirs["cosine_scheduler"].cosine_scheduler(0.96, 0.99, EPOCHS, 1),
            ema_op="per_epoch", is_ema=True, shrink_num=PATCHES - VISIBLE, ncrop_loss=FOLDS, args=numbers,
        )  # fmt: skip
    return steps


def batch_of(images: Tensor, order: Tensor) -> Batch:
    """Images and their mask as our loader hands them over."""
    count, fold = len(images), (PATCHES - VISIBLE) // FOLDS
    return Batch(
        views=(images, images), visible=order[:, :VISIBLE].contiguous(), folds=order[:, VISIBLE:].contiguous(),
        fold_sizes=(fold,) * FOLDS, label=torch.zeros(count, dtype=torch.int64), index=torch.arange(count),
        boxes=torch.zeros(count, 2, 4, dtype=torch.int32), flips=torch.zeros(count, 2, dtype=torch.bool),
        factors=torch.ones(count, 2, 5, dtype=torch.float64), choices=torch.zeros(count, 2, 9, dtype=torch.uint8),
        source_size=torch.zeros(count, 2, dtype=torch.int32), samples=np.arange(count), failed=[],
    )  # fmt: skip


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((tensor**2).sum()) for tensor in tensors.values()))


def beside(checkout: Path, timm: Path, size: str) -> int:
    """Both, step by step, and how far apart they are. Raises UserError as `their_modules` does.

    Args:
        size: of the ViT, `small` or `base`.

    Returns:
        1 where anything is further apart than `LIMIT`, else 0.
    """
    config = PRESETS["sdae-code"].using(model=f"vit_{size}", drop_path=0.0, batch_size=IMAGES, blr=RATE)
    student, teachers = make_networks(config, 1000, torch.device("cpu"), None)
    teacher = teachers.reconstruction
    assert teacher is not None
    theirs = their_modules(checkout, timm)
    torch.set_default_dtype(torch.float64)
    student.double()
    teacher.double()
    torch.manual_seed(3)
    with contextlib.redirect_stdout(io.StringIO()):
        their_student = getattr(theirs["models_mae"], f"mae_vit_{size}_patch16")(drop_path=0.0)
        their_teacher = getattr(theirs["models_teacher"], f"vit_{size}_patch16")(num_classes=0)
    with torch.no_grad():
        for module in (their_student, their_teacher):
            for name, parameter in module.named_parameters():
                if "pos_embed" not in name:  # no bias is 0 and no norm is 1
                    parameter += 0.02 * torch.randn_like(parameter)
    student.load_state_dict({our_name(name): tensor.clone() for name, tensor in their_student.state_dict().items()})
    teacher.load_state_dict({f"encoder.{name}": t.clone() for name, t in their_teacher.state_dict().items()})

    images = list(torch.randint(0, 256, (STEPS, IMAGES, 3, 224, 224), dtype=torch.uint8))
    torch.manual_seed(5)
    orders = [torch.argsort(torch.rand(IMAGES, PATCHES), dim=1) for _ in images]
    steps = trained_by_theirs(theirs, their_student, their_teacher, images, 5)

    optimizer, ranks = make_optimizer(student, config), Ranks(0, 1, 1, torch.device("cpu"), None)
    apart: dict[str, float] = {}
    for step, (loss, gradients) in enumerate(steps):
        batch = batch_of(images[step], orders[step])
        losses = student_loss(student, batch, None, compute_targets(teachers, batch, config), config)
        losses.total.backward()
        ours = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        apart[f"loss of step {step}"] = abs(float(losses.total) / loss - 1)
        difference = {name: ours[name] - gradient for name, gradient in gradients.items()}
        apart[f"gradient of step {step}"] = norm(difference) / norm(gradients)
        if step == 0:
            token = "encoder.cls_token"
            apart["the class token's"] = float(difference[token].norm() / gradients[token].norm())
        update(optimizer, losses.total.detach(), learning_rate(config, EPOCH * STEPS + step, STEPS), 0.0, ranks)
    teachers.update_ema(student, "epoch", EPOCH)
    for what, mine, other in (
        ("weights after three steps", student, {our_name(n): t for n, t in their_student.state_dict().items()}),
        ("the teacher after its epoch", teacher, {f"encoder.{n}": t for n, t in their_teacher.state_dict().items()}),
    ):
        apart[what] = max(float((tensor - other[name]).abs().max()) for name, tensor in mine.state_dict().items())
    for what, value in apart.items():
        print(f"{what:30} {value:.1e}")
    return int(not all(value <= LIMIT for value in apart.values()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="beside_sdae", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkout", type=Path, help="of AbrahamYabo/SdAE")
    parser.add_argument("timm", type=Path, help="a folder that holds timm 0.3.2")
    parser.add_argument("--size", choices=("small", "base"), default="small", help="of the ViT (small)")
    given = parser.parse_args()
    return exit_with_sentence("beside_sdae", lambda: beside(given.checkout, given.timm, given.size))


if __name__ == "__main__":
    sys.exit(main())
