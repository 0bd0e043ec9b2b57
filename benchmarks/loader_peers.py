"""The same two views by the loaders of today: SPDL, WebDataset, slipstream and torchcodec, where they are installed.

As in `loader_baselines.py`: each as its documentation would write it and as fast as it goes, what a library cannot do
left out in its favour. None of them is needed by anything else; `pip install 'fastpmae[bench]'` brings what PyPI has.
"""

# they are no requirement of the checks
# pyright: reportMissingImports=false

import os
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.loader_baselines import (
    BLUR_SHARES,
    COMPLEX_AREA,
    GRAY_SHARE,
    JITTER,
    JITTER_SHARE,
    RATIO,
    SIGMA,
    SIMPLE_AREA,
    SOLARISE_SHARE,
    Endless,
    Task,
    TwoViews,
    Views,
    load_tensor,
    vision_transforms,
    worker_batches,
)

PEERS = ("slipstream", "spdl", "torchcodec", "webdataset")
GEOMETRY_PEERS = ("slipstream-geometry", "slipstream-yuv-geometry", "spdl-geometry")


def spdl_views(task: Task, colour: bool) -> Iterator[Views]:
    """SPDL's pipeline of threads around torchvision's decoder and transforms.v2 on tensors.

    Its own decoder is FFmpeg's, which takes 3 times as long for a JPEG (5.0 CPU-ms instead of 1.7), so it is not used.
    """
    from spdl.pipeline import PipelineBuilder

    data = TwoViews(task.files, load_tensor, *vision_transforms(task, True, colour))

    def joined(samples: list[tuple[Tensor, Tensor]]) -> Views:
        return tuple(torch.stack(views) for views in zip(*samples, strict=True))

    builder = PipelineBuilder().add_source(iter(Endless(len(data)))).pipe(data.__getitem__, concurrency=task.workers)
    pipeline = builder.aggregate(task.batch).pipe(joined).add_sink(task.workers).build(num_threads=task.workers)
    with pipeline.auto_stop():
        yield from pipeline


def load_torchcodec(file: str) -> Tensor:
    """A JPEG file by torchcodec's decoder: uint8 [3, H, W]."""
    from torchcodec.decoders import decode_jpeg

    return decode_jpeg(torch.from_numpy(np.fromfile(file, np.uint8)))


def torchcodec_views(task: Task) -> Iterator[Views]:
    """torchvision's transforms.v2 on tensors from torchcodec, where its decoders are moving, in a DataLoader."""
    for views in worker_batches(TwoViews(task.files, load_torchcodec, *vision_transforms(task, True, True)), task):
        yield tuple(views)


def both_views(sample: tuple[Any], simple: Callable, complex: Callable) -> Views:
    """The two views of WebDataset's sample of one picture."""
    return simple(sample[0]), complex(sample[0])


def webdataset_views(task: Task) -> Iterator[Views]:
    """WebDataset's shards, a shuffle and its Pillow decoder in a DataLoader, torchvision's transforms.v2 on top."""
    import webdataset
    from torch.utils.data import DataLoader

    shards = [str(task.folder.with_name(f"shard-{number}.tar")) for number in range(task.workers)]
    for number, shard in enumerate(shards):
        with tarfile.open(shard, "w") as archive:
            for file in task.files[number :: task.workers]:
                archive.add(file, Path(file).name)
    simple, complex = vision_transforms(task, False, True)
    data: Any = webdataset.WebDataset(shards, shardshuffle=False, resampled=True, nodesplitter=None)
    data = data.shuffle(1000).decode("pilrgb").to_tuple("jpg")
    data = data.map(partial(both_views, simple=simple, complex=complex)).batched(task.batch, partial=False)
    for views in DataLoader(data, batch_size=None, num_workers=task.workers, persistent_workers=True):
        yield tuple(views)


def slipstream_views(task: Task, colour: bool, yuv: bool = False) -> Iterator[Views]:
    """slipstream's cache, and its decoder that crops an image several times.

    It decodes with libjpeg-turbo's fast DCT. Its cache is built first, before the first batch: of the JPEGs as they
    are, or with `yuv` of their pixels as YUV 4:2:0, which it says are read at 2.7 times the rate, with the loss of a
    second conversion. Colours are its batch transforms, meant for a GPU: on the CPU most of its time goes there.
    """
    from slipstream import MultiCropPipeline, SlipstreamImageFolder, SlipstreamLoader, ToTorchImage
    from slipstream import transforms as ops
    from slipstream.decoders import DecodeMultiRandomResizedCrop

    root = task.folder.with_name(task.case)
    # its reader wants a folder for each class
    (root / "images" / "class").mkdir(parents=True)
    for file in task.files:
        (root / "images" / "class" / Path(file).name).symlink_to(Path(file).resolve())
    os.environ["SLIPSTREAM_CACHE_DIR"] = str(root)
    crops = {
        name: {"size": task.side, "scale": area, "ratio": RATIO}
        for name, area in (("simple", SIMPLE_AREA), ("complex", COMPLEX_AREA))
    }
    brightness, contrast, saturation, hue = JITTER
    often, seldom = BLUR_SHARES
    changes: list[Callable] = [
        ToTorchImage("cpu"),
        ops.RandomColorJitterHSV(
            p=JITTER_SHARE, hue=hue, saturation=saturation, value=brightness, contrast=contrast, device="cpu"
        ),
        ops.RandomGrayscale(p=GRAY_SHARE, device="cpu"),
        ops.RandomGaussianBlur(p=(often + seldom) / 2, kernel_size=(9, 9), sigma_range=SIGMA, device="cpu"),
        ops.RandomSolarization(p=SOLARISE_SHARE / 2, threshold=0.5, device="cpu"),
        lambda images: images.mul_(255).round_().to(torch.uint8),
    ]
    flip = ops.RandomHorizontalFlip(p=0.5, device="cpu")
    views = {"simple": [flip], "complex": [flip, *(changes if colour else ())]}
    decoder = DecodeMultiRandomResizedCrop(crops, num_threads=task.workers, to_tensor=True, permute=True)
    count = len(task.files)
    loader = SlipstreamLoader(
        SlipstreamImageFolder(str(root / "images")),
        batch_size=task.batch,
        # one epoch that outlasts the benchmark
        indices=np.tile(np.arange(count), -(-1_000_000 // count)),
        image_format="yuv420" if yuv else "jpeg",
        pipelines={"image": [decoder, MultiCropPipeline(views)]},
        verbose=False,
    )
    for batch in loader:
        found = batch.get("image", batch)
        yield found["simple"], found["complex"]
