"""UPerNet on a plain ViT (Xiao et al., 2018), as BEiT, MAE, CAE and Pseudo-MAE's Table 4 have it."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastpmae.evaluate.dense.extra import imported
from fastpmae.evaluate.dense.pyramid import LEVELS, Pyramid, TappedViT

AUXILIARY_CHANNELS = 256
AUXILIARY_TAP = 2
"""The tap that the auxiliary head reads: the third of four, at the patches' own stride."""


class ChannelDropout(nn.Module):
    """Dropout of whole channels whose scales are set from outside before each pass; in an evaluation there are none.

    Attributes:
        rate: how often a channel is dropped.
        channels: of the maps.
        scale: what each channel of each image is multiplied by, [batch, channels].
    """

    def __init__(self, rate: float, channels: int):
        super().__init__()
        self.rate, self.channels = rate, channels
        self.scale: Tensor | None = None

    def forward(
        self, maps: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        if not self.training or self.scale is None:
            return maps
        return maps * self.scale[:, :, None, None].to(maps.dtype)


class Segmenter(nn.Module):
    """A ViT, its pyramid, UPerNet's decoder and a classifier of pixels; in training an auxiliary head beside it.

    The decoder is segmentation-models-pytorch's. Its classifier and its whole network are not used: they take no ViT
    of others, and upsample with aligned corners.

    Args:
        backbone: its patches' size sets the pyramid's scales.
        classes: of pixels.
        channels: of the decoder; 0 takes the ViT's width, as BEiT does.
        dropout: of the channels before each classifier.

    Raises:
        UserError: where segmentation-models-pytorch is not installed.
    """

    def __init__(self, backbone: TappedViT, classes: int, channels: int = 0, dropout: float = 0.1):
        super().__init__()
        package = "segmentation-models-pytorch"
        upernet = imported("segmentation_models_pytorch.decoders.upernet.decoder", package)
        start = imported("segmentation_models_pytorch.base.initialization", package)
        dim = backbone.dim
        channels = channels or dim
        self.backbone = backbone
        self.pyramid = Pyramid(dim, backbone.patch_size)
        # It passes over two maps of finer strides, which its own encoders have.
        self.decoder = upernet.UPerNetDecoder((3, 3, *[dim] * LEVELS), decoder_channels=channels)
        self.classify = nn.Sequential(ChannelDropout(dropout, channels), nn.Conv2d(channels, classes, 1))
        self.auxiliary = nn.Sequential(
            nn.Conv2d(dim, AUXILIARY_CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(AUXILIARY_CHANNELS),
            nn.ReLU(inplace=True),
            ChannelDropout(dropout, AUXILIARY_CHANNELS),
            nn.Conv2d(AUXILIARY_CHANNELS, classes, 1),
        )
        start.initialize_decoder(self.decoder)
        start.initialize_decoder(self.auxiliary)
        for head in (self.classify, self.auxiliary):
            last = head[-1]
            assert isinstance(last, nn.Conv2d)
            assert last.bias is not None
            nn.init.normal_(last.weight, std=0.01)
            nn.init.zeros_(last.bias)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[
        Float[Tensor, "batch classes fine_height fine_width"], Float[Tensor, "batch classes rows columns"] | None
    ]:
        """Logits at the pyramid's finest stride, and in training the auxiliary head's at the patches'.

        The image's sides are multiples of the patches', and at least two patches.
        """
        maps = self.pyramid(self.backbone(images))
        # the decoder counts two finer maps, which it does not read
        logits = self.classify(self.decoder([images, images, *maps]))
        return logits, self.auxiliary(maps[AUXILIARY_TAP]) if self.training else None


def upsampled(
    logits: Float[Tensor, "batch classes rows columns"], size: Sequence[int]
) -> Float[Tensor, "batch classes height width"]:
    """Logits at another size (height, width), bilinear, corners not aligned."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def pixel_loss(
    logits: Float[Tensor, "batch classes rows columns"], masks: Int[Tensor, "batch height width"], ignore: int
) -> Float[Tensor, ""]:
    """Cross-entropy of the upsampled logits: its sum over the pixels with a class, over the number of all pixels.

    So mmsegmentation counts by default. A batch that nobody has labelled costs nothing, and every image counts alike
    on whichever rank it is.
    """
    losses = F.cross_entropy(
        upsampled(logits.float(), masks.shape[1:]), masks.long(), ignore_index=ignore, reduction="sum"
    )
    return losses / masks.numel()
