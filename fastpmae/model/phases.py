"""The phases of a run: the whole of it, or first pixels without a teacher and then what the settings say."""

from dataclasses import dataclass, replace
from typing import Literal

from fastpmae.config import Config
from fastpmae.model.build import pixel_epochs, warmup_epochs
from fastpmae.model.resolutions import Resolution, describe_epochs, resolutions_of


@dataclass(frozen=True)
class Phase:
    """Some epochs of a run with networks, optimizer and schedules of their own.

    Attributes:
        name: what is reconstructed in it; None where the run has one phase only.
        config: the settings that hold in it; their epochs are those of the phase, and the size of their views is that
            which the run ends with.
        first_epoch: of the run.
    """

    name: Literal["pixels", "tokens"] | None
    config: Config
    first_epoch: int = 0

    @property
    def number(self) -> int | None:
        """Counted from 1; None where the run has one phase only."""
        return None if self.name is None else 1 + (self.first_epoch > 0)

    @property
    def last_epoch(self) -> int:
        """The epoch of the run before which it ends."""
        return self.first_epoch + self.config.optimizer.epochs


def describe_phase(phase: Phase) -> str:
    """What is about to be learnt, and when."""
    epochs = describe_epochs(phase.first_epoch, phase.last_epoch)
    if phase.name == "pixels":
        return f"{epochs}: the student reconstructs pixels, without a teacher"
    teachers = phase.config.teacher
    start = "as the encoder is now" if teachers.teacher_init == "copy" else "at random"
    return f"{epochs}: teachers ({teachers.teachers}), which begin {start}"


def phases_of(config: Config) -> tuple[Phase, ...]:
    """The phases of a run in their order: with `--pixel-epochs` MAE's method and then the run's own, else one.

    The learning rate warms up and decays in each, over the same share of its epochs. The encoder alone goes from one
    to the next.
    """
    first, epochs = pixel_epochs(config), config.optimizer.epochs
    if config.views.progressive_resolution:
        config = config.using(progressive_resolution=())
    if first == 0:
        return (Phase(None, config),)
    warmup = warmup_epochs(config) / epochs
    lengths = {
        name: {"pixel_epochs": 0.0, "epochs": count, "warmup_epochs": warmup * count}
        for name, count in (("pixels", first), ("tokens", epochs - first))
    }
    pixels = config.using(
        **lengths["pixels"], teachers="none", target="pixels", lambda_m=1.0, lambda_c=0.0, lambda_p=0.0, drop_path=0.0
    )
    return Phase("pixels", pixels), Phase("tokens", config.using(**lengths["tokens"]), first)


def phase_after(config: Config, step: int, steps_per_epoch: int) -> Phase:
    """The phase whose networks a run has after so many steps: after the last step of one they are still its own."""
    *others, last = phases_of(config)
    return next((phase for phase in others if step <= phase.last_epoch * steps_per_epoch), last)


def resolutions_in(phase: Phase, config: Config) -> tuple[Resolution, ...]:
    """The sizes of the views in a phase of a run, over its part of the run's epochs.

    Args:
        config: of the run.

    Raises:
        UserError: see `resolutions_of`.
    """
    cut = (
        replace(
            each,
            first_epoch=max(each.first_epoch, phase.first_epoch),
            last_epoch=min(each.last_epoch, phase.last_epoch),
        )
        for each in resolutions_of(config)
    )
    return tuple(each for each in cut if each.first_epoch < each.last_epoch)
