"""SimCLR on this loader: a stand-in for lightly's examples/pytorch/simclr.py."""

import timm
import torch
from common import SIZE, arguments, report
from torch import Tensor, nn

from fastpmae_loaders import PairedViews, dino_global
from fastpmae_loaders.adapters import LightlyLoader


class SimCLR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("resnet10t", num_classes=0)
        self.projection_head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))


def ntxent_loss(z0: Tensor, z1: Tensor, temperature: float = 0.5) -> Tensor:
    """Each view's other view is found among all others."""
    z = nn.functional.normalize(torch.cat([z0, z1]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    partner = torch.arange(len(z), device=z.device).roll(len(z0))
    return nn.functional.cross_entropy(logits, partner)


def main() -> None:
    args = arguments(__doc__)

    # was: dataset = LightlyDataset(folder, transform=SimCLRTransform(...)) and
    #      dataloader = torch.utils.data.DataLoader(dataset, batch_size=256, shuffle=True, drop_last=True, ...)
    views = [dino_global("t1", SIZE), dino_global("t2", SIZE)]
    loader = PairedViews(args.beton, args.batch_size, args.engine, seed=0, views=views, device=args.device)
    dataloader = LightlyLoader(loader)

    model = SimCLR().to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    step = 0
    for _ in range(args.steps):
        for batch in dataloader:
            x0, x1 = batch[0]
            loss = ntxent_loss(model(x0), model(x1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if report(step, args, loss=loss):
                return
            step += 1


if __name__ == "__main__":
    main()
