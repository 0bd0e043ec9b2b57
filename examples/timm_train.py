"""timm's train.py on this loader: its model, optimizer, mixup, loss and loop, and its validation."""

import itertools

import numpy as np
import timm
import torch
from common import PATCH, SIZE, arguments, report
from timm.data import Mixup, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, accuracy

from fastpmae_loaders import PairedViews, mae_view, plain_view
from fastpmae_loaders.adapters import TimmLoader


def main() -> None:
    args = arguments(__doc__)
    device = torch.device(args.device)

    # was: dataset_train = create_dataset(...), dataset_eval = create_dataset(...), loader_train = create_loader(...),
    #      loader_eval = create_loader(...), with collate_fn = FastCollateMixup(**mixup_args)
    views = [mae_view(SIZE, (0.08, 1.0))]
    train = PairedViews(args.beton, args.batch_size, args.engine, seed=0, views=views, device=device)
    views = [plain_view(SIZE, crop_ratio=0.875)]
    whole = PairedViews(
        args.beton, args.batch_size, args.engine, shuffle=False, drop_last=False, views=views, device=device
    )
    classes = int(np.asarray(train.samples.label).max()) + 1
    model = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, patch_size=PATCH, depth=2, num_classes=classes)
    data_config = resolve_data_config({}, model=model.to(device))
    mixup_args = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "label_smoothing": 0.1, "num_classes": classes}
    loader_train = TimmLoader(train, data_config["mean"], data_config["std"], mixup=Mixup(**mixup_args))
    loader_eval = TimmLoader(whole, data_config["mean"], data_config["std"])
    dataset_train = loader_train.dataset

    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    loss_fn = SoftTargetCrossEntropy()
    for epoch in itertools.count():
        dataset_train.set_epoch(epoch)
        if train_one_epoch(epoch, model, loader_train, optimizer, loss_fn, args):
            break
    validate(model, loader_eval)


def train_one_epoch(epoch, model, loader, optimizer, loss_fn, args) -> bool:
    if epoch >= 10 and loader.mixup_enabled:
        loader.mixup_enabled = False
    model.train()
    for batch_idx, (input, target) in enumerate(loader, epoch * len(loader)):
        loss = loss_fn(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if report(batch_idx, args, loss=loss):
            return True
    return False


@torch.no_grad()
def validate(model, loader) -> None:
    model.eval()
    top1 = AverageMeter()
    for input, target in loader:
        (correct,) = accuracy(model(input), target)
        top1.update(float(correct), len(input))
    print(f"accuracy on {top1.count} images: {top1.avg:.1f} %")


if __name__ == "__main__":
    main()
