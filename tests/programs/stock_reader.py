"""Pixels and labels as FFCV's own loader reads them from a file: `python -m tests.programs.stock_reader BETON NPZ HOW`.

HOW is "map" (the system's cache) or "pages" (FFCV's own).
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

    loader = Loader(
        sys.argv[1],
        batch_size=4,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        os_cache=sys.argv[3] == "map",
        drop_last=False,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    images, labels = zip(*[(image.copy(), label.copy()) for image, label in loader], strict=True)
    np.savez(sys.argv[2], images=np.concatenate(images), labels=np.concatenate(labels).reshape(-1))
