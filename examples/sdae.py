"""SdAE on this loader, with the loader's masks and folds: a stand-in for AbrahamYabo/SdAE's engine_pretrain.py."""

import copy
import itertools

import torch
from common import PATCH, SIZE, WIDTH, Encoder, arguments, follow, pick, report
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastpmae_loaders import PairedViews, ViewSettings, mae_view
from fastpmae_loaders.adapters import MAELoader

FOLDS = 3


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (SIZE // PATCH) ** 2, WIDTH))
        self.decoder = nn.Sequential(Block(WIDTH, 4), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))

    # was: def forward(self, imgs, mask_ratio=0.75), with noise = torch.rand(N, L) and ids_shuffle = argsort(noise)
    def forward(self, images: Tensor, ids_shuffle: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor]:
        visible = int(ids_shuffle.shape[1] * (1 - mask_ratio))
        ids_keep, ids_unkeep = ids_shuffle[:, :visible], ids_shuffle[:, visible:]
        seen = self.encoder(images, keep=ids_keep)[:, 1:]
        tokens = torch.cat([seen, self.mask_token.expand(*ids_unkeep.shape, -1)], 1)
        return self.decoder(pick(tokens, ids_shuffle.argsort(1)) + self.positions), ids_unkeep


def main() -> None:
    args = arguments(__doc__)

    # was: data_loader_train = torch.utils.data.DataLoader(dataset_train, sampler=sampler_train, ...)
    settings = ViewSettings(image_size=SIZE, patch_size=PATCH, mask_ratio=0.75, folds=FOLDS)
    loader = PairedViews(
        args.beton, args.batch_size, args.engine, settings, seed=0, views=[mae_view(SIZE)], device=args.device
    )
    data_loader_train = MAELoader(loader, masks="ours")

    model = Student().to(args.device)
    teacher = copy.deepcopy(model.encoder).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95))
    for epoch in itertools.count():
        data_loader_train.sampler.set_epoch(epoch)
        # was: for data_iter_step, (samples, _) in enumerate(...)
        for step, (samples, _, ids_shuffle) in enumerate(data_loader_train, epoch * len(data_loader_train)):
            outputs, ids_unkeep = model(samples, ids_shuffle)
            # each fold is a batch row of its own to the teacher
            folds = ids_unkeep.reshape(len(samples) * FOLDS, -1)
            with torch.no_grad():
                target = teacher(samples.repeat_interleave(FOLDS, 0), keep=folds)[:, 1:]
                target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
            outputs = pick(outputs, ids_unkeep).reshape(target.shape)
            loss = 1 - nn.functional.cosine_similarity(target, outputs, -1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if report(step, args, loss=loss):
                return
        follow(teacher, model.encoder, 0.96)


if __name__ == "__main__":
    main()
