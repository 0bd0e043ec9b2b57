"""What a run on a GPU has shown: the aims and whether they were met, a table for each stage, and the page of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import figures_in_words, read_results
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write

MARKED = "decoder_class_token"
"""False in lines of result files from when the decoder of our SdAE had no class token; later files do not name it."""
UNLIKE = "Not SdAE, whose decoder keeps the class token in its sequence: measured by an earlier version without it"
STARTED, ENDED = "started", "ended"
"""The names of a stage's first and last line."""


@dataclass(frozen=True)
class Stage:
    """The last run of a stage in a result file."""

    name: str
    started: dict[str, Any]
    rows: list[dict[str, Any]]
    ended: dict[str, Any] | None
    """None where the file ends before the stage does."""

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The lines that did not pass their check."""
        return [row for row in self.rows if row.get("ok") is False]

    @property
    def passed(self) -> bool:
        return self.ended is not None and self.ended.get("status") == 0 and not self.failed


class Results:
    """A result file by stages; of a stage that ran more than once, its last run.

    Raises:
        UserError: when the file cannot be read or is none of ours.
    """

    def __init__(self, *files: Path):
        self.stages: dict[str, Stage] = {}
        for file in files:
            for row in read_results(file):
                name = row["stage"]
                if row["name"] == STARTED:
                    self.stages.pop(name, None)  # a stage that ran again stands where it ran last
                    self.stages[name] = Stage(name, row, [], None)
                elif name not in self.stages:
                    raise UserError(
                        f"{file}: the stage {name!r} has figures and no beginning: it is no result file of on_gpu"
                    )
                elif row["name"] == ENDED:
                    before = self.stages[name]
                    self.stages[name] = Stage(name, before.started, before.rows, row)
                else:
                    self.stages[name].rows.append(row)

    def rows(self, stage: str) -> list[dict[str, Any]]:
        return self.stages[stage].rows if stage in self.stages else []

    def figure(self, stage: str, name: str, key: str) -> float | None:
        """A figure by its stage, line and key; None where it was not measured."""
        found = [row[key] for row in self.rows(stage) if row["name"] == name and row.get(key) is not None]
        return found[-1] if found else None


@dataclass(frozen=True)
class Aim:
    """Something that the project wants of a GPU."""

    what: str
    aim: str
    found: Callable[[Results], tuple[str, bool] | None]
    """What was measured and whether it is enough; None where it was not measured."""


def _checks(results: Results) -> tuple[str, bool] | None:
    rows = [row for row in results.rows("kernels") if "ok" in row]
    if not rows:
        return None
    failed = sum(not row["ok"] for row in rows)
    words = f"{len(rows) - failed} of {len(rows)} checks within their bounds"
    if failed == 0 and not results.stages["kernels"].passed:
        return f"{words}, and the stage did not come to its end", False
    return words, failed == 0


def _kernel(name: str) -> Callable[[Results], tuple[str, bool] | None]:
    def found(results: Results) -> tuple[str, bool] | None:
        share, times = (results.figure("bandwidth", name, key) for key in ("of_copy", "times"))
        if share is None or times is None:
            return None
        return f"{share:.0%}, {times:.1f} x", share >= 0.8 and times >= 8

    return found


def _step(results: Results) -> tuple[str, bool] | None:
    rows = [row for row in results.rows("step") if row.get("compiled") and "step_ms" in row]
    mine, usual = ({row["model"]: row for row in rows if row["case"] == name} for name in ("dual", "plain-dual"))
    rate = results.figure("bandwidth", "matrix product", "flops_per_second")
    # The largest of the models that both have: one may have failed, or been left out.
    model = max(mine.keys() & usual.keys(), key=lambda model: mine[model]["flops_of_an_image"], default=None)
    if model is None or rate is None or not usual[model]["peak_gib"]:
        return None
    ours, plain = mine[model], usual[model]
    faster = ours["images_per_second"] / plain["images_per_second"]
    memory, used = ours["peak_gib"] / plain["peak_gib"], ours["flops_per_second"] / rate
    words = f"{faster:.2f} x, {memory:.2f} of its memory, {used:.0%} of the matrix rate ({model})"
    of_both = (f"losses of dual, {model}", f"dual, {model}, compiled")
    if any(row.get("ok") is False and row["name"].startswith(of_both) for row in results.rows("step")):
        return f"{words}, with losses that are apart", False
    return words, model == "vit_base" and faster >= 1.3 and memory <= 0.7 and used >= 0.4


def _table6(results: Results) -> tuple[str, bool] | None:
    name = "dual over sdae, compiled"
    time, memory = (results.figure("table6", name, key) for key in ("time_over_flops", "memory"))
    if time is None or memory is None:
        return None
    return f"{time:.3f} x the FLOP ratio, memory {memory:.3f} x", time <= 1.03 and memory <= 1.1


def _train(results: Results) -> tuple[str, bool] | None:
    found = {row["name"]: row for row in results.rows("train") if "images_per_second" in row}
    base = found.get("train vit_base")
    if base is None:
        return None
    words = "; ".join(
        f"{name.split()[-1]} {row['images_per_second']:.0f} images/s, waiting {row['data_wait']:.1%}"
        for name, row in found.items()
    )
    return words, base["data_wait"] <= 0.02


def _dali(results: Results) -> tuple[str, bool] | None:
    rates = [row["images_per_second"] for row in results.rows("dali") if "images_per_second" in row]
    same = results.figure("dali", "dali: the same crops, flips and masks", "ok")
    if not rates or same is None:
        return None
    return f"{max(rates):.0f} images/s, {'the same draws' if same else 'OTHER DRAWS'}", bool(same)


def _plan(results: Results) -> tuple[str, bool] | None:
    rows = [row for row in results.rows("plan") if row.get("compiled") and row.get("memory")]
    if not rows:
        return None
    time, memory = ([row[key] for row in rows] for key in ("time", "memory"))
    close = all(abs(ratio - 1) <= 0.15 for ratio in (*time, *memory))
    return f"time {min(time):.2f} to {max(time):.2f}, memory {min(memory):.2f} to {max(memory):.2f} of measured", close


def _learning(results: Results) -> tuple[str, bool] | None:
    rows = [row for row in results.rows("learning") if "epochs" in row]
    if not rows:
        return None
    methods = {row["name"].removeprefix("learning ") for row in rows if row["epochs"] >= 100}
    return f"{', '.join(sorted(methods))} at 100 epochs or more", methods >= {
        "mae",
        "sdae",
        "dual",
        "mae-dual",
        "mae-sdae",
    }


AIMS = (
    Aim("each kernel against float64", "within its bound everywhere, no NaN", _checks),
    Aim("Sinkhorn sweep", "80 % of the copy's bandwidth, 8 x the baseline", _kernel("sinkhorn")),
    Aim("prototype loss and gradient", "80 % of the copy's bandwidth, 8 x the baseline",
        _kernel("cross_entropy with its gradient")),
    Aim("step of dual, ViT-B, 256 images, compiled",
        "1.3 x the compiled baseline, 0.7 of its memory, 40 % of the matrix rate", _step),
    Aim("dual over our own sdae (Table 6)", "time 1.03 x the FLOP ratio, memory 1.10 x", _table6),
    Aim("fastpmae-train from original JPEGs", "waiting for data at most 2 % of the time at ViT-B", _train),
    Aim("DALI, decoding on the GPU", "images/s; the same crops, flips and masks", _dali),
    Aim("fastpmae-plan", "time and memory within 15 % of measured", _plan),
    Aim("learning", "five methods, 100 epochs each", _learning),
)  # fmt: skip


def aims_table(results: Results) -> str:
    """Markdown: each aim, what was measured, and whether it was met."""
    lines = ["| what | aim | measured | met |", "|---|---|---|---|"]
    for aim in AIMS:
        found = aim.found(results)
        words, met = ("not measured", "") if found is None else (found[0], "yes" if found[1] else "no")
        lines.append(f"| {aim.what} | {aim.aim} | {words} | {met} |")
    return "\n".join(lines)


def stages_table(results: Results, planned: Sequence[str] = ()) -> str:
    """Markdown: how each stage went; `planned` ones that never began are listed too."""
    lines = ["| stage | result | seconds | checks | failed |", "|---|---|---|---|---|"]
    for name in dict.fromkeys((*results.stages, *planned)):
        stage = results.stages.get(name)
        if stage is None:
            lines.append(f"| {name} | not started | | | |")
            continue
        checks = [row for row in stage.rows if "ok" in row]
        seconds = "" if stage.ended is None else f"{stage.ended['seconds']:.0f}"
        how = "passed" if stage.passed else "FAILED"
        if stage.ended is None or stage.ended.get("limit"):
            how = "cut off"
        failed = ", ".join(_plain(row["name"]) for row in stage.failed[:3]) + (" ..." if len(stage.failed) > 3 else "")
        passed = sum(row["ok"] for row in checks)
        lines.append(f"| {name} | {how} | {seconds} | {passed} of {len(checks)} | {failed} |")
    return "\n".join(lines)


def figures_table(stage: Stage) -> str:
    """Markdown: every figure of a stage. Checks of one name are one line, with the worst of them."""
    worst: dict[str, dict[str, Any]] = {}
    for row in stage.rows:
        before = worst.get(row["name"])
        if before is None or _badness(row) > _badness(before):
            worst[row["name"]] = row
    lines = ["| what | figures | check |", "|---|---|---|"]
    for name, row in worst.items():
        check = "" if "ok" not in row else "passed" if row["ok"] else "FAILED"
        lines.append(f"| {_plain(name)} | {_plain(figures_in_words(row))} | {check} |")
    return "\n".join(lines)


def _badness(row: dict[str, Any]) -> float:
    """How far a line is towards failing its check; a figure that is not finite, or a failure, is the worst."""
    if row.get("ok") is False:
        return float("inf")
    value, limit = row.get("value"), row.get("limit")
    return value / limit if isinstance(value, int | float) and limit else -1.0


def _plain(words: str) -> str:
    """Words of a result file as a cell of a table."""
    return words.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def write_page(page: Path, files: Sequence[Path]) -> None:
    """Write `docs/gpu.md` from the result files of a CUDA device.

    Raises:
        UserError: when a file is none of ours, or holds what no GPU has measured.
    """
    results = Results(*files)
    if not results.stages:
        raise UserError(f"{', '.join(map(str, files))}: there is nothing in it")
    for stage in results.stages.values():
        if stage.started.get("device_type") != "cuda" or stage.started.get("tiny"):
            raise UserError(f"the stage {stage.name!r} was not measured on a GPU: there is no page without one")
    drawn = sorted(stage.name for stage in results.stages.values() if stage.started.get("drawn"))
    lines = [
        "# On a GPU",
        "",
        "Written by `python -m benchmarks.on_gpu --page docs/gpu.md --results FILE` from what "
        "`python -m benchmarks.on_gpu` found; nothing here is typed by hand.",
        "",
    ]
    for about in dict.fromkeys(_about(stage) for stage in results.stages.values()):
        lines += [f"- {about}"]
    if drawn:
        lines += ["", f"Measured on drawn images, not on photographs: {', '.join(drawn)}."]
    without = sorted(
        {row["name"] for stage in results.stages.values() for row in stage.rows if row.get(MARKED) is False}
    )
    if without:
        lines += ["", f"{UNLIKE}: {_plain(', '.join(without))}."]
    lines += ["", "## Aims", "", aims_table(results), "", "## Stages", "", stages_table(results)]
    for stage in results.stages.values():
        lines += ["", f"### {stage.name}", "", figures_table(stage)]
    with atomic_write(page) as beside:
        beside.write_text("\n".join(lines) + "\n")


def _about(stage: Stage) -> str:
    """The machine and the versions that a stage ran on."""
    started = stage.started
    versions = ", ".join(f"{name} {number}" for name, number in started.get("versions", {}).items())
    return f"{started.get('device')}, {started.get('cores')} cores; {versions}; {str(started.get('date'))[:10]}"
