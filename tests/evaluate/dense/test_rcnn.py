"""Detectors of torchvision's parts: losses against torchvision's own, exact strides, boxes that are no numbers."""

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import generalized_box_iou, roi_align

from fastpmae.evaluate.dense.proposals import ExactAnchors, ExactRoIAlign, KeyedSampler, giou_loss
from fastpmae.evaluate.dense.pyramid import TappedViT, tapped_blocks
from fastpmae.evaluate.dense.rcnn import Detector
from fastpmae.evaluate.dense.recipe import DetectConfig


def detector(patch: int = 8, masks: bool = True, **settings: Any) -> Detector:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=4 * patch, patch_size=patch, embed_dim=16, depth=4, num_heads=2, num_classes=0)
    return Detector(
        TappedViT(vit, tapped_blocks(4)),
        2,
        DetectConfig(box_head="fc", channels=16, proposals=100, boxes_per_image=64, **settings),
        masks=masks,
    )


def targets(masks: bool = True) -> list[dict[str, Tensor]]:
    """Two images of 64 x 96; the second one is empty."""
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [50.0, 10.0, 90.0, 60.0]])
    outlines, labels = torch.ones(2, 64, 96, dtype=torch.uint8), torch.tensor([1, 2])
    found = [{"boxes": boxes[:n], "labels": labels[:n], "masks": outlines[:n]} for n in (2, 0)]
    return found if masks else [{name: each[name] for name in ("boxes", "labels")} for each in found]


SIZES = [(64, 96), (60, 90)]


@pytest.mark.slow
@pytest.mark.parametrize("pyramid", ["taps", "simple"])
def test_losses_are_torchvisions_where_its_own_are_asked_for(pyramid: str):
    """With smooth L1 the subclasses change nothing: the same samples, the same numbers."""
    model = detector(pyramid=pyramid, box_loss="smooth_l1", box_loss_weight=1.0).train()
    images = torch.randn(2, 3, 64, 96)
    model.set_keys((1, 2), (3, 4))
    ours = model(images, SIZES, targets())
    theirs: Any = copy.deepcopy(model)
    theirs.rpn.__class__ = RegionProposalNetwork
    theirs.roi_heads.__class__ = RoIHeads
    truth = theirs(images, SIZES, targets())
    assert isinstance(ours, dict)
    assert isinstance(truth, dict)
    assert ours.keys() == truth.keys() == {
        "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask",
    }  # fmt: skip
    for name in ours:
        torch.testing.assert_close(ours[name], truth[name], msg=name)
    torch.stack(list(ours.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.slow
def test_an_image_without_boxes_trains_alone():
    model = detector().train()
    model.set_keys((1,), (2,))
    losses = model(torch.randn(1, 3, 64, 96), [(64, 96)], targets()[1:])
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert bool(total.isfinite())
    # every parameter has a gradient all the same: on several ranks the others wait for it
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_giou_is_the_papers():
    torch.manual_seed(0)
    corners = torch.rand(20, 2) * 40
    boxes = torch.cat([corners, corners + 1 + torch.rand(20, 2) * 30], dim=1)
    predicted, true = boxes[:10].clone().requires_grad_(), boxes[10:]
    loss = giou_loss(predicted, true)
    torch.testing.assert_close(loss, (1 - generalized_box_iou(predicted, true).diagonal()).sum())
    loss.backward()
    assert predicted.grad is not None
    step = giou_loss(predicted.detach() - 0.01 * predicted.grad, true)
    assert step < loss


def test_samples_depend_on_the_image_alone():
    labels = [torch.tensor([1, 0, 0, -1, 0, 1, 1, 0] * 20), torch.tensor([0, 1] * 40)]

    def chosen(order: list[int]) -> dict[int, Tensor]:
        sampler = KeyedSampler(16, 0.25)
        sampler.keys = [10 + number for number in order]
        positive, negative = sampler([labels[number] for number in order])
        return {number: torch.stack([positive[place], negative[place]]) for place, number in enumerate(order)}

    both, turned, alone = chosen([0, 1]), chosen([1, 0]), chosen([1])
    assert torch.equal(both[0], turned[0])
    assert torch.equal(both[1], turned[1])
    assert torch.equal(both[1], alone[1])
    assert both[0].sum(dim=1).tolist() == [4, 12]


@pytest.mark.parametrize("patch", [14, 16])
def test_anchors_stand_where_the_maps_are(patch: int):
    """At patches of 14 a stride is 3.5 pixels; torchvision takes it for 3."""
    side = patch * 8
    strides = [patch / 4, patch / 2, patch, 2 * patch]
    anchors = ExactAnchors(((32,),) * 4, ((1.0,),) * 4)
    maps = [torch.empty(1, 1, round(side / stride), round(side / stride)) for stride in strides]
    (found,) = anchors(ImageList(torch.empty(1, 3, side, side), [(side, side)]), maps)
    centres, last = (found[:, :2] + found[:, 2:]) / 2, 0
    for each, stride in zip(maps, strides, strict=True):
        count = each.shape[2] ** 2
        assert centres[last + count - 1].tolist() == [side - stride] * 2
        last += count


def test_boxes_are_read_at_the_maps_own_scale():
    strides = [3.5, 7.0, 14.0, 28.0]
    sides = [round(112 / stride) for stride in strides]
    maps = {str(level): torch.rand(1, 2, side, side) for level, side in enumerate(sides)}
    pool = ExactRoIAlign(list(maps), 7, strides)
    boxes = [torch.tensor([[10.0, 20.0, 60.0, 80.0]])]
    truth = roi_align(maps["0"], boxes, 7, 1 / 3.5, 2)
    torch.testing.assert_close(pool(maps, boxes, [(112, 112)]), truth)


def test_a_box_that_is_no_number_ends_no_process():
    maps = {str(level): torch.rand(1, 2, 32 // 2**level, 32 // 2**level) for level in range(4)}
    pool = ExactRoIAlign(list(maps), 7, [4, 8, 16, 32])
    odd = torch.tensor([[float("nan")] * 4, [0.0, 0.0, float("inf"), 9.0], [0.0, 0.0, 20.0, 20.0]])
    found = pool(maps, [odd], [(128, 128)])
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[2:], pool(maps, [odd[2:]], [(128, 128)]))


def test_a_diverged_network_finds_nothing():
    model = detector(masks=False).eval()
    with torch.no_grad():
        model.rpn.head.get_parameter("bbox_pred.weight").fill_(float("nan"))
        (found,) = model(torch.randn(1, 3, 64, 96), [(64, 96)])
    assert len(found["boxes"]) == 0


def test_boxes_are_not_rounded_under_autocast(monkeypatch: pytest.MonkeyPatch):
    """bf16 has 8 bits: at 700 pixels steps of 4. What torchvision decodes takes the dtype of the offsets."""
    model, true = detector(), torch.tensor([[701.3, 303.7, 911.9, 601.2]])
    image, size = torch.randn(1, 3, 640, 1024), [(640, 1024)]
    sampled: list[Any] = []
    sample = model.roi_heads.select_training_samples
    monkeypatch.setattr(
        model.roi_heads, "select_training_samples", lambda *given: sampled.append(sample(*given)) or sampled[0]
    )
    outlines = torch.ones(1, 640, 1024, dtype=torch.uint8)
    target = [{"boxes": true, "labels": torch.tensor([1]), "masks": outlines}]
    model.set_keys((1,), (2,))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(image, size, target)
    (proposals,), _, (labels,), (wanted,) = sampled[0]
    exact = proposals[labels > 0]
    assert (exact == true).all(dim=1).any()  # it is a proposal of its own
    assert proposals.dtype == wanted.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in losses.values())

    seen: list[Tensor] = []
    model.roi_heads.register_forward_pre_hook(lambda _, given: seen.extend(given[1]))
    model.roi_heads.score_thresh = 0.0
    # offsets of 0: every box is its anchor
    for part in (model.rpn.head, model.roi_heads.box_predictor):
        for parameter in part.get_submodule("bbox_pred").parameters():
            torch.nn.init.zeros_(parameter)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model.eval()(image, size)
    maps = [torch.empty(1, 1, 640 // stride, 1024 // stride) for stride in (4, 8, 16, 32, 64)]
    anchors = model.rpn.anchor_generator(ImageList(image, size), maps)[0]
    anchors = torch.stack([anchors[:, ::2].clamp(0, 1024), anchors[:, 1::2].clamp(0, 640)], dim=2).flatten(1)
    for boxes in (seen[0], found["boxes"]):
        assert boxes.dtype == torch.float32
        assert len(boxes)
        assert torch.cdist(boxes, anchors, p=torch.inf).min(dim=1).values.max() < 1e-3
    assert found["masks"].dtype == torch.float32
