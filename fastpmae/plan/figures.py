"""All that a plan says, as numbers."""

from dataclasses import dataclass

from fastpmae.config import Config
from fastpmae.plan.costs import Costs
from fastpmae.plan.gpus import Gpu
from fastpmae.plan.loader_rate import LoaderRate
from fastpmae.plan.scaling import (
    Point,
    Traffic,
)


@dataclass(frozen=True)
class Method:
    """A row of Table 6."""

    name: str
    costs: Costs
    seconds: float
    days: float
    """Of the whole run with the plan's own epochs."""


@dataclass(frozen=True)
class ModelNeeds:
    """What one model asks of the loader."""

    model: str
    flops: float
    """An image."""
    images_per_second: dict[str, float]
    """By GPU, for each."""
    cores: dict[str, float]
    """By GPU, for each: with fewer the loader is the bottleneck."""


@dataclass(frozen=True)
class PixelPhase:
    """The first phase of a run with `--pixel-epochs`."""

    epochs: int
    steps: int
    costs: Costs
    seconds: float
    """A step's."""
    hours: float


@dataclass(frozen=True)
class SizePart:
    """The epochs of a phase in which the views have one size, of a run with `--progressive-resolution`."""

    phase: str | None
    size: int
    epochs: int
    steps: int
    costs: Costs
    seconds: float
    """A step's."""
    hours: float
    images_per_second: float
    """That the loader must deliver, to all GPUs."""
    flops_at_last: int
    """Of the same step with views of the last size."""
    seconds_at_last: float


@dataclass(frozen=True)
class Report:
    """All that a plan says. Bytes, seconds, FLOPs, unless a name says otherwise."""

    config: Config
    """Of the phase that the figures are of, the last one where there are two, with views of the last size."""
    gpu_name: str
    gpu: Gpu
    gpus: int
    epoch_images: int
    efficiency_of_peak: float
    jitter: float
    costs: Costs
    """Of one GPU's share of a step."""
    largest_batch: int
    """Images on each GPU at a time that fit."""
    fitting_accumulate: int | None
    """The fewest micro-batches that fit; 1 where the plan fits as it is, None where none does."""
    step: Point
    """On the GPUs of the plan."""
    peak_seconds: float
    """The step's products at the data sheet's rate."""
    traffic_seconds: float
    """The step's memory traffic when nothing is fused, at the data sheet's rate."""
    steps: int
    hours: float
    """Of all phases and sizes of views."""
    pixels: PixelPhase | None
    """With views of the last size all the time."""
    sizes: list[SizePart]
    """In their order; none where all views have one size."""
    loader: LoaderRate
    busy: float | None
    needed_rate: float
    """Images/s of all GPUs."""
    needed_cores: float
    """For each GPU."""
    cores: float
    """For each GPU, that there are."""
    methods: list[Method]
    """The rows of Table 6; where the plan has its logits whole, then those of methods with logits in chunks."""
    models: list[ModelNeeds]
    messages: Traffic
    weak: list[Point]
    strong: list[Point]

    @property
    def saved_flops(self) -> float:
        """The share of the whole run's FLOPs that smaller views save."""
        whole = sum(part.steps * part.flops_at_last for part in self.sizes)
        return 1 - sum(part.steps * part.costs.flops for part in self.sizes) / whole if whole else 0.0

    @property
    def hours_at_last(self) -> float:
        """What the run would take with views of the last size all the time."""
        return sum(part.steps * part.seconds_at_last for part in self.sizes) / 3600 if self.sizes else self.hours
