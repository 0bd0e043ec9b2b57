"""Which objects of an image were found, and which detections are right: one by one, as a picture shows them."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from fastpmae.evaluate.dense.average_precision import Found
from fastpmae.evaluate.dense.labelled import Objects

SHOWN_SCORE = 0.3
"""Boxes of a lower score are not drawn, and are no false alarm here."""
LEAST_OVERLAP = 0.5
"""IoU from which on a detection is the object."""


@dataclass(frozen=True)
class Matches:
    """The objects of an image against its detections of a score that is shown.

    Attributes:
        shown: the places of these detections, the surest first.
        right: which of them are an object that none before them is, of the class, at an IoU of 0.5 or more.
        in_crowd: which of the others lie in a crowd of the class by half of their area: no false alarms.
        found: which of the objects such a detection is.
        crowd: which of the objects are crowds, and so are no misses.
    """

    shown: Int[np.ndarray, " shown"]
    right: Bool[np.ndarray, " shown"]
    in_crowd: Bool[np.ndarray, " shown"]
    found: Bool[np.ndarray, " objects"]
    crowd: Bool[np.ndarray, " objects"]

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall in percent; NaN where there is nothing to find and nothing shown."""
        both = int((~self.crowd).sum()) + int((~self.in_crowd).sum())
        return 200 * int(self.right.sum()) / both if both else np.nan


def matches_of(objects: Objects, found: Found) -> Matches:
    """Compare the detections of an image with its objects, from the surest detection on."""
    scores = np.asarray(found.scores, np.float64)
    shown = np.argsort(-scores, kind="stable")[: int((scores >= SHOWN_SCORE).sum())]
    hit, right, in_crowd = np.zeros(len(objects), bool), np.zeros(len(shown), bool), np.zeros(len(shown), bool)
    for place, number in enumerate(shown.tolist()):
        of_class = objects.labels == found.labels[number]
        overlaps, covered = _overlaps(objects.boxes, found.boxes[number])
        overlaps = np.where(of_class & ~objects.crowd & ~hit, overlaps, 0)
        if overlaps.max(initial=0) >= LEAST_OVERLAP:
            hit[overlaps.argmax()] = right[place] = True
        else:
            in_crowd[place] = bool((of_class & objects.crowd & (covered >= LEAST_OVERLAP)).any())
    return Matches(shown, right, in_crowd, hit, objects.crowd)


def _overlaps(
    boxes: Float[np.ndarray, "boxes 4"], box: Float[np.ndarray, " 4"]
) -> tuple[Float[np.ndarray, " boxes"], Float[np.ndarray, " boxes"]]:
    """IoU of a box with others, and the share of it that each of them covers."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    common = sides.clip(0).prod(axis=1)
    areas, own = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), (box[2:] - box[:2]).prod()
    return common / np.maximum(areas + own - common, 1e-9), common / np.maximum(own, 1e-9)
