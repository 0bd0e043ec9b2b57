"""Segmenters and detectors out of their files, ready to be asked: what `fastpmae-eval segment` and `detect` left."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import timm
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastpmae.distributed.ranks import choose_device
from fastpmae.evaluate.backbone import BIASES, Backbone, find_backbone
from fastpmae.evaluate.dense.pyramid import TappedViT, tapped_blocks
from fastpmae.evaluate.dense.rcnn import Detector
from fastpmae.evaluate.dense.recipe import DetectConfig, SegmentConfig
from fastpmae.evaluate.dense.trained import TrainedDetector, TrainedSegmenter
from fastpmae.evaluate.dense.upernet import Segmenter
from fastpmae.evaluate.dense.weights import WORDS, NetworkFile, read_network
from fastpmae.run.init_weights import few
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.printable import printable, short
from fastpmae_loaders.values import checked

Device = Literal["auto", "cpu", "cuda"]
Model = TypeVar("Model", bound=nn.Module)


@checked
def load_segmenter(path: Path | str, device: Device = "auto") -> TrainedSegmenter:
    """The segmenter that `fastpmae-eval segment` left: called with an image it tells the class of each pixel.

        segmenter = load_segmenter("runs/camvid")
        mask = segmenter("street.jpg")  # int16 [height, width] of the upright image
        segmenter.names[mask[0, 0]]

    It predicts what the training's own test did: windows of the size that it was trained on, the same in half
    precision on a GPU.

    Args:
        path: the folder of the training, its `segmenter.safetensors`, or what `fastpmae-export --format plain` made.
        device: where to compute; auto takes a GPU where there is one.

    Raises:
        UserError: where there is no segmenter, the training has not ended, or the file is not sound; and where the
            extra `dense` is not installed.
    """
    loaded = load_network(Path(path), device)
    if not isinstance(loaded, TrainedSegmenter):
        raise UserError(f"{printable(str(path))} holds a detector: load_detector loads it")
    return loaded


@checked
def load_detector(path: Path | str, device: Device = "auto") -> TrainedDetector:
    """The detector that `fastpmae-eval detect` left: called with an image it finds objects.

        detector = load_detector("runs/bccd")
        found = detector("blood.jpg")  # boxes [n, 4] in pixels of the upright image, labels, scores
        [detector.names[label - 1] for label in found.labels]

    It finds what the training's own test did, down to its `--score-threshold`.

    Args:
        path: the folder of the training, its `detector.safetensors`, or what `fastpmae-export --format plain` made.
        device: where to compute; auto takes a GPU where there is one.

    Raises:
        UserError: where there is no detector, the training has not ended, or the file is not sound.
    """
    loaded = load_network(Path(path), device)
    if not isinstance(loaded, TrainedDetector):
        raise UserError(f"{printable(str(path))} holds a segmenter: load_segmenter loads it")
    return loaded


def load_network(path: Path, device: Device = "auto") -> TrainedSegmenter | TrainedDetector:
    """Whichever of the two a folder or a file holds. Raises UserError as `load_segmenter` and `load_detector`."""
    file, where = read_network(path), choose_device(device)
    config = file.config
    vit = _vit_of(file)
    backbone = Backbone(file.source, "", file.image_size, file.mean, file.std, lambda *_, **__: _vit_of(file))

    def tapped() -> TappedViT:
        return TappedViT(vit, tapped_blocks(len(vit.blocks)))

    if isinstance(config, SegmentConfig):
        model = _filled(file, lambda: Segmenter(tapped(), len(file.names), config.channels, config.dropout))
        return TrainedSegmenter(model.to(where).eval(), backbone, config, where, file.names)
    assert isinstance(config, DetectConfig)
    model = _filled(file, lambda: Detector(tapped(), len(file.names), config, masks=file.masks))
    return TrainedDetector(model.to(where).eval(), backbone, config, where, file.names)


def _vit_of(file: NetworkFile) -> VisionTransformer | Beit:
    """A ViT of a file's sizes. Raises UserError where its tensors make none."""
    if not file.arguments:
        vit = find_backbone(str(file.path), image_size=file.image_size).build() if BIASES in file.encoder else None
        if not isinstance(vit, Beit):
            raise _refusal(file, "its header does not say what its ViT is")
        return vit
    name = file.arguments["model_name"]
    rest = {key: value for key, value in file.arguments.items() if key != "model_name"}
    # First without memory: what does not fit may be of any size.
    try:
        with torch.device("meta"):
            sketch = timm.create_model(name, pretrained=False, **rest)
    except Exception as error:  # by whatever its many models make of arguments that are not theirs
        raise _refusal(file, f"timm makes no {short(name)} of its arguments ({short(str(error))})") from None
    if not isinstance(sketch, VisionTransformer):
        raise _refusal(file, f"timm's {short(name)} is no plain ViT")
    _check_fits(file, sketch, file.encoder)
    vit = timm.create_model(name, pretrained=False, **rest)
    assert isinstance(vit, VisionTransformer)
    return vit


def _filled(file: NetworkFile, make: Callable[[], Model]) -> Model:
    """A network with a file's tensors. Raises UserError where they are of other names, sizes or types."""
    try:
        with torch.device("meta"):
            sketch = make()
    except RuntimeError as error:  # of more channels than torch can count the bytes of
        raise _refusal(file, f"its settings make no network ({short(str(error))})") from None
    _check_fits(file, sketch, file.tensors)
    model = make()
    model.load_state_dict(file.tensors)
    return model


def _check_fits(file: NetworkFile, sketch: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    own = sketch.state_dict()
    if odd := sorted(own.keys() ^ tensors.keys()):
        missing = sorted(own.keys() - tensors.keys())
        raise _refusal(file, f"it lacks {few(missing)}" if missing else f"it has no place for {few(odd)}")
    for name, tensor in own.items():
        found = tensors[name]
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            what = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
            raise _refusal(file, f"its {name} is {what} instead of {list(tensor.shape)}")


def _refusal(file: NetworkFile, why: str) -> UserError:
    return UserError(f"{printable(str(file.path))} is no {WORDS[file.kind]} of fastpmae-eval: {why}")
