"""iBOT on this loader: a stand-in for bytedance/ibot's main_ibot.py with two global and two local crops."""

import copy
import itertools

import torch
from common import PATCH, SIZE, WIDTH, Encoder, arguments, follow, report
from torch import Tensor, nn

from fastpmae_loaders import PairedViews, dino_global, dino_local
from fastpmae_loaders.adapters import IBOTLoader
from fastpmae_loaders.blockwise import IBOTMasks

GLOBALS, LOCALS, PROTOTYPES = 2, 2, 256


class Network(nn.Module):
    """(class logits [V B, P], patch logits [V B, N, P]) of V crops of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(WIDTH, PROTOTYPES, bias=False)

    def forward(self, crops: list[Tensor], mask: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        hidden = None if mask is None else torch.cat(mask).flatten(1)
        logits = self.head(self.encoder(torch.cat(crops), hidden=hidden))
        return logits[:, 0], logits[:, 1:]


def sharpened(logits: Tensor, temperature: float) -> Tensor:
    """The teacher's distribution, centred on the batch's mean."""
    mean = logits.flatten(0, -2).mean(0)
    return ((logits - mean) / temperature).softmax(-1)


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return -(target * (logits / 0.1).log_softmax(-1)).sum(-1)


def ibot_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], local: Tensor, masks: list[Tensor]):
    """Class tokens across crops, hidden patches within a crop."""
    targets = sharpened(teacher[0], 0.04).chunk(GLOBALS)
    crops = [*student[0].chunk(GLOBALS), *local.chunk(LOCALS)]
    across = [cross_entropy(t, s).mean() for q, t in enumerate(targets) for v, s in enumerate(crops) if v != q]
    hidden = torch.cat(masks).flatten(1)
    patches = (cross_entropy(sharpened(teacher[1], 0.04), student[1]) * hidden).sum(1) / hidden.sum(1).clamp(min=1)
    return torch.stack(across).mean(), patches.mean()


def main() -> None:
    args = arguments(__doc__)

    # was: transform = DataAugmentationiBOT(...), dataset = ImageFolderMask(...), sampler = DistributedSampler(...) and
    #      data_loader = torch.utils.data.DataLoader(dataset, sampler=sampler, ...)
    crops = [dino_global("t1", SIZE, (0.32, 1)), dino_global("t2", SIZE, (0.32, 1))] + [dino_local(32)] * LOCALS
    loader = PairedViews(args.beton, args.batch_size, args.engine, seed=0, views=crops, device=args.device)
    masks = IBOTMasks(pred_ratio=[0.0, 0.3], pred_ratio_var=[0.0, 0.2], pred_shape="block", pred_start_epoch=0)
    data_loader = IBOTLoader(loader, masks, patch_size=PATCH)

    student = Network().to(args.device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    for epoch in itertools.count():
        data_loader.sampler.set_epoch(epoch)
        data_loader.dataset.set_epoch(epoch)
        for it, (images, _labels, masks) in enumerate(data_loader, len(data_loader) * epoch):
            teacher_output = teacher(images[:GLOBALS])
            student_output = student(images[:GLOBALS], mask=masks[:GLOBALS])
            local, _ = student(images[GLOBALS:])
            cls, patch = ibot_loss(student_output, teacher_output, local, masks)
            optimizer.zero_grad()
            (cls + patch).backward()
            optimizer.step()
            follow(teacher, student, 0.996)
            if report(it, args, cls=cls, patch=patch):
                return


if __name__ == "__main__":
    main()
