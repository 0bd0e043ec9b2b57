"""`fastpmae-eval predict`: what a trained segmenter or detector makes of a user's own images, as files and pictures."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastpmae.evaluate.dense.arguments import Predict
from fastpmae.evaluate.dense.average_precision import Found
from fastpmae.evaluate.dense.box_pictures import Sight, draw_boxes
from fastpmae.evaluate.dense.labelled import Mask, Pixels
from fastpmae.evaluate.dense.loading import load_network
from fastpmae.evaluate.dense.mask_pictures import Overlay, class_colours, write_overlays
from fastpmae.evaluate.dense.pairs import IMAGES, files_below
from fastpmae.evaluate.dense.trained import TrainedDetector, TrainedSegmenter, pixels_of
from fastpmae_loaders.cli.outputs import check_no_run_file, check_output
from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.cli.terminal import tell
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.printable import printable
from fastpmae_loaders.values import local_path

CLASSES = "classes.json"
"""The classes of label maps by their numbers, as `--classes` takes them."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """An image, and where its results go."""

    image: Path
    picture: Path
    result: Path


def run_predict(command: Predict) -> None:
    """`fastpmae-eval predict`.

    Raises:
        UserError: where there is no such network or image, or a result is there already.
    """
    if not command.images:
        raise UserError("name images, or folders of them, after the network")
    network = load_network(local_path(command.weights), command.device)
    ending = "labels.png" if isinstance(network, TrainedSegmenter) else "objects.json"
    places = _places(command.images, command.out, ending)
    outputs = [path for place in places for path in (place.picture, place.result)]
    names = {str(number): name for number, name in enumerate(network.names)}
    writes_names = isinstance(network, TrainedSegmenter) and not _says(command.out / CLASSES, names)
    if writes_names:
        outputs.append(command.out / CLASSES)
    _check(outputs, command)
    progress = Progress(live=True)
    bad = []
    with progress.count(len(places), "images"):
        for place in places:
            try:
                pixels = pixels_of(place.image)
            except UserError as error:  # one of thousands does not end the others
                bad.append(str(error))
            else:
                place.picture.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(network, TrainedSegmenter):
                    _segment(network, pixels, place, command.force)
                else:
                    _detect(network, pixels, place, command.force)
            progress.advance()
    if len(bad) == len(places):
        raise UserError(
            bad[0] if len(bad) == 1 else f"none of the {len(bad):,} images can be read; the first: {bad[0]}"
        )
    if writes_names:
        _write_json(command.out / CLASSES, names, command.force)
    for sentence in bad:
        tell(f"warning: left out: {sentence}")
    done = len(places) - len(bad)
    tell(f"wrote NAME-overlay.png and NAME-{ending} of {done:,} images into {printable(str(command.out))}")


def _segment(segmenter: TrainedSegmenter, pixels: Pixels, place: _Place, force: bool) -> None:
    mask = segmenter(pixels)
    with atomic_write(place.result, force) as beside:
        _label_map(mask, len(segmenter.names)).save(beside, format="PNG")
    shown = [Overlay(place.image.name, pixels, mask)]
    with atomic_write(place.picture, force) as beside:
        write_overlays(beside, shown, segmenter.names, f"{pixels.shape[1]} x {pixels.shape[0]} pixels")


def _label_map(mask: Mask, classes: int) -> Image.Image:
    """The numbers of the classes, in the colours of the pictures where a palette has room for them."""
    if classes > 256:
        return Image.fromarray(mask.astype(np.uint16))
    found = Image.fromarray(mask.astype(np.uint8))
    found.putpalette(class_colours(classes).tobytes())
    return found


def _detect(detector: TrainedDetector, pixels: Pixels, place: _Place, force: bool) -> None:
    found = detector(pixels)
    said = {"width": pixels.shape[1], "height": pixels.shape[0], "objects": objects_of(found, detector.names)}
    _write_json(place.result, said, force)
    with atomic_write(place.picture, force) as beside:
        title = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
        draw_boxes(beside, [Sight(place.image.name, pixels, found)], detector.names, title)


def objects_of(found: Found, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """What was found as JSON tells it, the surest first: `label` from 1 on, `name`, `score`, `box` (left, top, right,
    bottom in pixels), and COCO's `segmentation` where there are masks."""
    rows: list[dict[str, Any]] = []
    for place in np.argsort(-np.asarray(found.scores), kind="stable").tolist():
        label = found.labels[place]
        box = [round(float(corner), 2) for corner in found.boxes[place]]
        row = {"label": label, "name": names[label - 1], "score": round(found.scores[place], 4), "box": box}
        if found.masks is not None:
            size, counts = found.masks[place]["size"], found.masks[place]["counts"]
            text = counts.decode("ascii") if isinstance(counts, bytes) else counts
            row["segmentation"] = {"size": [int(side) for side in size], "counts": text}
        rows.append(row)
    return rows


def _write_json(path: Path, said: Any, force: bool) -> None:
    with atomic_write(path, force) as beside:
        beside.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def _says(path: Path, names: dict[str, str]) -> bool:
    """Whether the file is there and says these classes, as that of other images by the same network does."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) == names
    except (OSError, ValueError, RecursionError):
        return False


def _places(given: Iterable[Path], out: Path, ending: str) -> list[_Place]:
    """The images that a user names, and those below the folders among them but for results; these lie as the images
    do."""
    places: dict[Path, _Place] = {}
    for path in map(local_path, given):
        if not path.exists():
            raise UserError(f"{printable(str(path))} does not exist")
        images = _images_below(path, out) if path.is_dir() else [path]
        if not images:
            raise UserError(f"{printable(str(path))} holds no images ({', '.join(IMAGES)})")
        for image in images:
            stem = (image.relative_to(path) if path.is_dir() else Path(image.name)).with_suffix("")
            if stem in places:
                both = f"{printable(str(places[stem].image))} and {printable(str(image))}"
                raise UserError(f"{both} would have results of one name: give one at a time")
            picture, result = (out / stem.with_name(f"{stem.name}-{end}") for end in ("overlay.png", ending))
            places[stem] = _Place(image, picture, result)
    results = {path for place in places.values() for path in (place.picture, place.result)}
    named = set(given)
    return [place for place in places.values() if place.image in named or place.image not in results]


def _images_below(folder: Path, out: Path) -> list[Path]:
    """The images below a folder, without what lies in a folder for results within it."""
    whole, within = folder.resolve(), out.resolve()
    inside = within != whole and within.is_relative_to(whole)
    found = sorted(files_below(folder, IMAGES))
    return [path for path in found if not (inside and (whole / path.relative_to(folder)).is_relative_to(within))]


def _check(outputs: Iterable[Path], command: Predict) -> None:
    """See before any work that nothing is in the way, but for results where --force is given."""
    if command.out.exists() and not command.out.is_dir():
        raise UserError(f"--out {printable(str(command.out))} is a file; name a folder")
    for path in outputs:
        if path.parent.is_dir():
            check_output(path, force=command.force, inputs=[image for image in command.images if image.is_file()])
        else:
            check_no_run_file(path)
