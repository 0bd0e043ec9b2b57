"""Where a run's rows go besides its folder: TensorBoard's files, and Weights & Biases."""

from pathlib import Path
from typing import Any

from fastpmae_loaders.errors import UserError


class TensorBoard:
    """Scalars in a folder; rows past `first_step` are taken back, since they are computed again."""

    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def row(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of a project's on a server. Raises UserError where the package is missing."""

    name = "W&B"

    def __init__(self, folder: Path, settings: dict[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError("--wandb: the package is not installed; pip install wandb, or leave the flag out") from None
        # One id a folder, so that a resumed run goes on in the same place.
        self.run = wandb.init(
            project="fastpmae",
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=folder,
            config=settings,
        )

    def row(self, row: dict[str, float]) -> None:
        self.run.log(row, step=int(row["step"]))

    def close(self) -> None:
        self.run.finish()
