"""MAE on this loader: a stand-in for facebookresearch/mae's main_pretrain.py and engine_pretrain.py."""

import itertools

import torch
from common import PATCH, SIZE, WIDTH, Encoder, arguments, pick, report
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastpmae_loaders import PairedViews, mae_view
from fastpmae_loaders.adapters import MAELoader


class MaskedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (SIZE // PATCH) ** 2, WIDTH))
        self.decoder = nn.Sequential(Block(WIDTH, 4), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * PATCH**2))

    def forward(self, images: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        target = nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        batch, patches, _ = target.shape
        ids_shuffle = torch.rand(batch, patches, device=images.device).argsort(1)
        visible = int(patches * (1 - mask_ratio))
        seen = self.encoder(images, keep=ids_shuffle[:, :visible])[:, 1:]
        tokens = torch.cat([seen, self.mask_token.expand(batch, patches - visible, -1)], 1)
        prediction = self.decoder(pick(tokens, ids_shuffle.argsort(1)) + self.positions)
        mask = (ids_shuffle.argsort(1) >= visible).float()
        loss = ((prediction - target) ** 2).mean(2)
        return (loss * mask).sum() / mask.sum(), prediction, mask


def main() -> None:
    args = arguments(__doc__)

    # was: transform_train, dataset_train, sampler_train and
    #      data_loader_train = torch.utils.data.DataLoader(dataset_train, sampler=sampler_train, ...)
    loader = PairedViews(
        args.beton,
        args.batch_size,
        args.engine,
        views=[mae_view(SIZE)],
        seed=0,
        rank=0,
        world_size=1,
        device=args.device,
    )
    data_loader_train = MAELoader(loader)

    model = MaskedAutoencoder().to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95))
    for epoch in itertools.count():
        data_loader_train.sampler.set_epoch(epoch)
        for data_iter_step, (samples, _) in enumerate(data_loader_train, epoch * len(data_loader_train)):
            samples = samples.to(args.device, non_blocking=True)
            loss, _, _ = model(samples, mask_ratio=0.75)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if report(data_iter_step, args, loss=loss):
                return


if __name__ == "__main__":
    main()
