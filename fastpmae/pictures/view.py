"""Draws what the loader makes of a few images, crops, views, masks and folds, or what a run has learnt of them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from fastpmae.plotting import save_picture
from fastpmae.renamed import refuse_old_flags
from fastpmae_loaders import Batch, PairedViews, Samples, ViewSettings, open_samples
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.help_texts import HELP_TEXTS
from fastpmae_loaders.cli.terminal import tell
from fastpmae_loaders.engines.base import engine_for
from fastpmae_loaders.engines.names import DEFAULT_ENGINE
from fastpmae_loaders.engines.torch_engine import decode
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.mixture import read_by, sources_named
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.sampling import BLURRED, GRAY, JITTER, SIGMA, SOLARISED
from fastpmae_loaders.stores.address import Address, place_of
from fastpmae_loaders.values import checked
from fastpmae_loaders.write.outputs import Output, open_output

SIMPLE, COMPLEX = "#1c7ed6", "#e8590c"
INK, QUIET, HIDDEN = "#212529", "#868e96", "#dee2e6"
# told apart by people with any colour vision, as far as five can be (Okabe and Ito)
FOLDS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#5f3dc4", "#495057"]
PANELS = ["original", "simple view", "complex view", "the student sees", "the teachers' folds"]
CELL = 2.15
"""Inches of a panel."""


@checked
def draw_views(
    beton: Samples | Address | str | os.PathLike[str] | tuple[str, ...],
    out: Address | str | os.PathLike[str],
    *,
    samples: int = 6,
    index: tuple[int, ...] = (),
    seed: int = 0,
    epoch: int = 0,
    settings: ViewSettings | None = None,
    engine: str = DEFAULT_ENGINE,
    force: bool = True,
) -> Path | Address:
    """Draw some samples of a .beton, or of whatever else `open_samples` opens, as the loader shows them in one epoch.

    Args:
        out: a .png, .pdf or .svg file, here or at an address; it appears whole or not at all.
        samples: how many, from the start of the epoch's order.
        index: these samples of the file instead.
        engine: that decodes the images; of files that are no .beton Pillow does in place of the default.
        force: replace `out`, but no file of a run and nothing that is read here.

    Returns:
        The file written.

    Raises:
        UserError: for files that cannot be read or written, and samples that the file does not hold.
    """
    output = _output(out, force, read_by(beton))
    _check_count(len(index) or samples)
    images = open_samples(beton)
    settings = settings or ViewSettings()
    if engine == DEFAULT_ENGINE:
        engine = engine_for(images, engine)
    with PairedViews(images, 1, engine, settings, seed) as views:
        views.set_epoch(epoch)
        wanted = np.array(index or views.order(epoch)[:samples], np.int64)
        batch = views.batch_of(wanted)
    figure = _figure(images, batch, settings, printable(f"{images.path.name} · seed {seed} · epoch {epoch}"))
    with output.writing() as beside:
        save_picture(figure, beside, dpi=130)
    return output.place


@checked
def draw_run(
    run: Address | str | os.PathLike[str],
    images: Samples | Address | str | os.PathLike[str] | tuple[str, ...],
    out: Address | str | os.PathLike[str],
    *,
    picture: Literal["analysis", "prototypes"] = "analysis",
    samples: int = 6,
    index: tuple[int, ...] = (),
    force: bool = True,
) -> Path | Address:
    """Draw what a run has learnt, by its newest checkpoint or the one named. Each may lie at an address.

    Args:
        images: whatever the run could be trained on: a .beton, a set, a folder, tar shards, or several of these.
        picture: "analysis": for each image what the student sees, the cosine of each predicted token and its target,
            nearest-patch matches coloured by whether geometry agrees, the class token's attention, and the principal
            components of the patch features. "prototypes": the patches nearest to the most used prototypes.
        samples: images of "analysis", from the start of the first epoch's order.
        index: these samples of the file instead.
        force: replace `out`, but no file of a run and nothing that is read here.

    Returns:
        The file written.

    Raises:
        UserError: for files that cannot be read or written, and runs without prototypes.
    """
    # drawing views alone needs no networks
    from fastpmae.pictures.analysis import analyse, prototype_use
    from fastpmae.pictures.figures import draw_analysis, draw_prototypes
    from fastpmae.run.checkpoint import find_checkpoint
    from fastpmae.run.init_weights import check_pretrained
    from fastpmae.run.stored_run import brought_here

    output = _output(out, force, [*read_by(images), *([] if Path(run).is_dir() else [run])])
    _check_count(len(index) or samples)
    images = open_samples(images)
    title = printable(f"{Path(run).name} · {images.path.name}")
    with brought_here(run if isinstance(run, Address) else os.fspath(run)) as here:
        check_pretrained(here)
        checkpoint = find_checkpoint(here)
        if picture == "analysis":
            figure = draw_analysis(analyse(checkpoint, images, samples, index), title)
        else:
            figure = draw_prototypes(prototype_use(checkpoint, images), title)
    with output.writing() as beside:
        save_picture(figure, beside, dpi=130)
    return output.place


def _output(out: Address | str | os.PathLike[str], force: bool, inputs: Sequence[str | os.PathLike[str]]) -> Output:
    place = place_of(out)
    if place.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"{place} must end in .png, .pdf or .svg")
    return open_output(place, force=force, inputs=inputs)


def _check_count(samples: int) -> None:
    if not 1 <= samples <= 64:
        raise UserError(f"{samples} samples make no picture: draw between 1 and 64")


def _figure(images: Samples, batch: Batch, settings: ViewSettings, title: str) -> Figure:
    count = len(batch)
    gap, caption, top, bottom = 0.12, 0.26, 0.78, 0.5
    width = len(PANELS) * CELL + (len(PANELS) + 1) * gap
    height = top + count * (CELL + caption) + bottom
    figure = Figure((width, height), facecolor="white")
    FigureCanvasAgg(figure)
    left = gap / width
    figure.text(left, 1 - 0.2 / height, title, size=12, weight="bold", color=INK, va="center", parse_math=False)
    visible = f"{settings.visible} of {settings.patches} patches visible"
    folds = f"{settings.folds} folds of {' + '.join(map(str, settings.fold_sizes))}"
    figure.text(
        1 - left, 1 - 0.2 / height, f"{settings.image_size} px · {visible} · {folds}",
        size=9, color=QUIET, ha="right", va="center",
    )  # fmt: skip
    for column, name in enumerate(PANELS):
        x = gap + column * (CELL + gap)
        colour = {1: SIMPLE, 2: COMPLEX}.get(column, INK)
        figure.text((x + CELL / 2) / width, 1 - 0.57 / height, name, size=9.5, weight="bold", color=colour, ha="center")
    for row in range(count):
        y = height - top - row * (CELL + caption) - CELL
        captions = _captions(images, batch, row)
        for column, picture in enumerate(_pictures(images, batch, settings, row)):
            x = gap + column * (CELL + gap)
            axes = figure.add_axes((x / width, y / height, CELL / width, CELL / height))
            axes.imshow(picture, interpolation="antialiased")
            axes.set_axis_off()
            if column == 0:
                _draw_boxes(axes, batch, row)
            if captions[column]:
                # close under a wide original, which does not fill its cell
                below = CELL * max(0, 1 - picture.shape[0] / picture.shape[1]) / 2
                words = (x + CELL / 2) / width, (y + below - 0.03) / height
                figure.text(*words, captions[column], size=7.5, color=QUIET, ha="center", va="top", parse_math=False)
    figure.legend(handles=_legend(settings), loc="lower center", ncols=12, fontsize=8.5, frameon=False)
    return figure


def _pictures(images: Samples, batch: Batch, settings: ViewSettings, row: int) -> list[np.ndarray]:
    """The five panels of a row, uint8 [H, W, 3]."""
    simple = batch.simple[row].permute(1, 2, 0).numpy()
    complex_ = batch.complex[row].permute(1, 2, 0).numpy()
    side, patch = settings.image_size, settings.patch_size
    grid = side // patch
    owner = np.full(settings.patches, -1)
    folds = np.split(batch.folds[row].numpy(), np.cumsum(batch.fold_sizes)[:-1])
    for number, fold in enumerate(folds):
        owner[fold] = number
    owner = owner.reshape(grid, grid).repeat(patch, 0).repeat(patch, 1)[..., None]
    hidden = np.array(to_rgb(HIDDEN)) * 255
    student = np.where(owner < 0, simple, hidden)
    tints = np.array([to_rgb(FOLDS[number % len(FOLDS)]) for number in range(settings.folds)]) * 255
    # gray below the tint, or a picture's own colours would mix with the folds'
    luma = simple @ np.array([[0.299], [0.587], [0.114]])
    tinted = np.where(owner < 0, hidden, luma * 0.45 + tints[owner[..., 0]] * 0.55)
    # thin lines between the patches, where a patch has room for them
    if patch >= 8:
        for picture in (student, tinted):
            picture[::patch] = picture[:, ::patch] = 255
    original = decode(images, int(batch.index[row]))
    assert original is not None  # a view of it is there
    return [original, simple, complex_, student.astype(np.uint8), tinted.astype(np.uint8)]


def _draw_boxes(axes: Axes, batch: Batch, row: int) -> None:
    for boxes, colour, style in ((batch.simple_box, SIMPLE, "-"), (batch.complex_box, COMPLEX, (0, (4, 1.5)))):
        top, left, height, width = boxes[row].tolist()
        box = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=colour, lw=2, ls=style)
        box.set_path_effects([withStroke(linewidth=3.6, foreground="white", alpha=0.75)])
        # boxes along the image's edge are drawn whole
        box.set_clip_on(False)
        axes.add_patch(box)


def _captions(images: Samples, batch: Batch, row: int) -> list[str]:
    height, width = batch.source_size[row].tolist()
    label = int(batch.label[row])
    names = images.class_names
    name = short(names[label]) if names and 0 <= label < len(names) else f"label {label}" if label >= 0 else ""
    if len(name) > 24:
        name = name[:23] + "…"

    def crop(view: int) -> list[str]:
        box = batch.boxes[row, view].tolist()
        share = 100 * box[2] * box[3] / (height * width)
        return [f"{share:.0f} % of the area", *(["flipped"] if batch.flips[row, view] else [])]

    choices, factors = batch.choices[row, 1], batch.factors[row, 1]
    words = crop(1)
    words[0] = words[0].replace(" of the area", "")
    words += ["jitter"] if choices[JITTER] else []
    words += ["gray"] if choices[GRAY] else []
    words += [f"blur {factors[SIGMA]:.1f}"] if choices[BLURRED] else []
    words += ["solarise"] if choices[SOLARISED] else []
    first = " · ".join(filter(None, [f"#{int(batch.index[row])}", name, f"{width}×{height}"]))
    return [first, " · ".join(crop(0)), " · ".join(words), "", ""]


def _legend(settings: ViewSettings) -> list[Patch]:
    shown = min(settings.folds, len(FOLDS))
    return [
        Patch(fill=False, edgecolor=SIMPLE, lw=2, label="simple crop"),
        Patch(fill=False, edgecolor=COMPLEX, lw=2, ls=(0, (4, 1.5)), label="complex crop"),
        Patch(color=HIDDEN, label="not seen"),
        *(Patch(color=FOLDS[number], alpha=0.8, label=f"fold {number + 1}") for number in range(shown)),
    ]


def _as_run(run: str, images: Samples) -> tuple[ViewSettings, int, str]:
    """By what a run's loader makes its views of some images: settings, seed and engine."""
    from fastpmae.model.build import view_settings
    from fastpmae.run.checkpoint import find_checkpoint
    from fastpmae.run.init_weights import check_pretrained
    from fastpmae.run.stored_run import brought_here

    with brought_here(run) as here:
        check_pretrained(here)
        config = find_checkpoint(here).phase.config
    return view_settings(config), config.run.seed, engine_for(images, config.data.loader)


def view_command(
    beton: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="F.beton")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.png")],
    samples: int = 6,
    index: tuple[int, ...] = (),
    seed: int = 0,
    epoch: int = 0,
    image_size: int = 224,
    patch_size: int = 16,
    mask_ratio: float = 0.75,
    folds: int = 3,
    complex_recipe: Literal["coin", "t1", "t2"] = "coin",
    engine: Literal["native", "ffcv", "dali", "torch"] = DEFAULT_ENGINE,
    run: str | None = None,
    picture: Literal["views", "analysis", "prototypes"] | None = None,
    force: bool = False,
) -> None:
    """Draw a few samples: the image with both crops, both views, what the student sees, the teachers' folds.

    With --run, what that run has learnt of them instead, or its own views; sizes, seed and engine are then the run's.

    Args:
        beton: The .beton file of the images, a set of them, a folder or tar shards; in quotes several of these, as in
            "a.beton:0.7 b/:0.3". The images, the run and the picture may lie in a store (s3://, gs://, az://).
        out: The picture to write: .png, .pdf or .svg.
        samples: How many samples, from the start of the epoch's order.
        index: Numbers of the samples to draw, instead of the first ones.
        seed: Seed of views, masks and order, as that of a run.
        epoch: The epoch whose views are drawn; with --run, of --picture views alone.
        image_size: Side of the views in pixels.
        patch_size: Side of a patch in pixels.
        mask_ratio: Share of the patches hidden from the student.
        folds: Number of folds that the masked patches are cut into for the teachers.
        complex_recipe: Blur and solarise of the complex view: DINO's first or second, or either by a coin.
        engine: Loader engine that decodes the images.
        run: Run folder or checkpoint: draw what it has learnt of the images.
        picture: What to draw with --run: "analysis" (the default) is predictions, matches, attention and features,
            "prototypes" the patches nearest to the most used prototypes, and "views" what its loader makes of them.
        force: Replace OUT.png if it exists, but no file of a run and nothing that is read here.
    """
    images = sources_named(beton)
    if run is not None and epoch and picture != "views":
        raise UserError(f"--epoch {epoch}: with --run it is --picture views that shows an epoch; leave it out")
    if run is not None and picture != "views":
        wrote = draw_run(run, images, out, picture=picture or "analysis", samples=samples, index=index, force=force)
        tell(f"wrote {wrote}")
        return
    if run is None and picture in ("analysis", "prototypes"):
        raise UserError(f"--picture {picture} needs --run RUN: the run that has learnt something")
    settings = ViewSettings(
        image_size=image_size,
        patch_size=patch_size,
        mask_ratio=mask_ratio,
        folds=folds,
        complex_recipe=complex_recipe,
    )
    decoder: str = engine
    if run is not None:
        settings, seed, decoder = _as_run(run, open_samples(images))
    wrote = draw_views(
        images,
        out,
        samples=samples,
        index=index,
        seed=seed,
        epoch=epoch,
        settings=settings,
        engine=decoder,
        force=force,
    )
    tell(f"wrote {wrote}")


def main() -> int:
    """`fastpmae-view`."""

    def run() -> None:
        refuse_old_flags(sys.argv[1:], {})
        tyro.cli(view_command, prog="fastpmae-view", registry=HELP_TEXTS)

    return exit_with_sentence("fastpmae-view", run)


if __name__ == "__main__":
    sys.exit(main())
