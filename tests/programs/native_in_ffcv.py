"""FFCV's own loader with our decoders: `python -m tests.programs.native_in_ffcv WHOLE.beton VARIED.beton NPZ WORKERS`.

Two epochs of WHOLE, whose images have one size, and the crops of VARIED by FFCV's decoder and by ours.
"""

# pyright: reportMissingImports=false

import sys
import warnings
from typing import Any

import numpy as np

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption

    from fastpmae_loaders import ffcv

    ours: Any = ffcv

    def read(path: str, decoder: Any, order: Any = OrderOption.SEQUENTIAL) -> list[np.ndarray]:
        loader = Loader(
            path, batch_size=4, num_workers=int(sys.argv[4]), order=order, seed=1, drop_last=False,
            pipelines={"image": [decoder], "label": [IntDecoder()]},
        )  # fmt: skip
        batches = [(image.copy(), label.copy()) for _ in range(2) for image, label in loader]
        return [np.concatenate(parts) for parts in zip(*batches, strict=True)]

    whole, varied, out = sys.argv[1:4]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        images, labels = read(whole, ours.SimpleRGBImageDecoder(), OrderOption.RANDOM)
    crops, _ = read(varied, ours.CenterCropRGBImageDecoder((32, 40), 0.8))
    theirs, _ = read(varied, CenterCropRGBImageDecoder((32, 40), 0.8))
    drawn, _ = read(varied, ours.RandomResizedCropRGBImageDecoder((32, 32), scale=(0.2, 0.5)))
    said = [str(one.message) for one in told if issubclass(one.category, RuntimeWarning)]
    np.savez(out, images=images, labels=labels.reshape(-1), crops=crops, theirs=theirs, drawn=drawn, said=said)
