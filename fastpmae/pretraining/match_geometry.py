"""Nearest-patch matches held against geometry: where in the original image the two patches lie.

Both views are crops of one image whose boxes and flips are known, so each patch of a view is a rectangle of source
pixels. Rectangles are compared in exact integer arithmetic: a crop of h pixels under n rows of patches has its lines
at multiples of h / n, so all places are taken n-fold.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fastpmae.config import Config
from fastpmae.run.device_metrics import Figures, to_host
from fastpmae_kernels.match import fold_of
from fastpmae_loaders import Batch

MOST_PAIRS = 256 * 147**2
"""So many pairs of masked patches are looked at, those of 256 images of 224 pixels in patches of 16: they tell as much
as all of them, and at 1,024 pixels all would take gigabytes."""
VIEWS = {"simple": 0, "complex": 1}


def match_geometry(batch: Batch, match: Int[Tensor, "batch masked"], config: Config) -> dict[str, float]:
    """How often the matched teacher patch shows a part of what the student's patch shows.

    A student's masked patch is *reachable* where at least one of the teacher's patches that it may be matched with
    (those of the image, or of its fold) overlaps it in the original image: crops may lie apart.

    Args:
        match: the place among the masked patches of each masked patch's match, as `nearest_patch` gives it.

    Returns:
        `match_reachable`: the share of the masked patches that are reachable. Of those, `match_overlap`: the share
        whose match overlaps them, and what two matches without a network would have: `match_chance`, one drawn at
        random, which is the mean share of the candidates that overlap, and `match_same_place`, the patch at the same
        place of the other view. The latter three are left out where nothing is reachable.
    """
    return to_host(geometry_figures(batch, match, config))()


def geometry_figures(batch: Batch, match: Int[Tensor, "batch masked"], config: Config) -> Figures:
    """The figures of `match_geometry`, without waiting for the device."""
    match = match[: max(1, MOST_PAIRS // match.shape[1] ** 2)]
    hits, candidates = masked_overlaps(batch, config, len(match))
    share = (hits & candidates).sum(dim=2) / candidates.sum(dim=1)
    reachable = share > 0
    matched = hits.gather(2, match.unsqueeze(2)).squeeze(2)
    same_place = hits.diagonal(dim1=1, dim2=2)
    every = reachable.numel()

    def named(found: list[float], _: object) -> dict[str, float]:
        count, *rest = found
        shares = dict(zip(("match_overlap", "match_chance", "match_same_place"), rest, strict=True))
        return {"match_reachable": count / every} | (
            {name: total / count for name, total in shares.items()} if count else {}
        )

    sums = [reachable.sum(), (matched & reachable).sum(), share.sum(dtype=torch.float64), same_place.sum()]
    sums = [each.double() for each in sums]
    return Figures(torch.stack(sums), named)


def masked_overlaps(
    batch: Batch, config: Config, most: int | None = None
) -> tuple[Bool[Tensor, "batch masked masked"], Bool[Tensor, "masked masked"]]:
    """Which of the labelling teacher's masked patches overlap each of the student's, in fold order.

    Args:
        most: images of the batch that are looked at, from its start; all of them by default.

    Returns:
        The overlaps, and which patches may be matched: any two of an image, or those of the same fold.
    """
    rows = round((batch.visible.shape[1] + batch.folds.shape[1]) ** 0.5)
    student, teacher = (
        patch_rectangles(batch.boxes[:most, view], batch.flips[:most, view], batch.folds[:most], rows)
        for view in (0, VIEWS[config.views.labelling_view])
    )
    hits = overlaps(student, teacher)
    candidates = torch.ones_like(hits[0])
    if config.loss.match_scope == "fold":
        fold = fold_of(batch.fold_sizes, hits.device)
        candidates = fold[:, None] == fold
    return hits, candidates


def patch_rectangles(
    boxes: Int[Tensor, "batch 4"], flips: Bool[Tensor, " batch"], ids: Int[Tensor, "batch patches"], rows: int
) -> Int[Tensor, "batch patches 4"]:
    """Top, left, bottom, right of patches in the original image, in source pixels times `rows`.

    Args:
        boxes: top, left, height, width of each view's crop in source pixels.
        flips: whether the view was mirrored left to right.
        ids: the patches' numbers in the view, row by row.
        rows: patches along a side of the view.
    """
    top, left, height, width = (boxes[:, None, place].long() for place in range(4))
    down, across = ids // rows, ids % rows
    across = torch.where(flips[:, None], rows - 1 - across, across)
    top, left = top * rows + down * height, left * rows + across * width
    return torch.stack([top, left, top + height, left + width], dim=2)


def overlaps(
    one: Int[Tensor, "batch ones 4"], other: Int[Tensor, "batch others 4"]
) -> Bool[Tensor, "batch ones others"]:  # fmt: skip
    """Which rectangles share an area; a common edge is none."""
    hits = torch.ones((), dtype=torch.bool, device=one.device)
    for begin, end in ((0, 2), (1, 3)):
        first, second = one[..., begin] < one[..., end], other[..., begin] < other[..., end]
        hits = hits & first.unsqueeze(2) & second.unsqueeze(1)
        hits = hits & (one[..., begin].unsqueeze(2) < other[..., end].unsqueeze(1))
        hits = hits & (other[..., begin].unsqueeze(1) < one[..., end].unsqueeze(2))
    return hits
