"""Where the native engine's time goes: CPU-seconds an image, stage by stage, on one thread.

`python -m benchmarks.loader_stages [--data DIR_OR_BETON] [--coefficients] [--json F] [--quick]`. Every image goes
through all stages before the next one does, as in the loader, so that each stage finds the caches as the one before
left them; a clock of the thread's CPU time is read in between. A colour operation that the draws leave out costs
nothing, so each stage is averaged with its probability. Rounds of the stages and of the engine itself take turns: what
the engine takes beyond the stages is called "rest". The operations of the jitter run fused; each is timed alone as
well, beside the sum.
"""

import ctypes
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numba
import numpy as np

from benchmarks.bench_loader import prepare, write_coefficients
from benchmarks.common import Row, arguments, make_row, save
from benchmarks.loader_baselines import Task
from fastpmae_loaders import Beton, ViewSettings
from fastpmae_loaders.engines.base import Source, make_job
from fastpmae_loaders.engines.native_engine import NativeEngine
from fastpmae_loaders.engines.second_opinion import second_opinion
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.jit.memory import bytes_at
from fastpmae_loaders.native.coefficients import unpack
from fastpmae_loaders.native.decoder import decode, make_workspace
from fastpmae_loaders.pixels import colour as c
from fastpmae_loaders.pixels.resize import resize
from fastpmae_loaders.sampling import BLURRED, GRAY, JITTER, ORDER, SIGMA, SOLARISED, SampleDraws, draw_samples
from fastpmae_loaders.sources.beton import COEFFICIENTS
from fastpmae_loaders.sources.turbo import call_decoder

BATCH, SIDE = 64, 224
STAGES = ("decode", "simple view", "complex view", "jitter and grayscale", "blur", "solarise")
ALONE = ("brightness", "contrast", "saturation", "hue", "grayscale")
DRAWN, REST, WHOLE = "draws and masks", "rest", "whole"


def make_timer(library: ctypes.CDLL) -> Callable:
    """A compiled function that puts BATCH images through all stages and adds up nanoseconds."""
    clock = library.clock_gettime
    clock.argtypes, clock.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_int
    thread_time: int = time.CLOCK_THREAD_CPUTIME_ID

    @numba.njit
    def now(memory):
        clock(thread_time, memory.ctypes.data)
        return memory[0] * 1_000_000_000 + memory[1]

    @numba.njit
    def only(image, which, factors):
        if which == 0:
            c.brightness(image, factors[0])
        elif which == 1:
            c.contrast(image, factors[1])
        elif which == 2:
            c.saturation(image, factors[2])
        elif which == 3:
            c.hue(image, factors[3])
        else:
            c.grayscale(image)

    @numba.njit
    def run(places, modes, second, work, draws, scratch, views, spent, alone):
        memory = np.zeros(2, np.int64)
        copy = np.empty_like(views[0, 0])
        for row in range(places.shape[0]):
            address, size, height, width = places[row]
            pixels = np.int64(scratch.decoded.ctypes.data)
            factors, choices = draws.factors[row, 1], draws.choices[row, 1]
            image = views[row, 1]
            times = spent[row]
            start = now(memory)
            data, boxes = bytes_at(address, size), draws.boxes[row]
            if modes[row] == COEFFICIENTS:
                shown = unpack(data, height, width, boxes, pixels, work)
            else:
                shown = decode(data, height, width, boxes, pixels, work)
            if not shown:
                call_decoder(second, 0, address, size, height, width, pixels)
            for view in range(2):
                stop = now(memory)
                times[view] += stop - start
                start = stop
                resize(
                    pixels, height, width, draws.boxes[row, view], SIDE, SIDE, 0, 0, draws.flips[row, view],
                    views[row, view], scratch,
                )  # fmt: skip
            stop = now(memory)
            times[2] += stop - start
            copy[:] = image
            start = now(memory)
            turns = np.int64(0)
            for turn in range(4):
                turns |= np.int64(choices[ORDER + turn]) << (2 * turn)
            count, grey = 4 * np.int64(choices[JITTER]), np.int64(choices[GRAY])
            if count or grey:
                c.jitter(image, turns, count, (factors[0], factors[1], factors[2], factors[3]), grey)
            stop = now(memory)
            times[3] += stop - start
            if choices[BLURRED]:
                c.blur(image, factors[SIGMA], scratch)
            start = now(memory)
            times[4] += start - stop
            if choices[SOLARISED]:
                c.solarise(image, 128)
            times[5] += now(memory) - start
            for which in range(5):
                if choices[GRAY] if which == 4 else choices[JITTER]:
                    start = now(memory)
                    only(copy, which, factors)
                    alone[row, which] += now(memory) - start

    return run


class Stages:
    """The images of a .beton, in batches, and what the stages of each took."""

    def __init__(self, beton: Beton, images: int) -> None:
        self.beton = beton
        self.settings = ViewSettings(image_size=SIDE)
        self.source = Source(beton, self.settings.views, 7, self.settings.patches, self.settings.visible)
        self.engine: Any = NativeEngine(self.source)
        self.second = int(ctypes.cast(second_opinion, ctypes.c_void_p).value or 0)
        largest = (int(getattr(beton, name).max()) for name in ("height", "width", "size"))
        self.workspace = make_workspace(*largest)
        self.scratch = self.source.scratch()
        self.run = make_timer(ctypes.CDLL(None))
        self.batches = np.arange(images // BATCH * BATCH).reshape(-1, BATCH) % len(beton)
        self.views = np.zeros((BATCH, 2, 3, SIDE, SIDE), np.uint8)
        self.samples: dict[str, list[float]] = {name: [] for name in (*STAGES, *ALONE, DRAWN, REST, WHOLE)}

    def draws(self, epoch: int, indices: np.ndarray) -> tuple[SampleDraws, float]:
        """The draws of a batch and the CPU-seconds that they took."""
        height, width = self.beton.height[indices], self.beton.width[indices]
        start = time.thread_time()
        draws = draw_samples(7, epoch, indices, height, width, self.settings)
        return draws, time.thread_time() - start

    def round(self, epoch: int) -> None:
        """All batches: through the engine and through the stages."""
        beton = self.beton
        spent, alone = np.zeros((BATCH, len(STAGES))), np.zeros((BATCH, len(ALONE)))
        drawing = whole = 0.0
        for indices in self.batches:
            job = make_job(indices, epoch, self.source)
            start = time.thread_time()
            self.engine.fill(job, self.scratch)
            whole += time.thread_time() - start
            draws, seconds = self.draws(epoch, indices)
            drawing += seconds
            address = beton.data.ctypes.data + beton.pointer[indices].astype(np.int64)
            places = np.stack([address, beton.size[indices], beton.height[indices], beton.width[indices]], 1)
            decoding = beton.mode[indices], self.second, self.workspace
            self.run(places.astype(np.int64), *decoding, draws, self.scratch, self.views, spent, alone)
        count = self.batches.size
        stages: dict[str, float] = dict(zip(STAGES, spent.sum(0) / 1e9 / count, strict=True))
        stages[DRAWN] = drawing / count
        stages[REST] = whole / count - sum(stages.values())
        found = {**stages, WHOLE: whole / count} | dict(zip(ALONE, alone.sum(0) / 1e9 / count, strict=True))
        for name, seconds in found.items():
            self.samples[name].append(float(seconds))

    def agree(self) -> bool:
        """Whether the stages made the engine's views of the last batch."""
        job = make_job(self.batches[-1], 0, self.source)
        self.engine.fill(job, self.scratch)
        self.round(0)
        for values in self.samples.values():
            values.clear()
        return all(np.array_equal(job.views[view].numpy(), self.views[:, view]) for view in range(2))


def stage_table(rows: Sequence[Row]) -> str:
    """Markdown: the stages with their shares of the whole, then each operation of the jitter alone."""
    by_name = {row.case: row for row in rows}
    whole = by_name[WHOLE].value
    lines = ["| stage | CPU-µs an image | 20th to 80th percentile | share |", "|---|---|---|---|"]
    for name in (*STAGES, DRAWN, REST, WHOLE, *ALONE):
        row = by_name[name]
        share = "" if name in ALONE else f"{row.value / whole:.1%}"
        shown = f"{name}, alone" if name in ALONE else name
        lines.append(f"| {shown} | {row.value:.1f} | {row.low:.1f} to {row.high:.1f} | {share} |")
    packages = ", ".join(f"{name} {number}" for name, number in rows[0].versions.items())
    return "\n".join([*lines, "", f"{rows[0].device}, one thread; {packages}; {rows[0].date}"])


def draw(rows: Sequence[Row], file: Path) -> None:
    """The stages as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.case not in (*ALONE, WHOLE)]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.4 * len(shown)))
    axes.bar_label(axes.barh([row.case for row in shown], [row.value for row in shown]), fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="CPU-µs an image", title="Where the native engine's time goes")
    save(figure, file)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = arguments("loader_stages", "CPU-seconds an image, stage by stage.")
    parser.add_argument("--data", type=Path, metavar="DIR_OR_BETON", help="images to read (the sample of ImageNet)")
    parser.add_argument("--coefficients", action="store_true", help="read the JPEGs' coefficients instead")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            images = prepare(options.data, Path(folder), 384)
            task = Task("", images.beton, images.folder, BATCH, 1, SIDE)
            if options.coefficients:
                write_coefficients(task)
            beton = Beton(task.coefficients if options.coefficients else task.beton)
            stages = Stages(beton, 128 if options.quick else 384)
        except UserError as error:
            parser.error(str(error))
        gate = stages.agree()
        for turn in range(5 if options.quick else 15):
            stages.round(1 + turn % 4)
    rows = [
        make_row(name, "cpu_time_per_image", "µs", [1e6 * value for value in values], "cpu", gate)
        for name, values in stages.samples.items()
    ]
    print(stage_table(rows))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    draw(rows, options.plot)
    if not gate:
        print("the stages made other views than the engine, so nothing is claimed of them")
    return 0 if gate else 1


if __name__ == "__main__":
    raise SystemExit(main())
