"""Pixels and labels as FFCV's own loader reads them from files: `stock_reader BETON NPZ HOW [BETON NPZ HOW ...]`.

HOW is "map" (the system's cache) or "pages" (FFCV's own). FFCV compiles its pipelines once for all of the files.
"""

# ffcv is an extra, which may be missing
# pyright: reportMissingImports=false

import sys
import warnings

import numpy as np

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    for beton, npz, how in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        loader = Loader(
            beton,
            batch_size=4,
            num_workers=1,
            order=OrderOption.SEQUENTIAL,
            os_cache=how == "map",
            drop_last=False,
            pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
        )
        images, labels = zip(*[(image.copy(), label.copy()) for image, label in loader], strict=True)
        np.savez(npz, images=np.concatenate(images), labels=np.concatenate(labels).reshape(-1))
