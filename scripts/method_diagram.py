"""Draws docs/method.svg, the diagram of the method.

python scripts/method_diagram.py      writes the picture anew
"""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

PICTURE = Path(__file__).resolve().parents[1] / "docs/method.svg"
WIDTH, HEIGHT, LINE = 1230, 480, 17
COLOURS = {"data": "#eceff1", "student": "#cfe2ff", "teacher": "#ffe5b4", "label": "#f3e3ff", "loss": "#d4edda"}

Point = tuple[float, float]


class Box(NamedTuple):
    """A box with a title and lines below it, about its centre."""

    x: float
    y: float
    width: float
    kind: str
    title: str
    lines: Sequence[str] = ()

    @property
    def height(self) -> float:
        return LINE * (1 + len(self.lines)) + 18


BOXES = (
    Box(62, 240, 106, "data", "image", ["decoded once"]),
    Box(220, 130, 150, "data", "simple view", ["MAE's crop and flip"]),
    Box(220, 400, 150, "data", "complex view", ["DINO's crop and flip,", "colours, blur, solarise"]),
    Box(465, 60, 190, "teacher", "reconstruction teacher", ["masked patches, K folds"]),
    Box(465, 200, 190, "student", "student encoder", ["visible patches only"]),
    Box(465, 400, 190, "teacher", "labelling teacher", ["masked patches, K folds"]),
    Box(700, 60, 140, "teacher", "normalise", ["each token (2)"]),
    Box(700, 200, 140, "student", "decoder", ["and mask tokens"]),
    Box(700, 400, 140, "teacher", "projection head", ["prototype logits"]),
    Box(900, 200, 150, "student", "projection head", ["prototype logits"]),
    Box(900, 300, 150, "label", "nearest patch", ["in feature space"]),
    Box(900, 400, 150, "label", "Sinkhorn", ["pseudo labels"]),
    Box(1120, 60, 200, "loss", "L_m (1)", ["1 - cosine of the tokens"]),
    Box(1120, 200, 200, "loss", "L_c (4)", ["class token, mean over folds"]),
    Box(1120, 300, 200, "loss", "L_p (3)", ["masked patches"]),
    Box(1120, 400, 200, "loss", "L (5)", ["weighted sum of all three"]),
)

ARROWS: tuple[Sequence[Point], ...] = (
    [(115, 240), (130, 240), (130, 130), (145, 130)],
    [(115, 240), (130, 240), (130, 400), (145, 400)],
    [(295, 130), (325, 130), (325, 60), (370, 60)],
    [(295, 130), (325, 130), (325, 200), (370, 200)],
    [(295, 400), (370, 400)],
    [(560, 60), (630, 60)],
    [(770, 60), (1020, 60)],
    [(560, 200), (630, 200)],
    [(770, 190), (795, 190), (795, 75), (1020, 75)],
    [(770, 200), (825, 200)],
    [(770, 210), (795, 210), (795, 290), (825, 290)],
    [(560, 390), (600, 390), (600, 310), (825, 310)],
    [(560, 400), (630, 400)],
    [(770, 400), (825, 400)],
    [(975, 200), (1020, 200)],
    [(975, 210), (990, 210), (990, 285), (1020, 285)],
    [(975, 300), (1020, 300)],
    [(975, 400), (1004, 400), (1004, 315), (1020, 315)],
    [(1004, 315), (1004, 215), (1020, 215)],
)

AVERAGES: tuple[tuple[Sequence[Point], Point, str], ...] = (
    ([(465, 173), (465, 87)], (475, 134), "moving average, each epoch"),
    ([(465, 227), (465, 373)], (455, 345), "moving average, each step"),
)


def drawing() -> Iterator[str]:
    """The lines of the picture."""
    font = 'font-family="sans-serif" font-size="13"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {font}>'
    yield "<title>Pseudo-MAE: two views, a student, two teachers, three losses</title>"
    size = 'viewBox="0 0 10 10" refX="10" refY="5" markerWidth="8" markerHeight="8"'
    yield f'<defs><marker id="tip" {size} orient="auto"><path d="M0 0L10 5L0 10z" fill="#37474f"/></marker></defs>'
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    for points in ARROWS:
        yield line(points)
    for points, (x, y), words in AVERAGES:
        yield line(points, ' stroke-dasharray="5 4"')
        anchor = "start" if x > 465 else "end"
        yield f'<text x="{x:g}" y="{y:g}" font-size="12" text-anchor="{anchor}" fill="#37474f">{escape(words)}</text>'
    for box in BOXES:
        left, top = box.x - box.width / 2, box.y - box.height / 2
        size = f'width="{box.width:g}" height="{box.height:g}"'
        yield f'<rect x="{left:g}" y="{top:g}" {size} rx="6" fill="{COLOURS[box.kind]}" stroke="#607d8b"/>'
        for number, words in enumerate((box.title, *box.lines)):
            weight = "" if number else ' font-weight="bold"'
            y = top + 9 + LINE * (number + 0.75)
            yield f'<text x="{box.x:g}" y="{y:g}" text-anchor="middle"{weight} fill="#212121">{escape(words)}</text>'
    yield "</svg>"


def line(points: Sequence[Point], more: str = "") -> str:
    """A bent arrow."""
    way = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{way}" fill="none" stroke="#37474f" marker-end="url(#tip)"{more}/>'


def picture() -> str:
    """The whole file."""
    return "\n".join(drawing()) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture())
