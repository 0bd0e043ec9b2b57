"""Faster and Mask R-CNN on a plain ViT, put together from torchvision's parts."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fastpmae.evaluate.dense.proposals import (
    BoxHeads,
    ExactAnchors,
    ExactBoxPredictor,
    ExactMaskPredictor,
    ExactRoIAlign,
    ExactRPNHead,
    KeyedSampler,
    Proposals,
    Targets,
)
from fastpmae.evaluate.dense.pyramid import LEVELS, Pyramid, TappedViT
from fastpmae.evaluate.dense.recipe import DetectConfig

FULLY_CONNECTED = 1024
NAMES = [str(level) for level in range(LEVELS)]


class FourMaps(nn.Module):
    """Maps of four blocks at four strides, joined from the coarsest down (FPN), and a fifth of twice the stride."""

    def __init__(self, dim: int, patch_size: int, channels: int):
        super().__init__()
        self.resize = Pyramid(dim, patch_size)
        self.fpn = FeaturePyramidNetwork([dim] * LEVELS, channels, LastLevelMaxPool())

    def forward(self, maps: list[Float[Tensor, "batch dim rows columns"]]) -> dict[str, Tensor]:
        return self.fpn(OrderedDict(zip(NAMES, self.resize(maps), strict=True)))


class SimplePyramid(nn.Module):
    """ViTDet's pyramid: the last block's map at four strides, each on its own through two convolutions with LayerNorm,
    and a fifth of twice the stride (Li et al., 2022). Its windowed attention is not here: every block sees all."""

    def __init__(self, dim: int, patch_size: int, channels: int):
        super().__init__()
        # its transposed convolutions halve the channels there, and keep them here
        self.resize = Pyramid(dim, patch_size, norm=LayerNorm2d)
        self.reduce = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for _ in range(LEVELS)
        )
        self.coarser = LastLevelMaxPool()

    def forward(self, maps: list[Float[Tensor, "batch dim rows columns"]]) -> dict[str, Tensor]:
        found = [reduce(each) for reduce, each in zip(self.reduce, self.resize([maps[-1]] * LEVELS), strict=True)]
        found, names = self.coarser(found, found, list(NAMES))
        return OrderedDict(zip(names, found, strict=True))


class Detector(nn.Module):
    """A ViT, its pyramid, region proposals, and heads for boxes and (where they are wanted) masks.

    Args:
        classes: of objects; the background is one more.
        masks: predict a mask of each box.
    """

    def __init__(self, backbone: TappedViT, classes: int, config: DetectConfig, *, masks: bool):
        super().__init__()
        simple = config.pyramid == "simple"
        norm = LayerNorm2d if simple else nn.BatchNorm2d
        dim, patch_size, channels = backbone.dim, backbone.patch_size, config.channels
        self.backbone = backbone
        self.pyramid = (SimplePyramid if simple else FourMaps)(dim, patch_size, channels)
        strides = [patch_size / scale for scale in self.pyramid.resize.scales]
        anchors = ExactAnchors(
            tuple((32 * 2**level,) for level in range(LEVELS + 1)), ((0.5, 1.0, 2.0),) * (LEVELS + 1)
        )
        self.rpn = Proposals(
            anchors,
            ExactRPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2 if simple else 1),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * config.proposals, "testing": config.proposals},
            post_nms_top_n={"training": config.proposals, "testing": config.proposals},
            nms_thresh=0.7,
        )
        if config.box_head == "conv":
            head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [FULLY_CONNECTED], norm_layer=norm)
        else:
            head = FastRCNNConvFCHead((channels, 7, 7), [], [FULLY_CONNECTED, FULLY_CONNECTED])
        pool = partial(ExactRoIAlign, NAMES, strides=strides)
        self.roi_heads = BoxHeads(
            pool(output_size=7),
            head,
            ExactBoxPredictor(FULLY_CONNECTED, classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=config.boxes_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_threshold,
            detections_per_img=config.detections,
            mask_roi_pool=pool(output_size=14) if masks else None,
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1, norm if simple else None) if masks else None,
            mask_predictor=ExactMaskPredictor(channels, channels, classes + 1) if masks else None,
        )
        self.roi_heads.box_loss, self.roi_heads.box_loss_weight = config.box_loss, config.box_loss_weight
        self.rpn.fg_bg_sampler = KeyedSampler(256, 0.5)
        self.roi_heads.fg_bg_sampler = KeyedSampler(config.boxes_per_image, 0.25)

    @property
    def new_parts(self) -> list[nn.Module]:
        """What does not come out of pretraining."""
        return [self.pyramid, self.rpn, self.roi_heads]

    def share(self, group: dist.ProcessGroup | None) -> None:
        """Take the means of the losses over the ranks of a group."""
        self.rpn.group = self.roi_heads.group = group

    def set_keys(self, proposals: Sequence[int], boxes: Sequence[int]) -> None:
        """What the next pass's choice of anchors and of boxes is drawn from, a number for each image."""
        for sampler, keys in ((self.rpn.fg_bg_sampler, proposals), (self.roi_heads.fg_bg_sampler, boxes)):
            assert isinstance(sampler, KeyedSampler)
            sampler.keys = keys

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        sizes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """The losses by name in training; in an evaluation each image's `boxes`, `labels`, `scores`, perhaps `masks`.

        Args:
            images: padded to one size, a multiple of the pyramid's.
            sizes: height and width of each before it was padded.
        """
        maps = {name: each.float() for name, each in self.pyramid(self.backbone(images)).items()}
        listed = ImageList(images, sizes)
        proposals, of_proposals = self.rpn(listed, maps, targets)
        found, of_boxes = self.roi_heads(maps, proposals, sizes, targets)
        return of_proposals | of_boxes if self.training else found
