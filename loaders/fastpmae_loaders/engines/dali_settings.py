"""What of the DALI engine's work is a setting: how much it does at a time, and which of a GPU's decoders does it."""

from dataclasses import dataclass

from fastpmae_loaders.errors import UserError
from fastpmae_loaders.values import Typed

PARTS = {"cpu": 32, "gpu": 64}
MOST = 4096


@dataclass(frozen=True)
class DaliSettings(Typed):
    """Settings of engine="dali". Crops, flips and masks do not depend on them, and no image's pixels on its neighbours.

    Attributes:
        part: images that DALI gets at a time; 0 takes 32 on the CPU and 64 on a GPU.
        hw_decoder_load: on a GPU, the share of the images whose JPEG its decoder in hardware decodes (A100, H100 and
            later have one), 0 to 1. It makes slightly other pixels than the decoder in CUDA does, so which of them an
            image meets is decided by its number alone. On the CPU it changes nothing.

    Raises:
        UserError: for numbers that are no such.
    """

    OF = "dali: "
    part: int = 0
    hw_decoder_load: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.part <= MOST:
            raise UserError(f"dali: part = {self.part} must be between 1 and {MOST} images, or 0")
        if not 0 <= self.hw_decoder_load <= 1:
            raise UserError(f"dali: hw_decoder_load = {self.hw_decoder_load} must be a share between 0 and 1")


def dali_of(settings: DaliSettings | None, engine: str) -> DaliSettings:
    """The settings that were asked for, or the usual ones. UserError for some of another engine."""
    if settings is not None and engine != "dali":
        raise UserError(f"dali: settings of engine 'dali' were given, and the engine is {engine!r}: leave them out")
    return settings or DaliSettings()
