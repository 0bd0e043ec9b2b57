"""Does it learn? The paper's Tables 6 to 9 in small: every case pretrained alike, its frozen features judged alike.

`python -m benchmarks.bench_learning [--train F.beton --val F.beton] [--cases dual sdae ...] [--seeds 0 1] [--epochs 10]
[--equal steps|time] [--base config.json] [--quick] [--page docs/learning.md]`. Without --train and --val it takes
`tiny_imagenet_20`, or with `--images camvid` crops of CamVid's frames. Each run lies in a folder of its own under --out
and is judged once, in a small file in --results: a run that was stopped goes on, one whose file is there is read, so
that evenings add up. What is judged: 10-NN (cosine, majority) on the validation images and leave-one-out on the
training images, and logistic regression, of the class token and of the mean of the patch tokens; against a random start
and 8 x 8 thumbnails. Differences come with a paired bootstrap's 95 % interval over images. With `--equal time` every
case gets as many epochs as fit in the time of the base's; `mae-sdae` and `mae-dual` then spend the first half of it on
MAE. With equal steps they all begin from one run of MAE, of --mae-epochs. What a run is worth and its curve are in the
files of --results, the rows of the table in that of --json.

With `--device cuda` runs, features and judges are on the GPU; passes are compiled, as CUDA graphs unless --compile-mode
says otherwise, since steps of small images are short.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import add_device, arguments, finish
from benchmarks.learning_cases import BASE, CASES, TABLES
from benchmarks.learning_images import OVERLAPPING, SETS
from benchmarks.learning_judge import (
    POOLS,
    Images,
    Judged,
    features_of,
    judge,
    read,
    write,
)
from benchmarks.learning_tables import UNTRAINED, as_rows, lines_of, picture, write_page
from benchmarks.step_cases import release
from fastpmae.config import Config
from fastpmae.config_file import read_config
from fastpmae.demo.demo import rows_of, thumbnails, whole_images
from fastpmae.distributed.ranks import choose_device
from fastpmae.evaluate.backbone import find_backbone
from fastpmae.evaluate.datasets import needed, open_labelled
from fastpmae.evaluate.features import load_encoder
from fastpmae.evaluate.finetune import train_classifier
from fastpmae.evaluate.finetune_state import Setting
from fastpmae.evaluate.recipe import finetune_preset
from fastpmae.model.build import make_student
from fastpmae.presets import preset
from fastpmae.train import pretrain
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.machine import loader_threads

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CURVE = ("step", "epoch", "loss", "loss_m", "loss_c", "loss_p")
LONGEST_CURVE = 300
"""Rows of a curve that is kept with what a run is worth."""


class Evening:
    """The runs of one invocation: what they share, and where they lie."""

    def __init__(
        self,
        base: Config,
        train: Path,
        val: Path,
        out: Path,
        results: Path,
        workers: int,
        device: torch.device | str = "cpu",
        mae_epochs: int = 0,
    ):
        self.device = torch.device(device)
        self.betons = train, val
        self.base = base.using(beton=train, workers=workers, device=self.device.type)
        self.out, self.results, self.mae_epochs = out, results, mae_epochs
        for folder in (out, results):
            folder.mkdir(parents=True, exist_ok=True)
        side = base.views.image_size
        # nothing is cut off but what is not square
        self.train, self.val = (
            Images(*whole_images(beton, side, crop_ratio=1.0, engine=base.data.loader)) for beton in (train, val)
        )

    def untrained(self, name: str, seed: int) -> Judged:
        """A random start's features, or thumbnails."""
        path = self.results / f"{name}-seed{seed}.json"
        if not path.exists():
            if name == "thumbnails":
                features: dict[str, tuple[Tensor, Tensor]] = dict.fromkeys(
                    POOLS, thumbnails(self.train.pixels, self.val.pixels)
                )
            else:
                encoder = make_student(self.base, torch.Generator().manual_seed(seed)).encoder.eval()
                features = features_of(encoder, self.train, self.val, self.device)
            write(Judged(name, seed, "steps", 0, 0.0, judge(features, self.train, self.val, self.device)), path)
        return read(path)

    def trained(self, name: str, seed: int, equal: str, epochs: int) -> Judged:
        """A case's run, pretrained (or gone on with) and judged, or read where that is done."""
        path = self.results / f"{name}-{equal}-{epochs}-seed{seed}.json"
        if not path.exists():
            runs: list[Path] = []
            start = CASES[name].after
            if start is not None:
                first = self.mae_epochs or self._epochs(start, half=True)
                runs.append(self._pretrained(start, seed, "first" if self.mae_epochs else "half", first))
            runs.append(self._pretrained(name, seed, equal, epochs, init=runs[0] if runs else None))
            encoder, _ = load_encoder(runs[-1])
            right = judge(features_of(encoder, self.train, self.val, self.device), self.train, self.val, self.device)
            seconds = sum(second for run in runs for second in seconds_of(run))
            write(Judged(name, seed, equal, epochs, seconds, right), path, curve_of(runs[-1]))
        return read(path)

    def fine_tuned(self, one: Judged, epochs: int) -> Judged:
        """The same with the validation images that its network gets right after fine-tuning for so many epochs."""
        path = self.results / f"{one.case}-{one.equal}-{one.epochs}-seed{one.seed}.json"
        if "finetune_val" not in one.right:
            run = self.out / path.stem
            train, val = open_labelled(self.betons[0], self.betons[1])
            setting = Setting(
                find_backbone(str(run), "student"), train, needed(val, train), run / f"finetune-{epochs}", self.device,
                self.base.data.loader, self.base.efficiency.workers,
            )  # fmt: skip
            config = finetune_preset("small").using(epochs=epochs, seed=one.seed, eval_every=epochs)
            print(f"{path.stem}: fine-tuning", flush=True)
            scores = train_classifier(setting, config, resume=True, progress=Progress())
            right = (scores.ranked[:, 0] == scores.labels).numpy()
            curve = json.loads(path.read_text())["curve"]
            write(dataclasses.replace(one, right=one.right | {"finetune_val": right}), path, curve)
        return read(path)

    def _pretrained(self, name: str, seed: int, equal: str, epochs: int, init: Path | None = None) -> Path:
        """A case's run, gone on with where it was stopped."""
        run = self.out / f"{name}-{equal}-{epochs}-seed{seed}"
        changes = CASES[name].changes(self.base) | {"epochs": epochs, "seed": seed, "init": init}
        if CASES[name].pixels_first:
            changes["pixel_epochs"] = self._epochs("mae", half=True)
        print(f"{run.name}:", flush=True)
        release()  # what was compiled for another run is of no use, and there is a limit to it
        return pretrain(self.base.using(**changes, out=run, name=run.name, resume="auto"))

    def epochs_in_the_same_time(self, name: str) -> int:
        """As many epochs as the case gets done while the base does its own; measured in turns, and kept."""
        case = CASES[name]
        before = "mae" if case.pixels_first else case.after
        for one in (case.timed(), *([before] if before else [])):
            if one not in self.times():
                self._time(one)
        return self.known_epochs()[name]

    def _time(self, name: str) -> None:
        """Measure what a step of a case takes, as a share of dual's; the mean over its epochs where sizes differ."""
        parts = {"dual": CASES["dual"].changes(self.base)}
        shares: dict[str, float] = {}
        for share, changes in CASES[name].parts(self.base):
            part = f"{name}-{changes['image_size']}" if "image_size" in changes else name
            parts[part], shares[part] = changes, share
        found: dict[str, list[float]] = {part: [] for part in parts}
        # on a GPU the first of three stretches compiles
        every = 20 if self.device.type == "cuda" else 4
        for turn in range(3):
            for part, seconds in found.items():
                run = self.out / "timing" / f"{name}-{part}-{turn}"
                config = self.base.using(**parts[part], out=run, steps=3 * every, log_every=every)
                release()
                pretrain(config.using(resume="auto", tensorboard=False))
                seconds.append(float(np.median(seconds_of(run))))
        ratios = {part: float(np.median(np.divide(found[part], found["dual"]))) for part in shares}
        times = self.times() | {name: sum(share * ratios[part] for part, share in shares.items())}
        with atomic_write(self.results / "step-seconds.json") as beside:
            beside.write_text(json.dumps(times, indent=1) + "\n")

    def known_epochs(self) -> dict[str, int]:
        """The same of every case whose time has been measured."""
        times, found = self.times(), {}
        for name, case in CASES.items():
            if case.timed() in times and (not case.pixels_first or "mae" in times):
                found[name] = self._epochs(case.timed(), half=case.after is not None or case.pixels_first)
                if case.pixels_first:
                    found[name] += self._epochs("mae", half=True)
        return found

    def _epochs(self, timed: str, half: bool) -> int:
        """How many epochs of a timed case the base's time holds, or half of it."""
        return max(1, round(self.base.optimizer.epochs / (2 if half else 1) / self.times()[timed]))

    def times(self) -> dict[str, float]:
        """What a step of each case takes, as a share of the base's, where it has been measured."""
        path = self.results / "step-seconds.json"
        return {"dual": 1.0} | (json.loads(path.read_text()) if path.exists() else {})


def seconds_of(run: Path) -> list[float]:
    """How long each stretch between two rows of a run's log took: images over images a second."""
    seconds, before = [], 0.0
    batch = read_config(run / "config.json").optimizer.batch_size
    for row in rows_of(run):
        seconds.append((row["step"] - before) * batch / row["images_per_second"])
        before = row["step"]
    return seconds


def curve_of(run: Path) -> list[dict[str, float]]:
    """Step, epoch, the losses, and how long it took, over a run: its log's rows, or means of several for a long one."""
    rows = [
        {key: value for key, value in row.items() if key in CURVE} | {"seconds": seconds}
        for row, seconds in zip(rows_of(run), seconds_of(run), strict=True)
    ]
    together = -(-len(rows) // LONGEST_CURVE)
    return [_as_one(rows[first : first + together]) for first in range(0, len(rows), together or 1)]


def _as_one(rows: list[dict[str, float]]) -> dict[str, float]:
    """Rows that follow each other as one: up to where, their mean losses, the sum of their seconds."""
    last = rows[-1]
    losses = {key: float(np.mean([row[key] for row in rows if key in row])) for key in last if key.startswith("loss")}
    return {"step": last["step"], "epoch": last["epoch"], "seconds": sum(row["seconds"] for row in rows)} | losses


def for_device(base: Config, device: torch.device, mode: str | None) -> Config:
    """The base's settings as a run of this device takes them: on a GPU compiled, as CUDA graphs unless told.

    Raises:
        UserError: for a mode on the CPU.
    """
    if device.type != "cuda":
        if mode is not None:
            raise UserError(f"--compile-mode {mode} is of a GPU: say --device cuda, or leave it out")
        return base
    graphs = "reduce-overhead" if base.optimizer.accumulate == 1 else "default"
    return base.using(compile="on", compile_mode=mode or graphs)


def bench() -> int:
    parser = arguments("bench_learning", (__doc__ or "").split("\n\n")[0])
    add_device(parser)
    parser.add_argument("--compile-mode", metavar="MODE", choices=MODES, help=f"on a GPU: {', '.join(MODES)}")
    parser.add_argument("--images", choices=list(SETS), default="tiny-imagenet",
                        help="a set in ../shared to pretrain and judge on (tiny-imagenet)")  # fmt: skip
    parser.add_argument("--train", type=Path, metavar="F.beton", help="labelled images to pretrain and judge on")
    parser.add_argument("--val", type=Path, metavar="F.beton", help="labelled images to test on")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(TABLES[6]), metavar="CASE",
                        help=f"which of {', '.join(CASES)} (those of Table 6)")  # fmt: skip
    parser.add_argument("--compare", choices=list(CASES), default="dual", metavar="CASE",
                        help="whose lead over each case the tables give (dual)")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the runs (0)")
    parser.add_argument("--epochs", type=int, default=10, help="of the base's schedule (10)")
    parser.add_argument("--mae-epochs", type=int, default=0, metavar="EPOCHS",
                        help="with equal steps: of the one run that the cases mae-... begin from")  # fmt: skip
    parser.add_argument("--equal", choices=("steps", "time"), default="steps", help="what the cases have in common")
    parser.add_argument("--finetune", type=int, default=0, metavar="EPOCHS",
                        help="fine-tune every run too, with the preset `small` and so many epochs (not)")  # fmt: skip
    parser.add_argument("--base", metavar="PRESET_OR_FILE", default=str(BASE), help="settings of dual")
    parser.add_argument("--workers", type=int, default=0, help="loader threads (1; on a GPU all cores')")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="where the runs lie (runs/learning)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="where what they are worth is kept (--out)")
    parser.add_argument("--page", type=Path, metavar="F.md", help="renew this page's tables of the base's runs")
    given = parser.parse_args()
    device = choose_device(given.device)
    if (given.train is None) != (given.val is None):
        raise UserError("--train and --val go together")
    later = [name for name in given.cases if CASES[name].after]
    if later and (given.equal == "time") == bool(given.mae_epochs):
        raise UserError(f"{', '.join(later)} comes after MAE: say --equal time, or --mae-epochs with equal steps")
    first = [name for name in given.cases if CASES[name].pixels_first]
    if first and given.equal != "time":
        raise UserError(f"{', '.join(first)} gives half of its time to pixels: say --equal time")
    data = (given.train, given.val) if given.train else SETS[given.images](given.out / given.images)
    base = read_config(Path(given.base)) if Path(given.base).is_file() else preset(given.base)
    if base.optimizer.pixel_epochs:
        raise UserError(f"--base {given.base} begins with pixels already: take one without --pixel-epochs")
    base = for_device(base.using(epochs=1 if given.quick else given.epochs), device, given.compile_mode)
    results = given.results or given.out
    workers = given.workers or (loader_threads() if device.type == "cuda" else 1)
    evening = Evening(base, *data, given.out, results, workers, device, given.mae_epochs)
    for name in UNTRAINED:
        for seed in given.seeds if name == "random" else [0]:
            evening.untrained(name, seed)
    for seed in given.seeds:
        for name in given.cases:
            in_time = given.equal == "time" and name != "dual"
            epochs = evening.epochs_in_the_same_time(name) if in_time else base.optimizer.epochs
            one = evening.trained(name, seed, "time" if in_time else "steps", epochs)
            if given.finetune:
                evening.fine_tuned(one, given.finetune)
    found: dict[tuple[str, str], list[Judged]] = {}
    same_time = evening.known_epochs()
    for path in sorted(results.glob("*-seed*.json")):
        one = read(path)
        comparable = same_time.get(one.case) if one.equal == "time" else base.optimizer.epochs
        if one.case in UNTRAINED or one.epochs == comparable:
            found.setdefault((one.case, one.equal), []).append(one)
    judged_on = "val" if given.images in OVERLAPPING and not given.train else "train"
    lines = list(lines_of(found, given.compare, judged_on))
    print("\n".join(lines))
    if given.page is not None:
        write_page(given.page, results.name, lines)
    title = f"Features after {base.optimizer.epochs} epochs of {len(evening.train.labels)} images"
    return finish(
        as_rows(found, device.type), title, given.json, given.plot,
        lambda _, words, file: picture(found, words, file, judged_on),
    )  # fmt: skip


def main() -> int:
    return exit_with_sentence("bench_learning", bench)


if __name__ == "__main__":
    sys.exit(main())
