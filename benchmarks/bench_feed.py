"""How long whoever takes batches from the trainer's feed waits when a GPU takes most of what the feed can give.

`python -m benchmarks.bench_feed [--data DIR_OR_BETON] [--share 0.8] [--workers N] [--quick] [--json F] [--plot F]`. The
feed's own rate is measured first, on real JPEGs. Then a consumer takes a batch, sleeps as long as a GPU that needs
`--share` of that rate would compute, and takes the next: what it waits for is the `data_wait` of `metrics.jsonl` (on a
GPU that is less, since the loop takes a batch while the one before is computed on), and
its check is that this is less than 2 % of the time. Both take turns in one run. No network is trained: what the
trainer's own work on the CPU takes from the loader beside a GPU is not in it.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.bench_loader import prepare
from benchmarks.common import Row, arguments, finish, make_row, processor_name, save
from fastpmae import PRESETS
from fastpmae.data import Feed, make_loader
from fastpmae.errors import UserError
from fastpmae.workers import usable_cores
from fastpmae.world import World
from fastpmae_loaders import open_samples

ALONE = World(0, 1, 1, torch.device("cpu"), None)
BATCH = 64
LIMIT = 2.0
"""Per cent of the time that a consumer may wait."""
WARM_UP = 4
"""Batches before the clock starts: what was made ahead while nobody took anything."""


def taken(feed: Feed, epoch: int, batches: int, seconds_each: float) -> tuple[float, float]:
    """Take batches, computing `seconds_each` after every one; the seconds that went by, and those of them waiting."""
    source = feed.epoch(epoch, 0)
    for _ in range(WARM_UP):
        next(source)
        time.sleep(seconds_each)
    feed.take_wait()
    start = time.perf_counter()
    for _ in range(batches):
        next(source)
        time.sleep(seconds_each)
    passed = time.perf_counter() - start
    source.close()
    return passed, feed.take_wait()


def rows_of(beton: Path, batch: int, workers: int, share: float, rounds: int, batches: int) -> list[Row]:
    """The feed's rate, and the share of the time that the consumer waits."""
    config = PRESETS["paper"].using(beton=beton, batch_size=batch, workers=workers)
    rates, waits, free = [], [], []
    with make_loader(open_samples(beton), config, ALONE) as loader:
        feed = Feed(loader, config, ALONE.device)
        taken(feed, 0, 1, 0.0)  # compiles
        for turn in range(rounds):
            passed, waited = taken(feed, 2 * turn + 1, batches, 0.0)
            rates.append(batch * batches / passed)
            free.append(100 * waited / passed)
            passed, waited = taken(feed, 2 * turn + 2, batches, batch / (share * rates[-1]))
            waits.append(100 * waited / passed)
    where = f"{processor_name()}, {workers} workers, batches of {batch}"
    return [
        make_row("feed", "images_per_second", "images/s", rates, where, True, more_is_better=True),
        make_row("feed", "data_wait", "%", free, where, True),
        make_row(f"consumer of {share:.0%}", "data_wait", "%", waits, where, statistics.median(waits) < LIMIT),
    ]


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
    parser = arguments("bench_feed", (__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR_OR_BETON", help="images to read")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="loader threads")
    parser.add_argument("--batch", type=int, default=0, help=f"images in a batch: {BATCH}, with --quick 16")
    parser.add_argument("--share", type=float, default=0.8, help="of the feed's rate that the consumer takes")
    given = parser.parse_args()
    if not 0 < given.share < 1:
        parser.error(f"--share {given.share} is not between 0 and 1")
    batch = given.batch or (16 if given.quick else BATCH)
    rounds, batches = (2, 40) if given.quick else (5, 60)
    with tempfile.TemporaryDirectory(prefix="bench_feed_") as folder:
        try:
            images = prepare(given.data, Path(folder), batch * (batches + WARM_UP))
            rows = rows_of(images.beton, batch, given.workers, given.share, rounds, batches)
        except UserError as error:
            print(f"bench_feed: error: {error}", file=sys.stderr)
            return 2
    return finish(rows, f"Waiting for data: {images.words}", given.json, given.plot, picture)


if __name__ == "__main__":
    sys.exit(main())
