"""How long the taker of the trainer's batches waits when a GPU takes most of what the prefetcher can give.

`python -m benchmarks.bench_prefetcher [--data DIR_OR_BETON] [--share 0.8] [--workers N] [--quick] [--json F]
[--plot F]`. The prefetcher's own rate is measured first, on real JPEGs. Then a consumer takes a batch, sleeps as long
as a GPU that needs `--share` of that rate would compute, and takes the next: what it waits for is the `data_wait` of
`metrics.jsonl` (on a GPU that is less, since the loop takes a batch while the one before is computed on), and its check
is that this is less than 2 % of the time. Both take turns in one run. No network is trained: what the trainer's own
work on the CPU takes from the loader beside a GPU is not in it.

With `--device cuda` batches go to the GPU as the trainer's do, with their colours made there, and the consumer
computes: products that last as long, which the host hands over and does not wait for. `idle` is then the share of the
time in which the GPU computed none of them, by events around them.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.bench_loader import prepare
from benchmarks.common import Row, add_device, arguments, device_name, finish, make_row, processor_name, save
from benchmarks.step_cases import Laps, matrix_rate
from fastpmae import PRESETS
from fastpmae.distributed.ranks import Ranks, choose_device
from fastpmae.pretraining.data import Prefetcher, make_loader
from fastpmae_loaders import open_samples
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import loader_threads

BATCH, GPU_BATCH = 64, 256
LIMIT = 2.0
"""Per cent of the time that a consumer may wait."""
WARM_UP = 4
"""Batches before the clock starts: what was made ahead while nobody took anything."""


class Sleeper:
    """A consumer on the CPU, which leaves the cores to the loader while it pretends to compute."""

    def work(self, seconds: float) -> None:
        """Be busy for so long."""
        time.sleep(seconds)

    def wait(self) -> None:
        """Until all work is done: it is."""

    def idle(self, passed: float) -> float | None:
        """Unknown: whoever sleeps is neither idle nor at work."""
        return None


class Multiplier:
    """A consumer on a GPU: products one after the other, which the host hands over and does not wait for."""

    def __init__(self, device: torch.device):
        self.device, self.size = device, 4096 if device.type == "cuda" else 64
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.left, self.right = (torch.randn(self.size, self.size, device=device, dtype=dtype) for _ in range(2))
        self.out = torch.empty_like(self.left)
        self.spans: list[Laps] = []
        self.each = 2 * self.size**3 / matrix_rate(device, self.size, 50)

    def work(self, seconds: float) -> None:
        """Hand over products that last so long."""
        span = Laps(self.device)
        span.mark()
        for _ in range(round(seconds / self.each)):
            torch.matmul(self.left, self.right, out=self.out)
        span.mark()
        self.spans.append(span)

    def wait(self) -> None:
        """Until all work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def idle(self, passed: float) -> float | None:
        """The share of `passed` seconds in which none of the products since the last call was computed."""
        busy, self.spans = sum(span.seconds()[0] for span in self.spans), []
        return max(0.0, 1 - busy / passed)


def taken(
    prefetcher: Prefetcher, epoch: int, batches: int, seconds_each: float, consumer: Sleeper | Multiplier
) -> tuple[float, float]:
    """Take batches, computing `seconds_each` after every one; the seconds that went by, and those of them waiting."""
    source = prefetcher.epoch(epoch, 0)
    for _ in range(WARM_UP):
        next(source)
        consumer.work(seconds_each)
    consumer.wait()
    prefetcher.take_wait()
    consumer.idle(1.0)
    start = time.perf_counter()
    for _ in range(batches):
        next(source)
        consumer.work(seconds_each)
    consumer.wait()
    passed = time.perf_counter() - start
    source.close()
    return passed, prefetcher.take_wait()


def rows_of(
    beton: Path, batch: int, workers: int, share: float, rounds: int, batches: int, device: torch.device | str = "cpu"
) -> list[Row]:
    """The prefetcher's rate, and the share of the time that the consumer waits."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    config = PRESETS["paper"].using(beton=beton, batch_size=batch, workers=workers)
    if on_gpu:
        config = config.using(augment_on="device")
    consumer = Multiplier(device) if on_gpu else Sleeper()
    rates, waits, free, idle = [], [], [], []
    with make_loader(open_samples(beton), config, Ranks(0, 1, 1, device, None)) as loader:
        prefetcher = Prefetcher(loader, config, device)
        taken(prefetcher, 0, 1, 0.0, consumer)  # compiles
        for turn in range(rounds):
            passed, waited = taken(prefetcher, 2 * turn + 1, batches, 0.0, consumer)
            rates.append(batch * batches / passed)
            free.append(100 * waited / passed)
            passed, waited = taken(prefetcher, 2 * turn + 2, batches, batch / (share * rates[-1]), consumer)
            waits.append(100 * waited / passed)
            of_consumer = consumer.idle(passed)
            if of_consumer is not None:
                idle.append(100 * of_consumer)
    where = f"{processor_name()}, {workers} workers, batches of {batch}"
    if on_gpu:
        where = f"{device_name('cuda')}, {where}"
    name, gate = f"consumer of {share:.0%}", statistics.median(waits) < LIMIT
    rows = [
        make_row("prefetcher", "images_per_second", "images/s", rates, where, True, more_is_better=True),
        make_row("prefetcher", "data_wait", "%", free, where, True),
        make_row(name, "data_wait", "%", waits, where, gate),
    ]
    return rows + ([make_row(name, "idle", "%", idle, where, gate)] if idle else [])


def picture(rows: Sequence[Row], title: str, file: Path) -> None:
    """The share of the time that is spent waiting, with the spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    waits = [row for row in rows if row.metric == "data_wait"]
    figure, axes = plt.subplots(figsize=(8, 2.2))
    spread = [[row.value - row.low for row in waits], [row.high - row.value for row in waits]]
    bars = axes.barh([row.case for row in waits], [row.value for row in waits], xerr=spread, capsize=3)
    axes.bar_label(bars, fmt="%.2f %%", padding=6)
    axes.axvline(LIMIT, color="tab:red", linestyle="--", label=f"{LIMIT:g} %")
    axes.legend()
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="share of the time waiting for data, %", title=title)
    save(figure, file)


def main() -> int:
    parser = arguments("bench_prefetcher", (__doc__ or "").split("\n\n")[0])
    add_device(parser)
    parser.add_argument("--data", type=Path, metavar="DIR_OR_BETON", help="images to read")
    parser.add_argument("--workers", type=int, default=loader_threads(), help="loader threads")
    parser.add_argument(
        "--batch", type=int, default=0, help=f"images in a batch: {BATCH}, with --quick 16; on a GPU {GPU_BATCH}, or 64"
    )
    parser.add_argument("--share", type=float, default=0.8, help="of the prefetcher's rate that the consumer takes")
    given = parser.parse_args()
    if not 0 < given.share < 1:
        parser.error(f"--share {given.share} is not between 0 and 1")
    rounds, batches = (2, 40) if given.quick else (5, 60)
    with tempfile.TemporaryDirectory(prefix="bench_prefetcher_") as folder:
        try:
            device = choose_device(given.device)
            few, many = (64, GPU_BATCH) if device.type == "cuda" else (16, BATCH)
            batch = given.batch or (few if given.quick else many)
            images = prepare(given.data, Path(folder), batch * (batches + WARM_UP))
            rows = rows_of(images.beton, batch, given.workers, given.share, rounds, batches, device)
        except UserError as error:
            print(f"bench_prefetcher: error: {error}", file=sys.stderr)
            return 2
    return finish(rows, f"Waiting for data: {images.words}", given.json, given.plot, picture)


if __name__ == "__main__":
    sys.exit(main())
