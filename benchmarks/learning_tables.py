"""What `bench_learning` shows: tables for a page, a picture, and the rows of every benchmark."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import Row, device_name, make_row, renew_tables, save
from benchmarks.learning_cases import AFTER_MAE, BESIDE_MAE, CASES, TABLES
from benchmarks.learning_judge import POOLS, Judged, interval

UNTRAINED = ("random", "thumbnails")
TITLES = {
    "knn_train": "10-NN, leave one out", "knn_val": "10-NN, val",
    "linear_cv": "linear, 5-fold", "linear_val": "linear, val",
    "finetune_val": "fine-tuned, val", "class": "class token", "mean": "mean of patches",
}  # fmt: skip


def lines_of(
    found: dict[tuple[str, str], list[Judged]], compared: str = "dual", judged_on: str = "train"
) -> Iterator[str]:
    """Markdown: a table for each of the paper's, for equal steps and for equal time; how far the case is ahead.

    `judged_on` says which images are shown: `train`, each left out once, or `val`.
    """
    for equal in ("steps", "time"):
        known = {name: runs for (name, kind), runs in found.items() if kind == equal or name in UNTRAINED}
        if equal == "time" and "dual" not in known:
            known["dual"] = found.get(("dual", "steps"), [])
        for number, names in TABLES.items():
            more = (*BESIDE_MAE, *AFTER_MAE) if number == 6 else ()
            there = [name for name in (*names, *more) if name in known]
            if not set(there) - {"dual"} or not known.get(compared):
                continue
            yield from ("", f"**Table {number}, equal {equal}**", "")
            rows = [name for name in [*(UNTRAINED if number == 6 else ()), *there] if known.get(name)]
            columns = columns_of([run for name in rows for run in known[name] if name not in UNTRAINED], judged_on)
            yield f"| case | seeds | epochs | {' | '.join(map(title_of, columns))} | paper |"
            yield "|---" * (4 + len(columns)) + "|"
            for name in rows:
                yield _line(name, known[name], known[compared], columns)


def columns_of(runs: Sequence[Judged], judged_on: str) -> list[str]:
    """The most exact measures that all runs of a table have, of both poolings, and fine-tuning if any has it."""
    crossed = judged_on == "train" and all("linear_cv/class" in run.right for run in runs)
    measures = f"knn_{judged_on}", "linear_cv" if crossed else "linear_val"
    shown = [f"{measure}/{pool}" for measure in measures for pool in POOLS]
    return shown + [key for key in ("finetune_val",) if any(key in run.right for run in runs)]


def title_of(column: str) -> str:
    """What stands above a column."""
    measure, _, pool = column.partition("/")
    return f"{TITLES[measure]}{': ' * bool(pool)}{TITLES.get(pool, '')}"


def _line(name: str, runs: list[Judged], compared: list[Judged], columns: Sequence[str]) -> str:
    """A case's shares, each with its half range over seeds, and below it what another has more, with its interval."""
    cells = []
    for column in columns:
        ours, theirs = ([run for run in side if column in run.right] for side in (runs, compared))
        shares = [100 * run.share(column) for run in ours]
        spread = f" ± {(max(shares) - min(shares)) / 2:.1f}" if len(shares) > 1 else ""
        gap = ""
        if ours and theirs and name != compared[0].case:
            middle, low, high = (100 * value for value in interval(theirs, ours, column))
            gap = f"<br>{middle:+.1f} ({low:+.1f} to {high:+.1f})"
        cells.append(f"{np.mean(shares):.1f}{spread}{gap}" if ours else "")
    case = CASES.get(name)
    paper = "" if case is None or case.paper is None else f"{case.paper:g}"
    return f"| {case.title if case else name} | {len(runs)} | {runs[0].epochs} | {' | '.join(cells)} | {paper} |"


def picture(found: dict[tuple[str, str], list[Judged]], title: str, file: Path, judged_on: str = "train") -> None:
    """Each case's 10-NN on the training images, or on the others; a mark for each seed and pooling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in (*UNTRAINED, *CASES) if any(name == key for key, _ in found)]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.4 * len(names)))
    for equal, colour in (("steps", "tab:blue"), ("time", "tab:orange")):
        for pool, marker in zip(POOLS, "xo", strict=True):
            dots = [
                (100 * one.share(f"knn_{judged_on}/{pool}"), place)
                for place, name in enumerate(names)
                for one in found.get((name, equal), [])
            ]
            if dots:
                label = f"{TITLES[pool]}, equal {equal}"
                axes.scatter(*zip(*dots, strict=True), color=colour, marker=marker, label=label, alpha=0.7)
    axes.set_yticks(range(len(names)), [CASES[name].title if name in CASES else name for name in names])
    axes.set(xlabel=f"{TITLES[f'knn_{judged_on}']}, %", title=title)
    axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    axes.legend(fontsize="small")
    save(figure, file)


def as_rows(found: dict[tuple[str, str], list[Judged]], device: str = "cpu") -> list[Row]:
    """The rows that every benchmark writes; the baseline is the random start."""
    rows, where = [], device_name(device)
    starts = found["random", "steps"]
    for (name, equal), runs in found.items():
        for column in runs[0].right:
            shares = [run.share(column) for run in runs if column in run.right]
            start = [run.share(column) for run in starts if column in run.right]
            metric = column if name in UNTRAINED else f"{column}, equal {equal}"
            baseline = None if name == "random" or not start else ("random", start)
            rows.append(make_row(name, metric, "share", shares, where, True, baseline, more_is_better=True))
    return rows


def write_page(page: Path, results: str, lines: Sequence[str]) -> None:
    """Replace the tables of a folder of results in a page, between the markers that name it.

    Raises:
        UserError: for a page without them.
    """
    begin, end = f"<!-- {results}: written by benchmarks/bench_learning.py -->", f"<!-- end of {results} -->"
    renew_tables(page, begin, end, lines)
