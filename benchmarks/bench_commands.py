"""How long a user's whole way takes: write, pretrain, judge, export and look, each as the command that is typed.

`python -m benchmarks.bench_commands [--data camvid tiny_imagenet_20] [--epochs 2] [--quick] [--json F] [--plot F]`. The
data are real: CamVid (367 street scenes to learn from, 101 to test on; a label is the class that covers most of the
picture) and `tiny_imagenet_20` (10,000 and 1,000). Every command runs in a terminal of its own; its check is that it
ends well, leaves what it is for, and, where it takes more than a few seconds, shows progress. --quick is CamVid alone.
Times include Python's start.
"""

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import SHARED, Row, arguments, device_name, finish, make_row, save, unpack
from fastpmae_loaders.cli.exits import exit_with_sentence

DATA = {"camvid": "camvid_240x180.tar", "tiny_imagenet_20": "tiny_imagenet_20.tar"}
VOID = 11
"""CamVid's number of what belongs to no class."""
SOON = 10.0
"""Seconds that a command may take without showing how far it is."""


def labelled_folders(name: str, folder: Path) -> Path:
    """The data as `train` and `val` folders of a folder for each class."""
    unpack(SHARED / DATA[name], folder)
    if name != "camvid":
        return folder / name
    sorted_by_class = folder / "by-class"
    for split in ("train", "val"):
        for image in sorted((folder / name / split / "images").iterdir()):
            ids = np.asarray(Image.open(folder / name / split / "masks" / f"{image.stem}.png"))
            most = int(np.bincount(ids[ids != VOID], minlength=VOID).argmax())
            # The training images come first and say which classes there are.
            place = sorted_by_class / split / f"class-{most}"
            if split == "train" or (sorted_by_class / "train" / place.name).exists():
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, place)
    return sorted_by_class


def commands(images: Path, out: Path, epochs: int) -> Iterator[tuple[str, list[str], Path]]:
    """What is typed, one after the other: a name, the words, and what is there afterwards."""
    train, val, run = out / "train.beton", out / "val.beton", out / "run"
    labelled = ["--train", str(train), "--val", str(val)]
    yield "write", ["fastpmae-write", str(images / "train"), str(train)], train
    yield "write (val)", ["fastpmae-write", str(images / "val"), str(val)], val
    settings = ["--preset", "small-data", "--epochs", str(epochs), "--out", str(run)]
    name = f"train, {epochs} epoch{'s' * (epochs > 1)}"
    yield name, ["fastpmae-train", "--beton", str(train), *settings], run / "metrics.jsonl"
    for judge, result in (("knn", "knn"), ("linear", "linear-sgd"), ("lowshot", "lowshot")):
        yield f"eval {judge}", ["fastpmae-eval", judge, str(run), *labelled], run / "eval" / f"{result}-student.json"
    tuned = out / "tuned"
    small = ["--preset", "small", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "64", "--out", str(tuned)]
    tune = ["fastpmae-eval", "finetune", str(run), *labelled, *small]
    yield "eval finetune, 1 epoch", tune, tuned / "finetune-student.json"
    yield "export", ["fastpmae-export", str(run), str(out / "timm")], out / "timm" / "README.md"
    picture = out / "learnt.png"
    yield "view", ["fastpmae-view", str(train), str(picture), "--run", str(run), "--samples", "3"], picture
    yield "report", ["fastpmae-report", str(run)], run / "report.html"


def typed(words: list[str]) -> tuple[int, float, float, str]:
    """Run a command in a terminal: its exit status, seconds, CPU seconds, and what the terminal showed."""
    mine, its = pty.openpty()
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / words[0]), *words[1:]], stdin=its, stdout=its, stderr=its,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(its)
    shown = bytearray()
    while True:
        try:
            new = os.read(mine, 2**16)
        except OSError:  # Linux says so when the last process has closed the terminal
            break
        if not new:
            break
        shown += new
    os.close(mine)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    return process.returncode, seconds, used.ru_utime + used.ru_stime, shown.decode(errors="replace")


def time_rows(name: str, epochs: int) -> Iterator[Row]:
    """A row of seconds and one of CPU seconds for every command."""
    with tempfile.TemporaryDirectory(prefix="bench-commands-") as made:
        folder = Path(made)
        images = labelled_folders(name, folder)
        for command, words, left in commands(images, folder, epochs):
            status, seconds, used, shown = typed(words)
            # The cursor goes back to a line's start only where the line is drawn again.
            progress = seconds < SOON or re.search(r"\r(?!\r?\n)", shown) is not None
            gate = status == 0 and left.exists() and progress
            print(f"{name}: {command}: {seconds:.1f} s{'' if gate else ' FAILED'}", flush=True)
            if not gate:
                print(shown[-2000:], "" if left.exists() else f"no {left}", "" if progress else "no progress shown")
            for metric, value in (("time", seconds), ("CPU time", used)):
                yield make_row(f"{name}: {command}", metric, "s", [value], device_name("cpu"), gate)


def picture(rows: Sequence[Row], title: str, file: Path) -> None:
    """Seconds of every command."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if row.metric == "time"]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(timed)))
    bars = axes.barh([row.case for row in timed], [row.value for row in timed])
    axes.bar_label(bars, fmt="%.0f s", padding=3)
    axes.set(xlabel="seconds", title=title)
    axes.invert_yaxis()
    save(figure, file)


def bench() -> int:
    parser = arguments("bench_commands", (__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA), help="which images (both)")
    parser.add_argument("--epochs", type=int, default=2, help="of pretraining (2)")
    given = parser.parse_args()
    data = ["camvid"] if given.quick else given.data
    rows = [row for name in data for row in time_rows(name, given.epochs)]
    return finish(rows, "A user's whole way", given.json, given.plot, picture)


def main() -> int:
    return exit_with_sentence("bench_commands", bench)


if __name__ == "__main__":
    sys.exit(main())
