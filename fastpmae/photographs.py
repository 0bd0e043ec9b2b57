"""Demo images: labelled JPEG crops of the photographs that scikit-image and scikit-learn carry in their wheels.

Every photograph is a class. Its height is scaled to (at least) four cells of 128 pixels, and one cell of each row is
kept for validation: validation crops lie within these cells, training crops touch none of them, so that no pixel is
in both sets. The same version of Pillow writes the same bytes everywhere.
"""

import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from fastpmae_loaders.errors import UserError

# class name: (package, file). Only files of the wheels, nothing that scikit-image would download.
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "bricks": ("skimage", "data/brick.png"),
    "cameraman": ("skimage", "data/camera.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "dahlia": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "pavilion": ("sklearn", "datasets/images/china.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}

CELL = 128
ROWS = 4
# Which of four columns each row's validation cell stands in: one a row and a column, and none in a corner, where
# photographs tend to be empty.
COLUMNS = (1, 3, 0, 2)
SMALLEST = 96

Box = tuple[int, int, int, int]


def write_demo_images(folder: Path, train: int = 180, validation: int = 40) -> None:
    """Write `folder`/train and `folder`/validation, a folder of JPEG crops (96 to 128 pixels a side) for each class.

    Args:
        folder: where; what is there already is overwritten.
        train: crops of each of the 16 photographs to train on.
        validation: crops of each to validate on.

    Raises:
        UserError: when a photograph is missing from the installed packages.
    """
    for name in PHOTOGRAPHS:
        photograph, random_numbers = open_photograph(name), random.Random(name)
        for part, count in (("train", train), ("validation", validation)):
            into = folder / part / name
            into.mkdir(parents=True, exist_ok=True)
            boxes = crop_boxes(photograph.size, part, count, random_numbers)
            for number, box in enumerate(boxes):
                photograph.crop(box).save(into / f"{name}-{number:04d}.jpg", quality=90)


def open_photograph(name: str) -> Image.Image:
    """A photograph in RGB, scaled so that its shorter side is four cells long."""
    package, file = PHOTOGRAPHS[name]
    spec = find_spec(package)
    path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
    if path is None or not path.exists():
        raise UserError(
            f"the demo's photograph {package}/{file} is not installed: "
            "run `pip install scikit-image scikit-learn` and try again"
        )
    with Image.open(path) as image:
        scale = CELL * ROWS / min(image.size)
        width, height = (max(CELL * ROWS, round(side * scale)) for side in image.size)
        return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def validation_cells(size: tuple[int, int]) -> list[Box]:
    """The boxes (left, top, right, bottom) of a photograph that are kept for validation, one for each row of cells."""
    width, height = size
    columns = width // CELL
    cells = []
    for row in range(height // CELL):
        column = int((COLUMNS[row % ROWS] + 0.5) / ROWS * columns)
        left, top = column * width // columns, row * CELL
        cells.append((left, top, (column + 1) * width // columns, top + CELL))
    return cells


def crop_boxes(size: tuple[int, int], part: str, count: int, random_numbers: random.Random) -> Iterator[Box]:
    """Boxes of 96 to 128 pixels a side: within the validation cells, or touching none of them ("train")."""
    cells = validation_cells(size)
    for number in range(count):
        if part == "validation":
            yield _box_within(cells[number % len(cells)], random_numbers)
        else:
            box = _box_within((0, 0, *size), random_numbers)
            while any(overlap(box, cell) for cell in cells):
                box = _box_within((0, 0, *size), random_numbers)
            yield box


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes share a pixel."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _box_within(bounds: Box, random_numbers: random.Random) -> Box:
    left, top, right, bottom = bounds
    # random() and not randrange(): only the former gives the same numbers in every Python
    width, height = (SMALLEST + int(random_numbers.random() * (CELL - SMALLEST + 1)) for _ in range(2))
    x = left + int(random_numbers.random() * (right - left - width + 1))
    y = top + int(random_numbers.random() * (bottom - top - height + 1))
    return x, y, x + width, y + height
