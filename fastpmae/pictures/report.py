"""`fastpmae-report`: what a run did and learnt, as one HTML file that needs nothing beside it."""

import base64
import contextlib
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastpmae.config import Config
from fastpmae.config_file import read_config
from fastpmae.pictures.analysis import analyse, prototype_use
from fastpmae.pictures.figures import draw_analysis, draw_prototypes
from fastpmae.plotting import save_picture
from fastpmae.presets import PRESETS
from fastpmae.run.checkpoint import CheckpointError, checkpoints_in, find_checkpoint, read_progress
from fastpmae.run.images import sources
from fastpmae.run.init_weights import check_pretrained
from fastpmae.run.log import read_rows
from fastpmae.run.results import DenseResult, Evaluated, Result, dense_results_in, results_in
from fastpmae.run.stored_run import brought_here
from fastpmae.templating import html_page
from fastpmae_loaders import open_samples
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.help_texts import HELP_TEXTS
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.cli.terminal import tell
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.mixture import read_by, sources_named, split_weight
from fastpmae_loaders.printable import printable
from fastpmae_loaders.sources.reading import read_file
from fastpmae_loaders.stores.address import Address, is_address, place_of
from fastpmae_loaders.values import checked
from fastpmae_loaders.write.outputs import Output, open_output

CURVES: tuple[tuple[str, dict[str, str]], ...] = (
    ("loss", {"loss": "total", "loss_m": "L_m, reconstruction", "loss_c": "L_c, class labels",
              "loss_p": "L_p, patch labels"}),
    ("matches", {"match_overlap": "match shows the same place", "match_chance": "a match by chance",
                 "match_same_place": "the same place of the view", "match_reachable": "patches that have one"}),
    ("prototypes used in a batch", {"class_prototypes_used": "by class tokens",
                                    "patch_prototypes_used": "by patch tokens"}),
    ("label entropy, nats", {"class_label_entropy": "class", "patch_label_entropy": "patch",
                             "entropy_limit": "the most there can be"}),
    ("what the labels could still teach, nats", {"class_divergence": "class", "patch_divergence": "patch",
                                                 "class_fold_divergence": "class: folds that disagree"}),
    ("rank of the teachers' tokens", {"reconstruction_rank": "reconstruction", "labelling_rank": "labelling"}),
    ("k-NN during training, %", {"knn_student": "student", "knn_reconstruction_teacher": "reconstruction teacher",
                                 "knn_labelling_teacher": "labelling teacher"}),
    ("linear probe during training, %", {"linear_student": "student",
                                         "linear_reconstruction_teacher": "reconstruction teacher",
                                         "linear_labelling_teacher": "labelling teacher"}),
    ("images a second", {"images_per_second": "images/s"}),
    ("share of time waiting for data", {"data_wait": "waiting"}),
    ("learning rate", {"lr": "lr"}),
)  # fmt: skip
"""Title and curves of each plot; what a run has not logged is left out."""
MOST_MARKS = 20
"""Changes of phase or size that a plot is marked with."""


@checked
def write_report(
    run: Address | Path,
    out: Address | Path | None = None,
    beton: Address | Path | str | tuple[str, ...] | None = None,
    samples: int = 6,
    progress: Progress | None = None,
    force: bool = True,
) -> Path | Address:
    """Write a run's report and return where it is. Run, report and images may lie at addresses.

    Args:
        out: report.html in the run's folder by default; it appears whole or not at all.
        beton: the images of the pictures; the run's own by default. Where they are not there, the pictures are left
            out and a sentence says so, as it does where the networks are those of an earlier version.
        progress: counts the parts that are done: the log, two pictures, the page.
        force: replace `out`, but no other file of the run and nothing that is read here; report.html in the run's
            folder is renewed without it. The command does so where it is told to.

    Raises:
        UserError: when the folder holds no run, what it holds cannot be used, or the samples make no picture.
    """
    if not 1 <= samples <= 64:
        raise UserError(f"--samples {samples} make no picture: draw between 1 and 64")
    with brought_here(run) as here:
        check_pretrained(here)
        if not (here / "config.json").is_file():
            raise UserError(f"{run} is no run folder: there is no config.json in it")
        config = read_config(here / "config.json", recorded=True, decoder_matters=False)
        images = [] if beton is None else read_by(beton)
        output = _output(run, out, force, [*images, *(split_weight(source)[0] for source in sources(config))])
        progress = progress or Progress()
        with progress.count(4, "parts"):
            rows = read_rows(here / "metrics.jsonl")
            progress.advance()
            pictures, remark = _pictures(here, run.name, config, beton, samples, progress)
            page = _page(here, run.name, config, rows, pictures, remark)
            with output.writing() as beside:
                beside.write_text(page, encoding="utf-8", errors="backslashreplace")
            progress.advance()
    return output.place


def _output(
    run: Address | Path, out: Address | Path | None, force: bool, inputs: Sequence[str | os.PathLike[str]]
) -> Output:
    """Where the report goes. A run's own is renewed without `force`."""
    target = out or run / "report.html"
    if isinstance(target, Address):
        return open_output(target, force=force or target == run / "report.html", inputs=inputs)
    if isinstance(run, Path) and target.parent.resolve() / target.name == run.resolve() / "report.html":
        return Output(target, True, None)
    return open_output(target, force=force, inputs=inputs)


def _pictures(
    run: Path,
    name: str,
    config: Config,
    named: Address | Path | str | tuple[str, ...] | None,
    samples: int,
    progress: Progress,
) -> tuple[dict[str, str], str]:  # fmt: skip
    """Drawn pictures as PNG data by their titles, and a sentence on what is missing."""
    if not checkpoints_in(run):
        return {}, "There is no checkpoint yet, so there are no pictures of what was learnt."
    beton = named or config.data.beton
    named_by_run = [split_weight(source)[0] for source in sources(config)]
    if beton is None or not (named or all(is_address(source) or Path(source).exists() for source in named_by_run)):
        return (
            {},
            f"Its images ({' '.join(sources(config))}) are not here, so there are no pictures of what was learnt: "
            "name some (--beton).",
        )
    try:
        checkpoint = find_checkpoint(run)
        phase = checkpoint.phase
    except UserError as refused:
        # damaged files, networks that this version does not have: what was logged is shown all the same
        return {}, f"There are no pictures of what was learnt: {refused}."
    try:
        images = open_samples(beton)
    except UserError as refused:
        if named or not any(map(is_address, named_by_run)):
            raise
        return {}, f"Its images cannot be read, so there are no pictures of what was learnt: {refused}."
    title = printable(f"{name} · {images.path.name}")
    pictures = {
        "What was learnt of a few images": _png(
            draw_analysis(analyse(checkpoint, images, min(samples, len(images))), title)
        )
    }
    progress.advance()
    if phase.config.teacher.teachers in ("dual", "single"):
        pictures["Patches nearest to the most used prototypes"] = _png(
            draw_prototypes(prototype_use(checkpoint, images), title)
        )
    progress.advance()
    return pictures, ""


def _png(figure: Figure) -> str:
    file = io.BytesIO()
    save_picture(figure, file, dpi=110)
    return base64.b64encode(file.getvalue()).decode()


def _page(
    run: Path, name: str, config: Config, rows: list[dict[str, float]], pictures: dict[str, str], remark: str
) -> str:
    known = config.run.preset in PRESETS
    return html_page(
        "fastpmae.pictures",
        "report.html.j2",
        name=printable(name),
        summary=_summary(run, config),
        figures=list(_figures(config, rows)) if rows else [],
        evaluations=[_evaluation(result) for result in results_in(run / "eval")],
        dense=[_dense(result) for result in dense_results_in(run / "eval")],
        curves=_png(_curves(rows)) if len(rows) > 1 else None,
        pictures=pictures,
        remark=remark,
        which=f"those that differ from the preset {config.run.preset}" if known else "all of them",
        changed=_as_json(_changed(config)),
        settings=_as_json(config.flat()),
    )


def _as_json(settings: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in settings.items()}


def _changed(config: Config) -> dict[str, Any]:
    flat = config.flat()
    if config.run.preset not in PRESETS:
        return flat
    before = PRESETS[config.run.preset].flat()
    return {name: value for name, value in flat.items() if value != before[name]}


def _summary(run: Path, config: Config) -> str:
    views, model = config.views, config.network
    words = [
        f"preset {config.run.preset}", model.model, f"{' '.join(views.progressive_resolution) or views.image_size} px",
        f"{config.optimizer.epochs} epochs", f"batch {config.optimizer.batch_size}",
        f"peak learning rate {config.optimizer.peak_lr:.4g}", f"seed {config.run.seed}",
    ]  # fmt: skip
    for path in checkpoints_in(run):
        with contextlib.suppress(CheckpointError):  # a damaged one
            words.append(f"newest checkpoint: step {read_progress(path)['step']:,}")
            break
    with contextlib.suppress(OSError, UserError, ValueError, IndexError, KeyError, TypeError, RecursionError):
        machine = json.loads(read_file(run / "machine.jsonl").splitlines()[-1])
        words.append(f"on {machine['gpu'] or 'the CPU'}, torch {machine['torch']}")
    return " · ".join(words)


def _figures(config: Config, rows: list[dict[str, float]]) -> Iterator[tuple[str, str]]:
    last = rows[-1]
    yield "steps", f"{last['step']:,.0f}"
    yield f"of {config.optimizer.epochs} epochs", f"{last.get('epoch', 0):.2f}"
    yield "loss", _shown(last.get("loss"))
    by_size: dict[int, list[dict[str, float]]] = {}
    for row in rows:
        if "images_per_second" in row:
            by_size.setdefault(_stage(row)[1], []).append(row)
    for size, of_size in by_size.items():
        words = f" at {size} px" if size else ""
        rates = sorted(row["images_per_second"] for row in of_size)
        yield f"images/s{words}, median", f"{rates[len(rates) // 2]:,.0f}"
        if len(by_size) > 1:
            yield f"loss, last{words}", _shown(of_size[-1].get("loss"))
    waits = [row["data_wait"] for row in rows if "data_wait" in row]
    if waits:
        yield "waiting for data", f"{100 * sum(waits) / len(waits):.1f} %"
    yield "times that an image did not decode", f"{last.get('bad_images', 0):.0f}"


def _stage(row: dict[str, float]) -> tuple[float, int]:
    """The phase of a row and the size of its views, 0 where the run has one only; the file may be a stranger's."""
    size = row.get("image_size", 0)
    return row.get("phase", 0), int(size) if 0 < size <= 4096 else 0


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if isinstance(value, float) else ""


def _evaluation(result: Result) -> dict[str, str]:
    """A row of the table, with what tells it from the others."""
    numbers = {"top1": result.top1, "top5": result.top5}
    return _evaluated(result) | {name: _shown(number) for name, number in numbers.items()}


def _dense(result: DenseResult) -> dict[str, str]:
    """A row of the table of masks and boxes."""
    return _evaluated(result) | {"figures": result.words}


def _evaluated(result: Evaluated) -> dict[str, str]:
    numbers = {"step": result.step, "images": result.images}
    return {
        "evaluation": result.evaluation,
        "network": result.network.replace("_", " "),
        "images_of": result.images_of,
        "detail": result.detail,
        "date": result.date.replace("T", " ")[:16],
    } | {name: _shown(number) for name, number in numbers.items()}


def _curves(rows: Sequence[dict[str, float]]) -> Figure:
    """A plot for each group of curves that the run has logged."""
    logged = {name for row in rows for name in row}
    plots = [(title, {n: w for n, w in curves.items() if n in logged}) for title, curves in CURVES]
    plots = [(title, curves) for title, curves in plots if curves]
    columns = 3
    height = -(-len(plots) // columns)
    figure = Figure((12.5, 3.1 * height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    # the last steps of pixels alone, and of smaller views, where the run has them
    trained = [row for row in rows if "lr" in row]
    changes = [row["step"] for row, following in itertools.pairwise(trained) if _stage(row) != _stage(following)]
    for place, (title, curves) in enumerate(plots):
        axes = figure.add_subplot(height, columns, place + 1)
        for name, words in curves.items():
            points = [(row["step"], row[name], _stage(row)) for row in rows if name in row]
            (line,) = axes.plot([], [], lw=1.4, label=words)
            for _, stretch in itertools.groupby(points, key=lambda point: point[2]):
                steps, values, _ = zip(*stretch, strict=True)
                axes.plot(steps, values, lw=1.4, color=line.get_color(), marker="." if len(steps) < 10 else "")
        for step in changes[:MOST_MARKS]:
            axes.axvline(step, color="0.5", lw=0.8, ls=":")
        axes.set_title(title, size=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(fontsize=7.5, frameon=False)
        if place >= len(plots) - columns:
            axes.set_xlabel("step", size=8)
    return figure


def report_command(
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Path | None = None,
    beton: str | None = None,
    samples: int = 6,
    force: bool = False,
) -> None:
    """Write what a run did and learnt as one HTML file: figures, curves, evaluations, pictures, settings.

    Args:
        run: The run's folder, here or in a store (s3://, gs://, az://); it may still be running.
        out: The .html file to write, here or in a store; by default RUN/report.html.
        beton: Images for the pictures, here or in a store, in quotes of several sources; by default the run's own.
        samples: How many images the pictures show, 1 to 64.
        force: Replace OUT if it exists, but no other file of a run; RUN/report.html is renewed without it.
    """
    images = None if beton is None else sources_named(beton)
    target = None if out is None else place_of(out)
    tell(f"wrote {write_report(place_of(run), target, images, samples, Progress(live=True), force)}")


def main() -> int:
    """`fastpmae-report`."""
    return exit_with_sentence(
        "fastpmae-report", lambda: tyro.cli(report_command, prog="fastpmae-report", registry=HELP_TEXTS)
    )


if __name__ == "__main__":
    sys.exit(main())
