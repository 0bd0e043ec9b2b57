"""torchvision's region proposals and box heads, with draws and means that do not depend on the ranks, and GIoU."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, generalized_box_iou_loss
from torchvision.ops.poolers import initLevelMapper

from fastpmae.distributed.ranks import mean_over_ranks

Targets = list[dict[str, Tensor]]
"""Of each image `boxes` float [n, 4], `labels` int64 [n] from 1 on, and with masks `masks` uint8 [n, height, width]."""
CANONICAL_LEVEL = 4


@contextlib.contextmanager
def _seeded(key: int) -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(key)
        yield


class KeyedSampler(BalancedPositiveNegativeSampler):
    """torchvision's choice of anchors or proposals to train on, drawn for each image from a key of its own.

    Attributes:
        keys: one for each image of the next pass.
    """

    keys: Sequence[int] = ()

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positive, negative = [], []
        for key, each in zip(self.keys, matched_idxs, strict=True):
            with _seeded(key):
                (more,), (less,) = super().__call__([each])
            positive.append(more)
            negative.append(less)
        return positive, negative


class ExactAnchors(AnchorGenerator):
    """torchvision's anchors at the maps' own strides, which need not be whole: 3.5 pixels for patches of 14.

    torchvision rounds a stride down, and anchors of a wide image would drift by a seventh of it.
    """

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        height, width = image_list.tensors.shape[-2:]
        first = feature_maps[0]
        sizes: Any = [each.shape[-2:] for each in feature_maps]
        strides: Any = [
            [first.new_tensor(extent / count) for extent, count in zip((height, width), size, strict=True)]
            for size in sizes
        ]
        self.set_cell_anchors(first.dtype, first.device)
        return [torch.cat(self.grid_anchors(sizes, strides))] * len(image_list.image_sizes)


class ExactRoIAlign(MultiScaleRoIAlign):
    """torchvision's RoIAlign at the maps' own scales, which it takes for powers of two. A box that is no number is a
    point at 0: torchvision's kernel would end the process there.

    Args:
        strides: of the maps that are read, in pixels.
    """

    def __init__(self, names: list[str], output_size: int, strides: Sequence[float]):
        super().__init__(names, output_size, 2)
        self.scales = [1 / stride for stride in strides]
        finest = 2  # of strides 4, 8, 16, 32, or about that
        self.map_levels = initLevelMapper(finest, finest + len(strides) - 1, canonical_level=CANONICAL_LEVEL)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        sound = [torch.where(each.isfinite().all(dim=1, keepdim=True), each, 0.0) for each in boxes]
        return super().forward({name: each.float() for name, each in x.items()}, sound, image_shapes)


class ExactRPNHead(RPNHead):
    """torchvision's head of proposals, which answers in fp32 under autocast too.

    torchvision's coder casts anchors and boxes to the dtype of the offsets: bf16 has steps of 4 pixels at 700.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, offsets = super().forward(x)
        return [each.float() for each in logits], [each.float() for each in offsets]


class ExactBoxPredictor(FastRCNNPredictor):
    """torchvision's classes and offsets of boxes, in fp32 under autocast too (see `ExactRPNHead`)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, offsets = super().forward(x)
        return logits.float(), offsets.float()


class ExactMaskPredictor(MaskRCNNPredictor):
    """torchvision's masks of boxes, in fp32 under autocast too."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


class Proposals(RegionProposalNetwork):
    """torchvision's region proposals; the losses are means over the anchors of all ranks' images.

    Attributes:
        group: of the ranks that train together.
    """

    group: dist.ProcessGroup | None = None

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy of the sampled anchors, and smooth L1 of the positive ones' boxes."""
        chosen = self.fg_bg_sampler(labels)
        positive, negative = (torch.where(torch.cat(each))[0] for each in chosen)
        sampled = torch.cat([positive, negative])
        count = _count_over_ranks(sampled, self.group)
        truth, wanted = torch.cat(labels)[sampled], torch.cat(list(regression_targets))[positive]
        box_loss = F.smooth_l1_loss(pred_bbox_deltas[positive], wanted, beta=1 / 9, reduction="sum")
        loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], truth, reduction="sum")
        return loss / count, box_loss / count


class BoxHeads(RoIHeads):
    """torchvision's heads; the losses are means over the boxes of all ranks' images, that of boxes is GIoU if wanted.

    Attributes:
        group: of the ranks that train together.
        box_loss: "giou" or "smooth_l1".
        box_loss_weight: of that loss.
    """

    group: dist.ProcessGroup | None = None
    box_loss: str = "giou"
    box_loss_weight: float = 10.0

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in an evaluation, losses in training."""
        if targets is None or not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        proposals, matched, labels, encoded = self.select_training_samples(proposals, targets)
        read = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, deltas = self.box_predictor(read)
        losses = self._box_losses(logits, deltas, proposals, labels, encoded)
        if self.mask_roi_pool is not None and self.mask_head is not None and self.mask_predictor is not None:
            positive = [torch.where(each > 0)[0] for each in labels]
            boxes = [each[some] for each, some in zip(proposals, positive, strict=True)]
            indices = [each[some] for each, some in zip(matched, positive, strict=True)]
            masks = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
            truths, classes = ([target[name] for target in targets] for name in ("masks", "labels"))
            mean = maskrcnn_loss(masks, boxes, truths, classes, indices)
            share = len(masks) / _count_over_ranks(masks[:, 0, 0, 0], self.group)
            losses["loss_mask"] = mean * share
        return [], losses

    def _box_losses(
        self, logits: Tensor, deltas: Tensor, proposals: list[Tensor], labels: list[Tensor], encoded: Any
    ) -> dict[str, Tensor]:
        classes = torch.cat(labels)
        count = _count_over_ranks(classes, self.group)
        positive = torch.where(classes > 0)[0]
        own = deltas.view(len(classes), -1, 4)[positive, classes[positive]]
        wanted = torch.cat(list(encoded))[positive]
        if self.box_loss == "giou":
            boxes = torch.cat(proposals)[positive]
            loss = giou_loss(*(self.box_coder.decode_single(each, boxes) for each in (own, wanted)))
        else:
            loss = F.smooth_l1_loss(own, wanted, beta=1 / 9, reduction="sum")
        return {
            "loss_classifier": F.cross_entropy(logits, classes, reduction="sum") / count,
            "loss_box_reg": self.box_loss_weight * loss / count,
        }


def giou_loss(predicted: Float[Tensor, "boxes 4"], true: Float[Tensor, "boxes 4"]) -> Float[Tensor, ""]:
    """The sum of 1 - GIoU of pairs of boxes; their corners carry the gradient (torchvision's `ops`)."""
    return generalized_box_iou_loss(predicted, true, reduction="sum")


def _count_over_ranks(each: Tensor, group: dist.ProcessGroup | None) -> Float[Tensor, ""]:
    """How many there are on a rank on average, at least one: by it the sum of a rank's losses becomes the mean over all
    ranks, as soon as gradients are averaged."""
    count = torch.tensor(float(len(each)), device=each.device)
    return mean_over_ranks(count, group).clamp(min=1.0 if group is None else 1.0 / group.size())
