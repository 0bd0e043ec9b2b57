"""What the examples share: their arguments, the demo's images, a small vision transformer, a moving average."""

import argparse
from pathlib import Path

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastpmae_loaders.engines.names import DEFAULT_ENGINE

SIZE, PATCH, WIDTH = 64, 8, 64


def arguments(description: str | None) -> argparse.Namespace:
    """The file to train on (the demo's where none is named, written first if need be) and the number of steps."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("beton", nargs="?", type=Path, help="a .beton file; by default the demo's, under demo/")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--engine", default=DEFAULT_ENGINE, help="what decodes the images: native, torch, ffcv or dali")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.beton is None:
        from fastpmae.demo.demo import write_demo_betons

        args.beton, _ = write_demo_betons(Path("demo"))
    torch.manual_seed(0)
    return args


def report(step: int, args: argparse.Namespace, **losses: Tensor) -> bool:
    """Print a step's losses; whether it was the last one."""
    print(f"step {step + 1}: " + ", ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items()), flush=True)
    return step + 1 >= args.steps


class Encoder(nn.Module):
    """A vision transformer of two blocks, for images of any size: images [B, 3, S, S] -> tokens [B, 1 + N, WIDTH].

    With `keep` [B, V] only those patches are seen; with `hidden` bool [B, N] a learned token stands for those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.blocks = nn.Sequential(Block(WIDTH, 4), Block(WIDTH, 4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor, keep: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        tokens = self.embed(images)
        positions = build_sincos2d_pos_embed(list(tokens.shape[2:]), WIDTH, device=tokens.device)
        tokens = tokens.flatten(2).transpose(1, 2)
        if hidden is not None:
            tokens = torch.where(hidden.unsqueeze(2), self.mask_token, tokens)
        tokens = tokens + positions
        if keep is not None:
            tokens = pick(tokens, keep)
        first = self.class_token.expand(len(tokens), -1, -1)
        return self.norm(self.blocks(torch.cat([first, tokens], 1)))


def pick(tokens: Tensor, ids: Tensor) -> Tensor:
    """Those tokens of each sample: [B, N, D], [B, K] -> [B, K, D]."""
    return tokens.gather(1, ids.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """The teacher moves towards the student."""
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)
