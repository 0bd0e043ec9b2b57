"""Do masks and boxes gain by pretraining? One small MAE, and what the dense commands make of it and of random weights.

`python -m benchmarks.bench_dense [--tasks patches segment detect segment-long] [--seeds 0 1 2] [--steps 1500]
[--out runs/dense] [--results DIR] [--page docs/dense.md]`. The images are those of `../shared/data`: CamVid at 240 x
180 and BCCD. A ViT of width 192 and depth 6 with patches of 8 is pretrained on CamVid's train and test and BCCD's
trainval images; what it is worth is tested on CamVid's val and BCCD's test images. Each task is a call of
`fastpmae-eval`, with the pretrained network and with random weights. A run that was stopped goes on, and one whose
result is in --results is read, so that evenings add up. On one core the pretraining takes 40 minutes, a segmentation 15
(`segment-long`: 50), a detection 25, and `patches` 10.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import CAMVID, SHARED, Row, arguments, device_name, finish, make_row, renew_tables, unpack
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.errors import RunError

NETWORKS = ("student", "random")
PRETRAINING = (
    "--preset mae --model vit_tiny --depth 6 --image-size 128 --patch-size 8 --decoder-width 128 --decoder-depth 2 "
    "--decoder-heads 4 --batch-size 64 --blr 4e-3 --epochs 300 --warmup-epochs 15"
)
TASKS = {
    "patches": "",
    "segment": "--preset small --iterations 600 --warmup-iterations 50 --eval-every 0 --no-yardsticks",
    "detect": "--preset small --epochs 3 --milestones 2.2 2.8 --warmup-iterations 30 --eval-every 0",
    "segment-long": "--preset small --no-yardsticks",
}
"""The settings of each task; patches has its own yardsticks, and is not drawn by a seed that matters."""
FIGURES = {"segment": ("miou",), "segment-long": ("miou",), "detect": ("ap50", "ap")}
SHOWN = {"miou": "mIoU", "ap50": "AP50", "ap": "AP"}
BEGIN, END = "<!-- written by benchmarks/bench_dense.py -->", "<!-- end of bench_dense -->"


class Evening:
    """The runs of one invocation, and where they lie."""

    def __init__(self, out: Path, results: Path, steps: int, quick: bool):
        self.out, self.results, self.steps, self.quick = out, results, steps, quick
        results.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Unpack the sets, and write the images to pretrain on."""
        data, beton = self.out / "data", self.out / "train.beton"
        if beton.exists():
            return
        data.mkdir(parents=True, exist_ok=True)
        for archive in ("camvid_240x180.tar", "bccd.tar"):
            unpack(SHARED / archive, data)
        names = {str(number): name for number, name in enumerate(CAMVID)} | {str(len(CAMVID)): None}
        (data / "camvid.json").write_text(json.dumps(names))
        images = self.out / "images"
        shutil.rmtree(images, ignore_errors=True)
        images.mkdir()
        for split in ("train", "test"):
            for path in (data / "camvid" / split / "images").iterdir():
                shutil.copy(path, images / f"camvid-{split}-{path.name}")
        for name in (data / "bccd/ImageSets/Main/trainval.txt").read_text().split():
            shutil.copy(data / "bccd/JPEGImages" / f"{name}.jpg", images / f"bccd-{name}.jpg")
        run("fastpmae_loaders.write.cli", images, beton, "--max-size", 320, "--flat")

    def pretrain(self) -> Path:
        """The run's folder."""
        folder, short = self.out / "pretrained", ["--batch-size", 8, "--workers", 1] if self.quick else []
        run("fastpmae.train", *PRETRAINING.split(), *short, "--beton", self.out / "train.beton", "--out", folder,
            "--resume", "auto", "--steps", self.steps, "--save-every", 5)  # fmt: skip
        return folder

    def result(self, task: str, network: str, seed: int, weights: Path) -> dict[str, Any]:
        """What `fastpmae-eval` has written of a task, after the call if there was none yet."""
        file = self.results / f"{task}-{network}-{seed}.json"
        if not file.exists():
            kind, folder = task.partition("-")[0], self.out / file.stem
            data = self.out / "data"
            camvid = ("--train", data / "camvid", "--classes", data / "camvid.json")
            sets = data / "bccd/ImageSets/Main"
            of_task = ("--train", sets / "trainval.txt", "--val", sets / "test.txt") if kind == "detect" else camvid
            resumed = ["--resume"] if (folder / "checkpoints").exists() else []
            words = [*TASKS[task].split(), "--network", network, "--seed", seed, *(_QUICK[kind] if self.quick else [])]
            run("fastpmae.evaluate.protocols", kind, weights, *of_task, *words, "--out", folder, *resumed)
            (found,) = folder.glob(f"{kind}-*.json")
            shutil.copy(found, file)
        return json.loads(file.read_text())


_QUICK: dict[str, Sequence[Any]] = {
    "patches": ("--steps", 2, "--memory", 1000),
    "segment": ("--iterations", 2, "--warmup-iterations", 1, "--batch-size", 2),
    "detect": ("--epochs", 0.02, "--milestones", 0.01, "--batch-size", 2),
}


def run(module: str, *words: object) -> None:
    """One of our commands, which says itself how far it is. RunError where it fails."""
    command = [sys.executable, "-m", module, *map(str, words), *(() if "write" in module else ("--device", "cpu"))]
    print(" ".join(command[1:]), flush=True)
    if subprocess.run(command, check=False, env=os.environ).returncode:
        raise RunError(f"{module} failed; the same command goes on where it stopped")


def lines_of(found: dict[tuple[str, str], dict[int, dict[str, Any]]]) -> Iterator[str]:
    """The page's tables: of patches as they were printed, and of trainings a column for each network."""
    for by_seed in (found[key] for key in found if key[0] == "patches"):
        for result in by_seed.values():
            yield "| frozen patches of | k-NN in context, mIoU | linear, mIoU |"
            yield "| --- | --- | --- |"
            for row in result["table"]:
                figures = [f"{row[probe]['miou']:.1f}" if row.get(probe) else "" for probe in ("knn", "linear")]
                yield f"| {row['features']} | {' | '.join(figures)} |"
            yield ""
    tasks = [task for task in FIGURES if any((task, network) in found for network in NETWORKS)]
    if tasks:
        yield "| trained | figure | pretrained, by seed | random weights, by seed |"
        yield "| --- | --- | --- | --- |"
    for task in tasks:
        for figure in FIGURES[task]:
            cells = []
            for network in NETWORKS:
                by_seed = found.get((task, network), {})
                cells.append(", ".join(f"{by_seed[seed][figure]:.1f}" for seed in sorted(by_seed)) or "–")
            yield f"| `{task}` | {SHOWN[figure]} | {' | '.join(cells)} |"


def rows_of(found: dict[tuple[str, str], dict[int, dict[str, Any]]]) -> list[Row]:
    rows = []
    for (task, network), by_seed in found.items():
        for figure in FIGURES.get(task, ("miou",)):
            random = found.get((task, "random"), {}).values()
            start = [each[figure] for each in random] if network != "random" else []
            values = [each[figure] for each in by_seed.values()]
            baseline = ("random", start) if start else None
            name = f"{task}, {network}"
            rows.append(make_row(name, SHOWN[figure], "%", values, device_name("cpu"), True, baseline, True))
    return rows


def bench() -> int:
    parser = arguments("bench_dense", (__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS)[:3], metavar="TASK",
                        help=f"which of {', '.join(TASKS)} (the first three)")  # fmt: skip
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="of trainings (both)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of trainings (0 1 2)")
    parser.add_argument("--steps", type=int, default=1500, help="of the pretraining, of 3,900 that are planned (1500)")
    parser.add_argument("--out", type=Path, default=Path("runs/dense"), help="where the runs lie (runs/dense)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="where what they are worth is kept (--out/results)")
    parser.add_argument("--page", type=Path, metavar="F.md", help="renew this page's tables")
    given = parser.parse_args()
    evening = Evening(given.out, given.results or given.out / "results", 2 if given.quick else given.steps, given.quick)
    evening.prepare()
    weights = evening.pretrain()
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for task in given.tasks:
        for seed in given.seeds[:1] if task == "patches" else given.seeds:
            for network in NETWORKS[:1] if task == "patches" else given.networks:
                found.setdefault((task, network), {})[seed] = evening.result(task, network, seed, weights)
    lines = list(lines_of(found))
    print("\n".join(lines))
    if given.page is not None:
        renew_tables(given.page, BEGIN, END, lines)
    return finish(rows_of(found), "Dense tasks with and without pretraining", given.json, given.plot)


def main() -> int:
    return exit_with_sentence("bench_dense", bench)


if __name__ == "__main__":
    sys.exit(main())
