"""Two views of every image, by our loaders and by others: images a second, CPU-seconds an image, peak memory.

`python -m benchmarks.bench_loader [--data DIR_OR_BETON] [--workers N] [--json F] [--quick] [--scale]
[--kinds]`. All cases read
the same JPEG bytes and give the same uint8 tensors; what a baseline leaves out stands in `loader_baselines.py`. They
take turns in one run, each in processes of its own (`loader_turns.py`), after their output was checked
(`loader_checks.py`). "decode-only" is the ceiling: the same JPEGs decoded by FFCV's decoder, and nothing else.

Without --data: the sample of ImageNet in ../shared/data beside the checkout, or else the demo's photographs. With
--quick the cases start as copies of one process, so there are no rows of memory and of the time to the first batch.
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.common import SHARED, Row, arguments, device_name, finish, make_row, processor_name, save, unpack
from benchmarks.loader_baselines import Task
from benchmarks.loader_cases import CASES
from benchmarks.loader_checks import check
from benchmarks.loader_kinds import KINDS, LARGE, write_kind
from benchmarks.loader_peers import GEOMETRY_PEERS, PEERS
from benchmarks.loader_turns import Record, Turns, take_turns, watch_memory
from fastpmae.photographs import write_demo_images
from fastpmae_loaders import Beton
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.machine import loader_threads, usable_cores
from fastpmae_loaders.native.coefficients import pack_jpeg
from fastpmae_loaders.sources.beton import COEFFICIENTS, JPG
from fastpmae_loaders.write.pages import PageWriter
from fastpmae_loaders.write.write import write_beton

SAMPLE = SHARED / "imagenet_sample_400.tar"
BATCH, QUICK_BATCH, SIDE = 64, 16, 224
CEILING = "decode-only"

FULL = ("ours-native", "ours-native-coefficients", "ours-ffcv", "ours-ffcv-device-colour", "ours-torch", "ours-dali")
FULL_BASELINES = ("ffcv-stock", "dali-stock", "torchvision", "torchvision-tensor", "timm", *PEERS)
GEOMETRY = ("ours-native-geometry", "ours-native-coefficients-geometry", "ours-ffcv-geometry")
GEOMETRY_BASELINES = ("torchvision-geometry", "torchvision-tensor-geometry", *GEOMETRY_PEERS)
OURS = {"ours-native": "ours-ffcv", "ours-native-coefficients": "ours-native"}
"""What of ours a case of ours is compared with as well."""
_QUICK_BASELINES = ("ffcv-stock", "dali-stock", "torchvision", "timm")
QUICK = (*FULL, *_QUICK_BASELINES, "ours-ffcv-geometry", "torchvision-geometry", CEILING)
SCALED = ("ours-native", "ours-native-coefficients", "ours-ffcv", "ffcv-stock", "dali-stock", "torchvision")
"""The cases of --scale."""
OF_KINDS = ("ours-native", "ours-native-coefficients", "ours-ffcv", "torchvision", CEILING)
"""The cases of --kinds."""
SIDES, WORKERS = (128, 224, 320), (1, 2, 4)


@dataclass(frozen=True)
class Images:
    """The same JPEGs as a .beton, in which they are repeated, and as files in a folder; and where they are from."""

    beton: Path
    folder: Path
    words: str


def prepare(data: Path | None, into: Path, least: int) -> Images:
    """At least `least` samples, repeated where there are fewer images, and evenly chosen where there are many more.

    Raises:
        UserError: for images that cannot be read, or a .beton that holds anything but JPEGs.
    """
    if data is not None:
        source, words = data, str(data)
    elif SAMPLE.exists():
        unpack(SAMPLE, into / "sample")
        source, words = into / "sample" / "imagenet_sample", f"{SAMPLE.name}, the original bytes"
    else:
        write_demo_images(into / "demo")
        source, words = into / "demo" / "train", f"the demo's photographs, 96 to 128 pixels, since {SAMPLE} is missing"
    if not source.is_file() or source.suffix != ".beton":
        write_beton(source, into / "once.beton", limit=least)
        source = into / "once.beton"
    beton = Beton(source)
    if (beton.mode != JPG).any():
        raise UserError(f"{source} holds raw pixels; the loaders are compared on JPEGs: write it with --mode jpg")
    chosen = range(0, len(beton), max(1, len(beton) // least))
    folder, repeated = into / "images", into / "repeated.beton"
    folder.mkdir()
    for place, index in enumerate(chosen):
        (folder / f"{place:06d}.jpg").write_bytes(beton.payload(index).tobytes())
    copies = -(-least // len(chosen))
    with repeated.open("wb") as file:
        pages = PageWriter(file, copies * len(chosen), 8 << 20)
        for _ in range(copies):
            for index in chosen:
                height, width, label = int(beton.height[index]), int(beton.width[index]), int(beton.label[index])
                pages.add(JPG, width, height, label, beton.payload(index).tobytes())
        pages.finish(None)
    return Images(repeated, folder, f"{words}: {len(chosen):,} images, {copies} times over")


def write_coefficients(task: Task) -> None:
    """Beside a task's .beton of JPEGs one of their coefficients, sample by sample; JPEGs that have none as they are."""
    beton = Beton(task.beton)
    coded: dict[bytes, tuple[int, bytes]] = {}
    with task.coefficients.open("wb") as file:
        pages = PageWriter(file, len(beton), 8 << 20)
        for index in range(len(beton)):
            payload, height, width = beton.payload(index).tobytes(), int(beton.height[index]), int(beton.width[index])
            if payload not in coded:
                code = pack_jpeg(payload, height, width)
                coded[payload] = (JPG, payload) if code is None else (COEFFICIENTS, code)
            mode, data = coded[payload]
            pages.add(mode, width, height, int(beton.label[index]), data)
        pages.finish(None)


def open_all(turns: Turns, tasks: Sequence[Task], at_once: int, say: Callable[[str], None]) -> list[Record]:
    """Start the cases, `at_once` at a time, and check what each shows first.

    A case that fails to open is left out, with a sentence; so is one whose package is missing.
    """
    records: dict[str, Record] = {}
    waiting: dict[str, Task] = {}

    def settle() -> None:
        for name in turns.ready(list(waiting)):
            task = waiting.pop(name)
            try:
                first_batch, found = turns.opened(name)
            except ChildProcessError as error:
                say(f"left out: {error}")
                turns.end(name)
                continue
            records[name] = Record(task, check(task, found), first_batch)
            if records[name].wrong:
                say(f"{name} failed its check: {records[name].wrong}")

    # FFCV compiles longest: beside it the others start one after the other
    for task in sorted(tasks, key=lambda task: task.case != "ffcv-stock"):
        missing = CASES[task.case].missing
        if missing:
            say(f"{task.case} is left out: the package {missing} is not installed")
            continue
        turns.start(task)
        waiting[task.case] = task
        if len(waiting) >= at_once:
            settle()
    while waiting:
        settle()
    return [records[task.case] for task in tasks if task.case in records]


def rows_of(records: Sequence[Record], device: str, suffix: str = "") -> list[Row]:
    """A row for each case, metric and baseline; for a case without any baseline in this run, one alone."""
    found = {record.task.case: record for record in records}
    metrics: list[tuple[str, str, Callable[[Record], list[float]], bool]] = [
        ("images_per_second", "images/s", lambda record: record.images_per_second, True),
        ("cpu_seconds_per_image", "s", lambda record: record.cpu_seconds_per_image, False),
        ("peak_memory", "MiB", lambda record: record.peaks, False),
        ("first_batch", "s", lambda record: [record.first_batch] if record.peaks else [], False),
    ]
    rows: list[Row] = []
    for metric, unit, samples_of, more_is_better in metrics:
        for record in records:
            samples = samples_of(record)
            if not samples:
                continue
            against = baselines_of(record.task.case, found) if metric != "first_batch" else []
            if metric == "peak_memory":
                against = [name for name in against if name != CEILING]
            for name in against or [None]:
                baseline = None if name is None else (name + suffix, samples_of(found[name]))
                gate = not record.wrong and (name is None or not found[name].wrong)
                case = record.task.case + suffix
                rows.append(make_row(case, metric, unit, samples, device, gate, baseline, more_is_better))
    return rows


def baselines_of(case: str, found: Iterable[str]) -> list[str]:
    """The cases that a case is compared with, of those there are."""
    if case in FULL:
        wanted = (*([OURS[case]] if case in OURS else ()), *FULL_BASELINES, CEILING)
    elif case in GEOMETRY:
        plain = case.removesuffix("-geometry")
        wanted = (*([f"{OURS[plain]}-geometry"] if plain in OURS else ()), *GEOMETRY_BASELINES, CEILING)
    else:
        wanted = ()
    return [name for name in wanted if name in found]


def draw_bars(rows: Sequence[Row], title: str, file: Path) -> None:
    """Images a second of each case with the spread; the ceiling is a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    speeds = {row.case: row for row in rows if row.metric == "images_per_second"}
    ceiling = speeds.pop(CEILING, None)
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.38 * len(speeds)))
    for place, (case, row) in enumerate(speeds.items()):
        ours = case.startswith("ours")
        spread = [[max(row.value - row.low, 0)], [max(row.high - row.value, 0)]]
        axes.barh(place, row.value, xerr=spread, color="tab:blue" if ours else "tab:gray", ecolor="black", capsize=3)
        axes.annotate(f"{row.value:.0f}", (row.high, place), (5, 0), textcoords="offset points", va="center")
    if ceiling is not None:
        axes.axvline(ceiling.value, color="tab:red", linestyle="--", label=f"decoding alone: {ceiling.value:.0f}")
        axes.legend(loc="lower right")
    axes.set_yticks(range(len(speeds)), list(speeds))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="images a second, two views of each", title=title)
    save(figure, file)


def draw_scale(rows: Sequence[Row], title: str, file: Path) -> None:
    """How the cost of an image grows with the views' side, and the speed with the workers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = usual_workers(WORKERS)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    points = {(*_place(row.case), row.metric): row for row in rows}
    for case in SCALED:
        for axes, metric, places in (
            (left, "cpu_seconds_per_image", [(side, (case, base, side)) for side in SIDES]),
            (right, "images_per_second", [(workers, (case, workers, SIDE)) for workers in WORKERS]),
        ):
            known = [(x, points[(*place, metric)]) for x, place in places if (*place, metric) in points]
            if not known:
                continue
            scale = 1000 if axes is left else 1
            axes.plot([x for x, _ in known], [row.value * scale for _, row in known], marker="o", label=case)
    left.set(xlabel="side of the views, pixels", ylabel="CPU-ms an image", xticks=SIDES, title=f"{base} workers")
    right.set(xlabel="workers", ylabel="images/s", xticks=WORKERS, title=f"{SIDE} pixels, {usable_cores()} cores")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.suptitle(title)
    save(figure, file)


def _suffix(workers: int, side: int) -> str:
    return f" workers={workers} side={side}"


def _place(case: str) -> tuple[str, int, int]:
    name, workers, side = case.split()
    return name, int(workers.partition("=")[2]), int(side.partition("=")[2])


def usual_workers(known: Sequence[int]) -> int:
    """The number of workers, of those known, that the sides are compared at: the nearest to the cores there are."""
    return min(known, key=lambda count: abs(count - usable_cores()))


def scale_rows(given: argparse.Namespace, task: Task, logs: Path, say: Callable[[str], None]) -> list[Row]:
    """Each of SCALED with every number of workers at the usual side, and at every side with the usual workers."""
    base = usual_workers(WORKERS)
    places = [(base, side) for side in SIDES] + [(workers, SIDE) for workers in WORKERS if workers != base]
    rows: list[Row] = []
    for workers, side in places:
        with Turns(logs, forked=True) as turns:
            tasks = [replace(task, case=case, workers=workers, side=side) for case in given.cases or SCALED]
            records = open_all(turns, tasks, usable_cores(), say)
            take_turns(turns, records, 1 if given.quick else 3, 0.4 if given.quick else 1.5, not given.quick)
        where = f"{processor_name()}, {usable_cores()} cores, batches of {task.batch}"
        rows += rows_of(records, where, _suffix(workers, side))
    return rows


def kind_rows(given: argparse.Namespace, task: Task, into: Path, say: Callable[[str], None]) -> list[Row]:
    """Each of OF_KINDS with images of every kind, made from the task's own."""
    count, least = (16, 64) if given.quick else (64, 512)
    rows: list[Row] = []
    for number, kind in enumerate(KINDS):
        place = into / f"kind-{number}"
        write_kind(kind, task.folder, place / "made", count)
        # so few of the large ones that they are no more bytes
        images = prepare(place / "made", place, least // 8 if kind == LARGE else least)
        cases = [replace(task, case=case, beton=images.beton, folder=images.folder) for case in given.cases or OF_KINDS]
        write_coefficients(cases[0])
        with Turns(into, forked=True) as turns:
            records = open_all(turns, cases, usable_cores(), say)
            take_turns(turns, records, 1 if given.quick else 5, 0.4 if given.quick else 1.0, not given.quick)
        where = f"{processor_name()}, {task.workers} workers, batches of {task.batch}"
        rows += rows_of(records, where, f" kind={kind}")
    return rows


def groups_of(names: Sequence[str], forked: bool) -> list[list[str]]:
    """The cases that take turns with each other: all of them, or those with colours and those without.

    Each lies in memory of its own where it is no copy of one process, and all together would need 20 GB.
    """
    cases = [case for case in CASES if case in names]
    if forked:
        return [cases]
    groups = ([case for case in cases if case.endswith("-geometry") == plain] for plain in (False, True))
    return [group for group in groups if group]


def bench(given: argparse.Namespace, into: Path) -> int:
    """Everything after the command line. Returns the exit status."""
    left_out = []

    def say(sentence: str) -> None:
        left_out.append(sentence)
        print(f"bench_loader: {sentence}", file=sys.stderr, flush=True)

    # both for copies of this process: the checks must leave no threads behind, and imports are shared
    torch.set_num_threads(1)
    importlib.import_module("torchvision.transforms.v2")
    images = prepare(given.data, into, 1600 if given.quick else 3200)
    print(f"Images: {images.words}. Load of the machine: {os.getloadavg()[0]:.2f}.", flush=True)
    batch = given.batch or (QUICK_BATCH if given.quick else BATCH)
    task = Task("", images.beton, images.folder, batch, given.workers, given.side, given.device)
    if given.scale:
        write_coefficients(task)
        rows = scale_rows(given, task, into, say)
        plot = given.plot.with_name(f"{given.plot.stem}_scale{given.plot.suffix}")
        return finish(rows, "Two views, by size and workers", given.json, plot, draw_scale)
    if given.kinds:
        rows = kind_rows(given, task, into, say)
        plot = given.plot.with_name(f"{given.plot.stem}_kinds{given.plot.suffix}")
        return finish(rows, "Two views, by kind of image", given.json, plot)
    names = given.cases or (QUICK if given.quick else tuple(CASES))
    if any("coefficients" in name for name in names):
        write_coefficients(task)
    found = []
    for group in groups_of(names, given.quick):
        with Turns(into, forked=given.quick) as turns:
            tasks = [replace(task, case=case) for case in group]
            records = open_all(turns, tasks, usable_cores() if given.quick else 1, say)
            if given.quick:
                take_turns(turns, records, 2, 0.35, warm_up=False)
            else:
                take_turns(turns, records, 5, 2.0)
                watch_memory(turns, records, 3, batches=4)
            found.append(records)
    sizes = f"{given.workers} workers, batches of {batch}"
    where = f"{processor_name()}, {sizes}" + (f", {device_name('cuda')}" if given.device == "cuda" else "")
    title = f"Two views of {given.side} pixels: {sizes}"
    rows = [row for records in found for row in rows_of(records, where)]
    status = finish(rows, title, given.json, given.plot, draw_bars)
    failed = [sentence for sentence in left_out if "not installed" not in sentence]
    return 1 if failed else status


def main() -> int:
    parser = arguments("bench_loader", (__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR_OR_BETON", help="images to read")
    parser.add_argument("--workers", type=int, default=loader_threads(), help="threads, or processes, of every case")
    parser.add_argument("--batch", type=int, help=f"images in a batch: {BATCH}, with --quick {QUICK_BATCH}")
    parser.add_argument("--side", type=int, default=SIDE, help="of the views, pixels")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of DALI, and of colour on the device")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--scale", action="store_true", help="sweep workers and sides of the views instead")
    parser.add_argument("--kinds", action="store_true", help="sweep kinds of images instead: " + ", ".join(KINDS))
    given = parser.parse_args()
    if not Path("/proc/self/smaps_rollup").exists():
        print("bench_loader: error: it measures with what Linux alone has in /proc", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bench_loader_") as folder:
        try:
            return bench(given, Path(folder))
        except UserError as error:
            print(f"bench_loader: error: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
