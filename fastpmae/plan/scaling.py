"""How a run grows over many GPUs: what they send each other in a step, how long that takes, and where growth ends.

An all-reduce takes latency + bytes / bandwidth, as NCCL's own tuner (src/graph/tuning.cc) models it: the best of a
ring and a double tree, each in a protocol for large messages ("simple") and one for small ones ("LL"). Latencies are
that file's figures. Every step waits for its slowest GPU. Not modelled: congestion, reductions within the switch
(NVLink SHARP, SHARP), shared storage, and what the hosts agree on after every step (some bytes over
gloo's ring, 2 (n - 1) hops by TCP one after the other; at some tens of microseconds each up to a tenth of a second at
1,024 GPUs, hidden only while GPUs have as much left to compute). A real machine scales less well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from fastpmae.plan.gpus import Gpu

LINKS_REACH = 0.8
"""Share of a link's data-sheet bandwidth that a large message reaches (an assumption; nccl-tests show 0.75 to 0.9)."""

BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel sends at a time, torch's default; its first bucket is 1 MiB."""
FIRST_BUCKET = 2**20

JITTER = 0.01
"""Standard deviation of a GPU's step, as a share of it (an assumption): clocks, the host, the loader."""

GOOD = 0.9
"""Scaling is said to end where less than this share of one GPU's rate is left."""


@dataclass(frozen=True)
class Way:
    """One way to add up a message: microseconds to start, and for a hop by NVLink, PCIe and between machines."""

    shape: Literal["ring", "tree"]
    start: float
    nvlink: float
    pcie: float
    network: float
    share: float
    """Of the links' bandwidth. Small messages carry a flag with each word: quick to start, a quarter of the rate."""


WAYS = (
    Way("tree", 4.4, 0.52, 1.0, 5.0, 0.25),
    Way("tree", 0.0, 28.0, 28.0, 50.0, 1.0),
    Way("ring", 3.6, 0.47, 1.0, 2.7, 0.25),
    Way("ring", 8.4, 3.4, 5.7, 9.6, 1.0),
)


@dataclass(frozen=True)
class Traffic:
    """What one GPU tells the others in a step."""

    gradients: int
    """Bytes, in fp32."""
    assignments: Sequence[int]
    """Bytes of each message of the Sinkhorn iterations, one after the other, each waited for."""
    flags: int
    """Bytes of the last message, whether all gradients are finite."""
    fsdp: Sequence[float] = ()
    """With --shard (FSDP2): bytes of each message that puts a block together or takes its gradients apart, in order."""

    def sent(self, gpus: int) -> float:
        """Bytes that each GPU sends, by rings: a sum goes around twice but for a rank's share, sharded weights once."""
        summed = sum(self.assignments) + self.flags + (0 if self.fsdp else self.gradients)
        return (gpus - 1) / gpus * (2 * summed + sum(self.fsdp))


def traffic(
    trained: int, prototypes: int, iterations: int, micro_batches: int = 1, fsdp: Sequence[float] = (), rounds: int = 1
) -> Traffic:  # fmt: skip
    """The messages of a step.

    Args:
        trained: parameters with a gradient.
        prototypes: of all label matrices together; 0 where there are no pseudo labels.
        micro_batches: of the step that have labels of their own; gradients travel with the last.
        fsdp: see `Traffic`.
        rounds: one after the other in which the matrices are balanced, each with an equal share of the prototypes.
    """
    # one message of maxima, then one of sums for each iteration
    assignments = [4 * prototypes // rounds] * ((1 + iterations) * rounds * micro_batches) if prototypes else []
    return Traffic(4 * trained, assignments, 4, fsdp)


def fsdp_messages(
    student: Sequence[tuple[int, int]], teachers: Sequence[tuple[int, int]], micro_batches: int
) -> list[float]:
    """Bytes of each message of `Traffic.fsdp`: weights of teachers once a micro-batch, of the student once for each
    direction, and its gradients.

    Args:
        student, teachers: parameters of each network, and the blocks that they are cut in.
    """

    def once(networks: Sequence[tuple[int, int]]) -> list[float]:
        return [4 * count / blocks for count, blocks in networks for _ in range(blocks)]

    backward = [nbytes for nbytes in reversed(once(student)) for _ in ("weights", "gradients")]
    return (once(teachers) + once(student) + backward) * micro_batches


def all_reduce(nbytes: float, gpus: int, gpu: Gpu) -> float:
    """Seconds until every one of `gpus` GPUs has the sum of a message that each has a part of."""
    if gpus == 1:
        return 0.0
    here = min(gpus, gpu.per_node)
    nodes = math.ceil(gpus / gpu.per_node)
    # A ring goes through each GPU's link once and through each machine's network once.
    rate = LINKS_REACH * (gpu.link if nodes == 1 else min(gpu.link, gpu.network))
    times = []
    for way in WAYS:
        hop = way.nvlink if gpu.nvlink else way.pcie
        if way.shape == "ring":
            latency = 2 * (gpus - nodes) * hop + 2 * (nodes - 1) * way.network
            times_sent = 2 * (gpus - 1) / gpus
        else:
            latency = 2 * ((here - 1) * hop + math.ceil(math.log2(nodes)) * way.network)
            times_sent = 2.0
        times.append(1e-6 * (way.start + latency) + times_sent * nbytes / (rate * way.share))
    return min(times)


@dataclass(frozen=True)
class Point:
    """A step on so many GPUs. Times in seconds."""

    gpus: int
    compute: float
    gradients: float
    """Gradients travel and nothing is left to compute meanwhile."""
    assignments: float
    """The pseudo labels' messages and the last flag."""
    slowest: float
    """Waiting for the slowest GPU."""
    efficiency: float
    """Images a second and GPU, against one GPU alone."""

    @property
    def seconds(self) -> float:
        return self.compute + self.gradients + self.assignments + self.slowest

    @property
    def loss(self) -> str:
        """What takes the most beside computing."""
        return max(("gradients", "assignments", "slowest"), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Step:
    """A step on one GPU, as far as it matters to others."""

    compute: float
    """Seconds."""
    backward: Sequence[tuple[float, int]]
    """Seconds of the backward pass and parameters, network by network in its order."""
    messages: Traffic

    def times(self, factor: float) -> "Step":
        """The same with so many times the images."""
        backward = [(seconds * factor, count) for seconds, count in self.backward]
        return Step(self.compute * factor, backward, self.messages)


def step_on(gpus: int, gpu: Gpu, step: Step, jitter: float = JITTER, alone: float | None = None) -> Point:
    """The step on each of so many GPUs: gradients travel while the backward pass goes on, the rest is waited for.

    Args:
        jitter: standard deviation of a GPU's step, as a share of it.
        alone: seconds that one GPU takes for what they do together, over their number; by default `step.compute`.
    """
    if gpus == 1:
        return Point(1, step.compute, 0.0, 0.0, 0.0, (alone or step.compute) / step.compute)
    late = _late(gpus, gpu, step)
    waits = sum(all_reduce(nbytes, gpus, gpu) for nbytes in (*step.messages.assignments, step.messages.flags))
    # the mean of the largest of n normal numbers, by Blom's approximation
    slowest = step.compute * jitter * NormalDist().inv_cdf((gpus - 0.375) / (gpus + 0.25))
    total = step.compute + late + waits + slowest
    return Point(gpus, step.compute, late, waits, slowest, (alone or step.compute) / total)


def _late(gpus: int, gpu: Gpu, step: Step) -> float:
    """Seconds in which weights or gradients travel and nothing is left to compute meanwhile."""
    if step.messages.fsdp:
        # Either half of an all-reduce. All but the first and the last travel while other blocks are computed.
        times = [all_reduce(nbytes, gpus, gpu) / 2 for nbytes in step.messages.fsdp]
        return max(times[0] + times[-1], sum(times) - step.compute)
    done = 0.0
    for moment, nbytes in buckets(step.backward):
        done = max(done, moment) + all_reduce(nbytes, gpus, gpu)
    return max(0.0, done - sum(seconds for seconds, _ in step.backward))


def buckets(backward: Sequence[tuple[float, int]]) -> list[tuple[float, float]]:
    """When each bucket of gradients is full, in seconds from the backward pass's start, and its bytes."""
    full: list[tuple[float, float]] = []
    clock = pending = 0.0
    for seconds, parameters in backward:
        nbytes, made = 4 * parameters, 0.0
        while made < nbytes:
            size = BUCKET if full else FIRST_BUCKET
            taken = min(size - pending, nbytes - made)
            made += taken
            pending += taken
            if pending >= size:
                full.append((clock + seconds * made / nbytes, pending))
                pending = 0.0
        clock += seconds
    return [*full, (clock, pending)] if pending else full


def counts(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**power for power in range(most.bit_length())]


def weak_scaling(gpu: Gpu, step: Step, most: int = 1024, jitter: float = JITTER) -> list[Point]:
    """On more and more GPUs, each with as many images as one alone."""
    return [step_on(gpus, gpu, step, jitter) for gpus in counts(most)]


def strong_scaling(gpu: Gpu, step: Step, images: int, most: int = 1024, jitter: float = JITTER) -> list[Point]:
    """On more and more GPUs that share the `images` of one step out among them, while each has at least one."""
    return [step_on(gpus, gpu, step.times(1 / gpus), jitter, step.compute / gpus) for gpus in counts(min(most, images))]


def where_it_ends(points: Sequence[Point]) -> Point | None:
    """The first point that is no longer good."""
    return next((point for point in points if point.efficiency < GOOD), None)
