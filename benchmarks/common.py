"""What every benchmark shares: alternating runs, the rows they make, the table, the plot and the JSON file.

A row is one measured case, compared with one baseline or with none; its keys are those of `Row`. All cases of a
comparison run in one process and take turns, so that a machine that is busy or slow is so for all of them.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastpmae_loaders.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = (
    "torch", "triton", "numba", "numpy", "torchvision", "timm", "pillow", "ffcv",
    "nvidia-dali-cuda130", "nvidia-dali-cuda120",
)  # fmt: skip


SHARED = Path(__file__).resolve().parents[2] / "shared/data"
"""The real images that lie beside a checkout."""
CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")
"""CamVid's 11 classes, by their number in a mask; 11 is void."""


def unpack(archive: Path, folder: Path) -> None:
    """Everything in a tar of theirs. Raises UserError where it is not there."""
    if not archive.exists():
        raise UserError(f"{archive} is not there")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's result."""

    case: str
    metric: str
    unit: str
    value: float
    """The median."""
    low: float
    """The 20th percentile."""
    high: float
    """The 80th percentile."""
    baseline: str | None
    """The case it is compared with."""
    ratio: float | None
    """How many times better than the baseline: above 1 is better."""
    gate: bool
    """Whether the output passed its check."""
    device: str
    versions: dict[str, str]
    date: str


@dataclass(frozen=True)
class Case:
    """Something to be timed: `run` takes what `prepare`, untimed, gives."""

    name: str
    run: Callable
    prepare: Callable[[], tuple] = tuple
    at_most: int | None = None
    """Rounds that it takes part in: a case that is slow beyond doubt needs fewer than the others."""


def alternating(cases: Sequence[Case], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each case, which take turns; one round more comes first and is not counted."""
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for turn in range(rounds + 1):
        for case in cases:
            if case.at_most is not None and turn > case.at_most:
                continue
            given = case.prepare()
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = case.run(*given)
            if device == "cuda":
                torch.cuda.synchronize()
            taken = time.perf_counter() - start
            del given, result
            if turn:
                seconds[case.name].append(taken)
    return seconds


def make_row(
    case: str,
    metric: str,
    unit: str,
    samples: Sequence[float],
    device: str,
    gate: bool,
    baseline: tuple[str, Sequence[float]] | None = None,
    more_is_better: bool = False,
) -> Row:
    """A row of samples of which less is better, or more. A case that failed its check gets no ratio."""
    ordered = sorted(samples)
    middle = statistics.median(ordered)
    ratio = statistics.median(baseline[1]) / middle if baseline and gate else None
    if ratio is not None and more_is_better:
        ratio = 1 / ratio
    return Row(
        case, metric, unit, middle, _quantile(ordered, 0.2), _quantile(ordered, 0.8), baseline[0] if baseline else None,
        ratio, gate, device, versions(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _quantile(ordered: Sequence[float], part: float) -> float:
    place = part * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with the threads in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return name


def arguments(name: str, description: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a minute or two on two cores")
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to this file")
    parser.add_argument("--plot", type=Path, metavar="F", default=Path("runs/benchmarks") / f"{name}.png")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flag of those that also measure on a GPU."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what computes (cpu)")


def finish(
    rows: Sequence[Row],
    title: str,
    json_file: Path | None,
    plot_file: Path,
    picture: Callable[[Sequence[Row], str, Path], None] | None = None,
) -> int:
    """Print, draw (by `draw`, or another `picture`) and write the rows. The exit status: 1 where a check failed."""
    print(table(rows))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    (picture or draw)(rows, title, plot_file)
    failed = sorted({row.case for row in rows if not row.gate})
    if failed:
        print(f"failed their check, so nothing is claimed of them: {', '.join(failed)}")
    return 1 if failed else 0


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| case | metric | median | 20th to 80th percentile | baseline | times better | check |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} ×"
        spread = f"{row.low:.4g} to {row.high:.4g}"
        check = "passed" if row.gate else "FAILED"
        lines.append(
            f"| {row.case} | {row.metric} | {row.value:.4g} {row.unit} | {spread} | {row.baseline or ''} | {ratio} "
            f"| {check} |"
        )
    if rows:
        packages = ", ".join(f"{name} {number}" for name, number in rows[0].versions.items())
        lines += ["", f"{rows[0].device}; {packages}; {rows[0].date}"]
    return "\n".join(lines)


def renew_tables(page: Path, begin: str, end: str, lines: Sequence[str]) -> None:
    """Replace what stands between two lines of a page. UserError for a page without them."""
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{page} has no place for these tables: put the lines {begin} and {end} where they belong")
    page.write_text("\n".join([f"{before}{begin}", *lines, "", f"{end}{after}"]))


def draw(rows: Sequence[Row], title: str, file: Path) -> None:
    """How many times better each case is than its baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    compared = [row for row in rows if row.ratio is not None]
    figure, axes = plt.subplots(figsize=(11, 1 + 0.4 * len(compared)))
    names = [f"{row.case} / {row.baseline} ({row.metric})" for row in compared]
    bars = axes.barh(names, [row.ratio or 0 for row in compared])
    axes.bar_label(bars, fmt="%.2f ×", padding=3)
    axes.axvline(1, color="gray", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="times better than the baseline", title=title)
    save(figure, file)


def save(figure: "Figure", file: Path) -> None:
    """Write a finished figure, in a folder that is made if need be."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
