"""The cases of `bench_step`, `bench_table6` and `on_gpu`: the trainer's own step and the usual one, on either device.

A case is made by name and takes steps on batches that are where it computes. On a GPU they are timed by events, and
memory is the allocator's; each case is closed before the next is made, so that neither holds the other's.
"""

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from benchmarks.baseline import PlainBatch, PlainMethod, plain_batch
from fastpmae import PRESETS, Config
from fastpmae.config import CUDA_GRAPHS
from fastpmae.distributed.ranks import Ranks
from fastpmae.model.attention import use as use_attention
from fastpmae.model.build import shape_of
from fastpmae.plan.costs import flops_of_an_image
from fastpmae.pretraining.compile import compile_step
from fastpmae.pretraining.data import stochastic_depth
from fastpmae.pretraining.networks import make_networks
from fastpmae.pretraining.optimizer import make_optimizer, update
from fastpmae.pretraining.step import (
    Losses,
    Targets,
    assign_pseudo_labels,
    compute_targets,
    student_loss,
    teacher_forward,
)
from fastpmae_loaders import Batch
from fastpmae_loaders.transfer import Transfer

Precision = Literal["fp32", "bf16"]
Mark = Callable[[str], None]

DROP_PATH = 0.25
"""In every method, also in MAE, whose own is 0."""
STEPS, RATE = 10_000, 1e-4
CPU = torch.device("cpu")
HOST_STEPS = 3
"""Steps that the host's own time is taken from."""


def settings(preset: str, model: str, batch_size: int, **others: Any) -> Config:
    return PRESETS[preset].using(model=model, batch_size=batch_size, **others)


def settings_of(method: str, model: str, batch_size: int, **others: Any) -> Config:
    """The trainer's settings in a case: `dual`, or a preset's, and `others` by their names."""
    return settings("paper" if method == "dual" else method, model, batch_size, **{"drop_path": DROP_PATH, **others})


def made_batch(config: Config, size: int, seed: int = 0) -> Batch:
    """Random pixels and a random mask for each image: a step's work does not depend on what they show."""
    generator = torch.Generator().manual_seed(seed)
    side = config.views.image_size
    patches = (side // shape_of(config.network).patch_size) ** 2
    masked = int(patches * config.views.mask_ratio)
    fold, rest = divmod(masked, config.views.folds)
    order = torch.stack([torch.randperm(patches, generator=generator) for _ in range(size)])
    views = torch.randint(0, 256, (2, size, 3, side, side), generator=generator, dtype=torch.uint8)
    return Batch(
        views=(views[0], views[1]),
        visible=order[:, : patches - masked].contiguous(),
        folds=order[:, patches - masked :].contiguous(),
        fold_sizes=tuple(fold + (i < rest) for i in range(config.views.folds)),
        label=torch.zeros(size, dtype=torch.int64),
        index=torch.arange(size),
        boxes=torch.zeros(size, 2, 4, dtype=torch.int32),
        flips=torch.zeros(size, 2, dtype=torch.bool),
        factors=torch.ones(size, 2, 5, dtype=torch.float64),
        choices=torch.zeros(size, 2, 9, dtype=torch.uint8),
        source_size=torch.zeros(size, 2, dtype=torch.int32),
        samples=np.arange(size),
        failed=[],
    )


def unmarked(part: str) -> None:
    """For a step of which nobody asks how long its parts take."""


class Ours:
    """The trainer's step as its loop takes it: the same passes, autocast, attention and optimizer.

    Attributes:
        targets, out: what the last step's teachers gave and the student's losses; None before the first.
    """

    def __init__(self, config: Config, device: torch.device = CPU):
        self.config, self.device = config, device
        self.ranks = Ranks(0, 1, 1, device, None)
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(use_attention(config.efficiency.attention, device))
        self.student, self.teachers = make_networks(config, STEPS, device, None)
        self.optimizer = make_optimizer(self.student, config)
        self.teacher_forward, self.student_loss = compile_step(teacher_forward, student_loss, config, self.ranks)
        self.autocast = _autocast(config, device)
        self.transfer = Transfer(device)
        self.targets: Targets | None = None
        self.out: Losses | None = None
        self.steps = 0

    @property
    def replays(self) -> bool:
        """Whether the passes are CUDA graphs."""
        efficiency = self.config.efficiency
        return self.device.type == "cuda" and efficiency.compile_mode in CUDA_GRAPHS

    def given(self, batch: Batch) -> Batch:
        """The batch as `losses` and `step` take it, where the case computes."""
        return batch.to(self.device)

    def losses(self, batch: Any) -> list[float]:
        """Of the passes as they are without torch.compile, and without stochastic depth, which the two draw
        differently."""
        return self._eager_losses(batch, None)

    def step(self, batch: Any, mark: Mark = unmarked) -> None:
        self.targets = self.out = None
        drop_path_scale = self._keep(batch)
        mark("data")
        with self.autocast:
            (self.targets,) = assign_pseudo_labels(
                [self.teacher_forward(self.teachers, batch, self.config)], self.config
            )
        mark("teachers")
        with self.autocast:
            self.out = out = self.student_loss(self.student, batch, drop_path_scale, self.targets, self.config)
        mark("forward")
        out.total.backward()
        mark("backward")
        update(self.optimizer, out.total.detach(), RATE, self.config.optimizer.clip_grad, self.ranks)
        mark("optimizer")
        self.teachers.update_ema(self.student, "step", self.steps)
        mark("EMA")
        self.steps += 1

    def _keep(self, batch: Batch) -> torch.Tensor | None:
        """Stochastic depth's factors, on their way as the trainer sends them."""
        drop_path_scale = stochastic_depth(self.config, 0, batch.samples)
        return None if drop_path_scale is None else self.transfer.carry(drop_path_scale)

    def checked_step(self, batch: Batch) -> float:
        """Take a step, compiled where the passes are; how far its losses are `apart` from those without."""
        drop_path_scale = self._keep(batch)
        expected = self._eager_losses(batch, drop_path_scale)
        self.step(batch)
        assert self.out is not None
        return apart([float(loss.detach()) for loss in self.out[:4]], expected)

    def close(self) -> None:
        """Give attention back; another case may be made."""
        self.stack.close()

    def _eager_losses(self, batch: Batch, drop_path_scale: torch.Tensor | None) -> list[float]:
        with torch.no_grad(), self.autocast:
            targets = compute_targets(self.teachers, batch, self.config)
            return [
                float(loss) for loss in student_loss(self.student, batch, drop_path_scale, targets, self.config)[:4]
            ]


class Plain:
    """The usual step, with the weights of another case.

    Args:
        ours: whose weights and settings to take; may be closed and dropped afterwards.
        compiled: the teachers' pass and the student's are compiled, as `Ours` compiles its own.
    """

    replays = False

    def __init__(self, ours: Ours, device: torch.device = CPU, compiled: bool = False):
        self.config, self.device = ours.config, device
        self.method = PlainMethod(ours.config, ours.student, ours.teachers, device)
        self.teach, self.learn = self.method.teach, self.method.learn
        if compiled:
            self.teach, self.learn = torch.compile(self.teach), torch.compile(self.learn)
        self.autocast = _autocast(ours.config, device)
        self.steps = 0

    def given(self, batch: Batch) -> PlainBatch:
        """The batch as `losses` and `step` take it: normalised, where the case computes."""
        return plain_batch(batch.to(self.device))

    def losses(self, batch: Any) -> list[float]:
        self.method.student.eval()
        with torch.no_grad(), self.autocast:
            losses = [float(loss) for loss in self.method.learn(batch, self.method.teach(batch))]
        self.method.student.train()
        return losses

    def step(self, batch: Any, mark: Mark = unmarked) -> None:
        mark("data")
        with self.autocast:
            targets = self.teach(batch)
        mark("teachers")
        with self.autocast:
            losses = self.learn(batch, targets)
        mark("forward")
        losses.total.backward()
        mark("backward")
        self.method.update(losses, RATE)
        mark("optimizer")
        self.method.follow(self.steps)
        mark("EMA")
        self.steps += 1

    def close(self) -> None:
        """It holds nothing that others share."""


def make_case(
    name: str,
    model: str,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    compiled: bool = False,
    chunk: int = 0,
    **others: Any,
) -> Ours | Plain:
    """A case by its name, from the same seed as its partner.

    Args:
        name: `dual`, or a preset; behind `plain-` the usual code of it, which there is of `dual` and `sdae`.
        device: where it computes; `cuda` is the first GPU.
        precision: of activations; `bf16` is autocast's.
        compiled: whether torch.compile makes the passes.
        chunk: the trainer's `prototypes_chunk`.
        others: further settings of the trainer by their names (`depth`, `attention`, `compile_mode`, ...).

    Raises:
        UserError: for an attention that is not to be had.
    """
    method = name.removeprefix("plain-")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    more = {"prototypes_chunk": chunk, "compile": "on" if compiled else "off", **others}
    config = settings_of(method, model, batch_size, precision=precision, **more)
    if method == name:
        return Ours(config, device)
    # The weights alone are of interest: they are made on the CPU, as those of `Ours` are, in eager mode.
    partner = Ours(config.using(compile="off", compile_mode="default", attention="auto", teacher_precision="auto"))
    try:
        return Plain(partner, device, compiled)
    finally:
        partner.close()


def _autocast(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.efficiency.precision == "bf16")


def apart(found: Sequence[float], truth: Sequence[float]) -> float:
    """The largest relative distance of numbers from the true ones."""
    return max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(found, truth, strict=True))


def most_apart(device: torch.device | str, precision: Precision) -> float:
    """How far apart the losses of two ways to compute them may be: on GPUs convolutions are in TF32, and in bf16 some
    patches are matched with others."""
    if precision == "bf16":
        return 2e-2
    return 1e-3 if torch.device(device).type == "cuda" else 1e-4


class Laps:
    """Points in time by the clock of what computes: events of a GPU, which reaches them when its work is done."""

    def __init__(self, device: torch.device | str):
        self.on_gpu = torch.device(device).type == "cuda"
        self.points: list[Any] = []

    def mark(self) -> None:
        if self.on_gpu:
            self.points.append(torch.cuda.Event(enable_timing=True))
            self.points[-1].record()
        else:
            self.points.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each point to the next. Waits for the last one."""
        if not self.on_gpu:
            return [end - begin for begin, end in itertools.pairwise(self.points)]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(self.points)]


class Timing(NamedTuple):
    """What some steps of a case took."""

    seconds: list[float]
    """Of each step; on a GPU from the end of the one before, by events."""
    warm_up: float
    """Seconds of the steps before, which compile."""
    host: list[float]
    """Seconds that the host takes to hand a step over to a GPU that has nothing else to do. Where it waits in the step,
    or for room among the thousand kernels that may be on their way, that is in it. On the CPU the steps' own."""
    peak: int
    """Bytes that torch's allocator held at most on the GPU, batches and weights too; 0 on the CPU."""

    def figures(self, images: int) -> dict[str, float]:
        """Of steps of so many images: medians of a step and of the host's part in it (ms), images a second, the peak
        (GiB) and the warm-up (s)."""
        step = statistics.median(self.seconds)
        return {
            "step_ms": 1e3 * step,
            "images_per_second": images / step,
            "peak_gib": self.peak / 2**30,
            "warm_up_s": self.warm_up,
            "host_ms": 1e3 * statistics.median(self.host),
        }


def take_steps(case: Ours | Plain, batches: Sequence[Any], steps: int, warm: int = 4) -> Timing:
    """Time `steps` steps after `warm` others, going round the batches (as `case.given` gives them)."""
    on_gpu = case.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for turn in range(warm):
        case.step(batches[turn % len(batches)])
    if on_gpu:
        torch.cuda.synchronize()
    warm_up = time.perf_counter() - start
    if on_gpu and not case.replays:  # a CUDA graph's memory is taken when it is recorded, not when it is replayed
        torch.cuda.reset_peak_memory_stats()
    laps = Laps(case.device)
    laps.mark()
    for turn in range(steps):
        case.step(batches[turn % len(batches)])
        laps.mark()
    seconds = laps.seconds()
    if not on_gpu:
        return Timing(seconds, warm_up, seconds, 0)
    peak, host = torch.cuda.max_memory_allocated(), []
    for turn in range(HOST_STEPS):
        start = time.perf_counter()
        case.step(batches[turn % len(batches)])
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return Timing(seconds, warm_up, host, peak)


def seconds_of_parts(case: Ours | Plain, batch: Any) -> dict[str, float]:
    """Seconds of each part of one step, by the clock of what computes."""
    laps, parts = Laps(case.device), []

    def mark(part: str) -> None:
        parts.append(part)
        laps.mark()

    laps.mark()
    case.step(batch, mark)
    return dict(zip(parts, laps.seconds(), strict=True))


class Measured(NamedTuple):
    """A case that was made, checked, timed and let go."""

    config: Config
    losses: list[float]
    """Of the first batch at the start; see `Ours.losses`."""
    apart: float
    """How far a step's losses were from those without torch.compile; 0 for the usual code."""
    timing: Timing
    parts: list[dict[str, float]]
    """`seconds_of_parts` of some steps more."""


def measured_case(name: str, model: str, batch_size: int, steps: int, **how: Any) -> Measured:
    """A case that is alone: afterwards its memory is free, and what was compiled for it forgotten.

    Args:
        steps: that are timed.
        how: as `make_case` takes it.
    """
    case = make_case(name, model, batch_size, **how)
    try:
        batches: list[Any] = [case.given(made_batch(case.config, batch_size, seed)) for seed in range(2)]
        losses = case.losses(batches[0])
        start = time.perf_counter()
        distance = case.checked_step(batches[0]) if isinstance(case, Ours) else 0.0
        first = time.perf_counter() - start
        timing = take_steps(case, batches, steps)
        parts = [seconds_of_parts(case, batches[0]) for _ in range(HOST_STEPS)]
        return Measured(case.config, losses, distance, timing._replace(warm_up=first + timing.warm_up), parts)
    finally:
        case.close()
        del case
        release()


def release() -> None:
    """After the last reference to a case is gone: what it compiled and held goes too."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def model_flops(config: Config) -> float:
    """FLOPs that a step of the method needs for an image, whoever computes it: without any that is computed anew."""
    return flops_of_an_image(config.using(prototypes_chunk=0, activation_checkpointing=0, teacher_precision="auto"))


def matrix_rate(device: torch.device | str, size: int = 0, repeats: int = 20) -> float:
    """FLOP/s of a product of two square matrices of random numbers: the median of some.

    Args:
        size: of a side; by default 8,192 in bf16 on a GPU. On the CPU, in fp32, 512.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    size, dtype = size or (8192 if on_gpu else 512), torch.bfloat16 if on_gpu else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(5):  # the first one chooses its kernel, and a GPU wakes
        torch.matmul(left, right)
    laps = Laps(device)
    laps.mark()
    for _ in range(repeats):
        torch.matmul(left, right)
        laps.mark()
    return 2 * size**3 / statistics.median(laps.seconds())
