"""Where a run's rows go besides its folder: TensorBoard's files, and Weights & Biases."""

import uuid
from pathlib import Path
from typing import Any

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.printable import on_one_line
from fastpmae_loaders.sources.reading import read_file

WANDB_ID = "wandb-id"
"""The file of a run's folder with the id of its run on the server, by which a resumed run goes on there."""


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
    """A run of a project's on a server. Raises UserError where the package is missing or the run cannot begin there."""

    name = "W&B"

    def __init__(self, folder: Path, settings: dict[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError("--wandb: the package is not installed; pip install wandb, or leave the flag out") from None
        number = _id_in(folder)
        try:
            self.run = wandb.init(
                project="fastpmae",
                name=folder.name,
                id=number,
                resume="allow",
                dir=folder,
                config=settings,
            )
            # Its own steps only ever grow: rows of a run that has gone back to a checkpoint would be dropped.
            self.run.define_metric("*", step_metric="step")
        except Exception as error:  # no login, no network, a refusal: each of its own kind
            raise UserError(
                f"--wandb: no run can begin there ({on_one_line(str(error))}): log in with `wandb login`, set "
                "WANDB_MODE=offline, or leave the flag out"
            ) from None

    def row(self, row: dict[str, float]) -> None:
        self.run.log(row)

    def close(self) -> None:
        self.run.finish()


def _id_in(folder: Path) -> str:
    """The id of a folder's run on the server: a random one, since folders of one name would be one run."""
    file = folder / WANDB_ID
    if not file.exists():
        # Runs of earlier versions have begun there under the folder's name.
        number = folder.name if (folder / "wandb").is_dir() else uuid.uuid4().hex[:16]
        with atomic_write(file) as beside:
            beside.write_text(number + "\n", encoding="utf-8")
    return read_file(file).decode(errors="replace").strip()
