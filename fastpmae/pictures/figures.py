"""Pictures of what a run has analysis: the numbers of `fastpmae.pictures.analysis`, drawn."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch
from matplotlib.patheffects import withStroke

from fastpmae.pictures.analysis import Analysis, PrototypeUse

AGREES, DISAGREES, APART = "#009e73", "#d55e00", "#adb5bd"
INK, QUIET, HIDDEN = "#212529", "#868e96", 222
CELL, GAP, TOP, BOTTOM = 2.15, 0.14, 0.85, 0.62
LINES = 24
"""Matches drawn for an image: more would hide it."""
RANGE = Normalize(-0.2, 1.0)
"""Cosines from the darkest to the brightest."""


def draw_analysis(analysis: Analysis, title: str) -> Figure:
    """A row for each image: what the student sees, how near its predictions are, matches, attention, features."""
    names = [
        "the student sees", "predicted ~ target", "simple view", f"{analysis.config.views.labelling_view} view",
        "class attention", "features, 3 components",
    ]  # fmt: skip
    if analysis.match is None:
        names = [*names[:3], *names[4:]]
    count = len(analysis.batch)
    figure, cells = _grid(count, len(names), title, f"step {analysis.step:,}")
    for axes, name in zip(cells[0], names, strict=True):
        axes.set_title(name, size=9.5, weight="bold", color=INK, pad=6)
    simple = analysis.batch.simple.permute(0, 2, 3, 1).numpy()
    grid = math.isqrt(analysis.attention.shape[1])
    scale = simple.shape[1] // grid
    for row, axes in enumerate(cells):
        folds = analysis.batch.folds[row].numpy()
        hidden = np.zeros(grid * grid, bool)
        hidden[folds] = True
        near = np.full(grid * grid, np.nan)
        near[folds] = analysis.similarity[row].numpy()
        seen = simple[row].copy()
        seen[_wide(hidden, grid, scale)] = HIDDEN
        axes[0].imshow(seen)
        axes[1].imshow(seen)
        axes[1].imshow(_wide(near, grid, scale), cmap="viridis", norm=RANGE)
        axes[1].set_xlabel(f"mean {analysis.similarity[row].mean():.2f}", size=7.5, color=QUIET)
        axes[2].imshow(simple[row])
        if analysis.match is not None:
            axes[3].imshow(getattr(analysis.batch, analysis.config.views.labelling_view)[row].permute(1, 2, 0).numpy())
            axes[3].set_xlabel(
                _draw_matches(figure, axes[2], axes[3], analysis, row, grid, scale), size=7.5, color=QUIET
            )
        axes[-2].imshow(simple[row].mean(axis=2), cmap="gray", vmin=0, vmax=255)
        attention = analysis.attention[row].numpy()
        axes[-2].imshow(_wide(attention / attention.max(), grid, scale), cmap="magma", alpha=0.65)
        axes[-1].imshow(_wide(analysis.colours[row].numpy(), grid, scale))
    height = figure.get_size_inches()[1]
    bar = figure.add_axes((0.06, 0.3 / height, 0.16, 0.09 / height))
    figure.colorbar(ScalarMappable(RANGE, "viridis"), cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=7)
    bar.set_title("cosine of prediction and target", size=7.5, color=QUIET, pad=2)
    if analysis.match is not None:
        meanings = {AGREES: "match shows the same place", DISAGREES: "another place", APART: "no patch could"}
        handles = [Line2D([], [], color=colour, lw=2, label=label) for colour, label in meanings.items()]
        figure.legend(handles=handles, loc="lower right", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_prototypes(use: PrototypeUse, title: str) -> Figure:
    """A row for each of the most used prototypes: the patches nearest to it, with what lies around them."""
    shown, best = use.patches.shape[:2]
    columns = 2 if shown > 6 else 1
    rows = -(-shown // columns)
    words = f"step {use.step:,} · {use.used} of {use.config.network.prototypes} prototypes used by {use.images} images"
    figure, cells = _grid(rows, columns * best, title, words, cell=0.78, block=best)
    for axes in cells.flatten():
        axes.set_visible(False)
    side = use.patches.shape[-1]
    for number in range(shown):
        row, first = number % rows, number // rows * best
        for place in range(best):
            axes = cells[row, first + place]
            axes.set_visible(True)
            axes.imshow(use.patches[number, place].permute(1, 2, 0).numpy())
            # the patch itself is the middle third
            low, high = side / 3 - 0.5, 2 * side / 3 - 0.5
            edge = withStroke(linewidth=2.2, foreground="black", alpha=0.6)
            box = [low, high, high, low, low], [low, low, high, high, low]
            axes.plot(*box, color="white", lw=0.9, path_effects=[edge])
        name = f"{int(use.prototypes[number])}\n{100 * float(use.shares[number]):.1f} %"
        cells[row, first].set_ylabel(name, size=7, color=QUIET, rotation=0, ha="right", va="center", labelpad=4)
    return figure


def _grid(
    rows: int, columns: int, title: str, words: str, cell: float = CELL, block: int = 0
) -> tuple[Figure, np.ndarray]:
    """A figure of square cells without ticks under a line of words.

    Args:
        block: so many columns stand together, with room for a name before the first; 0: all of them.
    """
    block = block or columns
    room, gap = (0.46, 0.05) if cell < 1 else (0.14, GAP)
    bottom, down = (0.1, 0.07) if cell < 1 else (BOTTOM, GAP + 0.12)
    top = 0.45 if cell < 1 else TOP
    width = columns // block * room + columns * cell + (columns + 1) * gap
    height = top + rows * (cell + down) + bottom
    figure = Figure((width, height), facecolor="white")
    FigureCanvasAgg(figure)
    line = 1 - 0.22 / height
    figure.text(GAP / width, line, title, size=12, weight="bold", color=INK, va="center", parse_math=False)
    figure.text(1 - GAP / width, line, words, size=9, color=QUIET, ha="right", va="center")
    cells = np.empty((rows, columns), object)
    for row in range(rows):
        for column in range(columns):
            x = (column // block + 1) * room + gap + column * (cell + gap)
            y = height - top - (row + 1) * cell - row * down
            axes = figure.add_axes((x / width, y / height, cell / width, cell / height))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.xaxis.labelpad = 2
            cells[row, column] = axes
    return figure, cells


def _wide(values: np.ndarray, grid: int, scale: int) -> np.ndarray:
    """One value (or colour) a patch as one a pixel."""
    return values.reshape(grid, grid, *values.shape[1:]).repeat(scale, 0).repeat(scale, 1)


def _draw_matches(figure: Figure, ours: Axes, theirs: Axes, analysis: Analysis, row: int, grid: int, scale: int) -> str:
    """Lines from masked patches to the patches they are matched with, and how many of them agree with geometry."""
    given = analysis.match, analysis.overlap, analysis.reachable
    match, overlap, reachable = (values[row].numpy() for values in given if values is not None)
    folds = analysis.batch.folds[row].numpy()
    # the same patches whatever the match: every so many, along the rows of the view
    places = np.argsort(folds)[:: max(1, -(-len(folds) // LINES))]
    for place in places:
        colour = AGREES if overlap[place] else DISAGREES if reachable[place] else APART
        start, end = (_middle(int(patch), grid, scale) for patch in (folds[place], folds[match[place]]))
        line = ConnectionPatch(start, end, "data", "data", axesA=ours, axesB=theirs, color=colour, lw=0.9, alpha=0.85)
        figure.add_artist(line)
        ours.plot(*start, "o", color=colour, ms=2.5)
        theirs.plot(*end, "o", color=colour, ms=2.5)
    if not reachable.any():
        return "the crops lie apart"
    return f"{overlap[reachable].mean():.0%} of {reachable.sum()} in the same place"


def _middle(patch: int, grid: int, scale: int) -> tuple[float, float]:
    return (patch % grid + 0.5) * scale - 0.5, (patch // grid + 0.5) * scale - 0.5
