"""The same two views as other libraries make them, each written as its own documentation would and as fast as it goes.

Every pipeline is endless, reads the same JPEG bytes and gives uint8 views [B, 3, S, S], not normalised: a crop of 20 to
100 % of the area and a flip, and a crop of 14 to 100 % with a flip and DINO's colours. What a library cannot do is left
out and said here, in its favour. Where two ways were possible the faster one was taken; the slower ones are named.
"""

# ffcv is an extra, which may be missing
# pyright: reportMissingImports=false

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

SIMPLE_AREA, COMPLEX_AREA = (0.2, 1.0), (0.14, 1.0)
RATIO = (3 / 4, 4 / 3)
JITTER, JITTER_SHARE, GRAY_SHARE = (0.4, 0.4, 0.2, 0.1), 0.8, 0.2
SIGMA = (0.1, 2.0)
BLUR_SHARES, SOLARISE_SHARE = (1.0, 0.1), 0.2

Views = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """One case to be run: its name, the images as one .beton and as files (the same bytes), and the sizes."""

    case: str
    beton: Path
    folder: Path
    batch: int
    workers: int
    side: int
    device: str = "cpu"

    @property
    def coefficients(self) -> Path:
        """The .beton's JPEGs as coefficients, sample by sample; `bench_loader` writes it where a case wants it."""
        return self.beton.with_name("coefficients.beton")

    @property
    def files(self) -> list[str]:
        return sorted(str(file) for file in self.folder.iterdir())


class Endless(Sampler[int]):
    """One random order after the other, so that no epoch's end drains the workers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.count).tolist()


class TwoViews(Dataset):
    """Image files; each is loaded once and shown twice."""

    def __init__(self, files: Sequence[str], load: Callable, simple: Callable, complex: Callable) -> None:
        self.files, self.load, self.simple, self.complex = files, load, simple, complex

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = self.load(self.files[index])
        return self.simple(image), self.complex(image)


def load_pillow(file: str) -> Any:
    """As torchvision's ImageFolder loads it."""
    from PIL import Image

    with Path(file).open("rb") as stream:
        return Image.open(stream).convert("RGB")


def load_tensor(file: str) -> Tensor:
    """uint8 [3, H, W], channels last in memory, by torchvision's own decoder (libjpeg-turbo)."""
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    with warnings.catch_warnings():
        # torchvision 0.29 announces that its decoders move to another package
        warnings.simplefilter("ignore", DeprecationWarning)
        image = decode_jpeg(read_file(file), mode=ImageReadMode.RGB)
    assert isinstance(image, Tensor)  # a list only for a list of files
    return image


def worker_batches(data: Dataset, task: Task, collate: Callable | None = None) -> Iterator[Any]:
    """A DataLoader with `workers` processes; torch itself keeps each of them to one thread."""
    loader = DataLoader(
        data, task.batch, sampler=Endless(len(data)), num_workers=task.workers, collate_fn=collate,  # pyright: ignore
        persistent_workers=True, drop_last=True,
    )  # fmt: skip
    yield from loader


class PillowBlur:
    """DINO's and MoCo's own blur: Pillow's, three times as fast as torchvision's of as many taps."""

    def __call__(self, image: Any) -> Any:
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(random.uniform(*SIGMA)))


def vision_transforms(task: Task, tensors: bool, colour: bool) -> tuple[Callable, Callable]:
    """Both views by torchvision's transforms.v2, of Pillow images or of `tensors`; the second with `colour`."""
    from torchvision.transforms import InterpolationMode, v2

    def crop(area: tuple[float, float]) -> list[Any]:
        resized = v2.RandomResizedCrop(task.side, area, RATIO, InterpolationMode.BICUBIC, antialias=True)
        return [resized, v2.RandomHorizontalFlip(0.5)]

    blur = v2.GaussianBlur(9, SIGMA) if tensors else PillowBlur()
    often, seldom = BLUR_SHARES
    recipes = v2.RandomChoice(
        [
            v2.RandomApply([blur], often),
            v2.Compose([v2.RandomApply([blur], seldom), v2.RandomSolarize(128, SOLARISE_SHARE)]),
        ]
    )
    colours = [v2.RandomApply([v2.ColorJitter(*JITTER)], JITTER_SHARE), v2.RandomGrayscale(GRAY_SHARE), recipes]
    last = [] if tensors else [v2.PILToTensor()]
    return v2.Compose(crop(SIMPLE_AREA) + last), v2.Compose(crop(COMPLEX_AREA) + (colours if colour else []) + last)


def torchvision_views(task: Task, tensors: bool, colour: bool) -> Iterator[Views]:
    """transforms.v2 in a DataLoader.

    Without `tensors`: Pillow images to the end, as the published code of MAE, DINO and iBOT has it. With `tensors`:
    what v2's documentation advises for speed, uint8 tensors from its own decoder, here in channels-last memory, which
    its resize likes best; colours are slower so (hue above all), and the blur is v2's with DINOv2's 9 taps, since with
    23 taps it takes four times as long.
    """
    load = load_tensor if tensors else load_pillow
    for views in worker_batches(TwoViews(task.files, load, *vision_transforms(task, tensors, colour)), task):
        yield tuple(views)


class WithTarget(TwoViews):
    """timm's collate function wants ((view, view), target)."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return super().__getitem__(index), 0


def timm_views(task: Task) -> Iterator[Views]:
    """timm's create_transform and fast_collate, as its create_loader joins them for a prefetcher.

    Left out: solarise, which it has in AutoAugment alone. Its blur has 23 taps and torchvision's arithmetic.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from timm.data.loader import fast_collate
        from timm.data.transforms_factory import create_transform

    def transform(area: tuple[float, float], **colours: Any) -> Any:
        return create_transform(
            task.side, is_training=True, use_prefetcher=True, scale=area, ratio=RATIO, hflip=0.5,
            interpolation="bicubic", **colours,
        )  # fmt: skip

    simple = transform(SIMPLE_AREA, color_jitter=None)
    complex = transform(
        COMPLEX_AREA,
        color_jitter=JITTER,
        color_jitter_prob=JITTER_SHARE,
        grayscale_prob=GRAY_SHARE,
        gaussian_blur_prob=sum(BLUR_SHARES) / 2,
    )
    for both, _ in worker_batches(WithTarget(task.files, load_pillow, simple, complex), task, fast_collate):
        yield both[: task.batch], both[task.batch :]


def _keep_machine_code(compiler: Any) -> None:
    """Let numba keep what FFCV compiles anew in every process; a minute for the colours alone. The code is the same."""
    import numba
    from numba.core.dispatcher import Dispatcher

    def compile(code: Any, signature: Any = None) -> Any:
        cells = [cell.cell_contents for cell in code.__closure__ or ()]
        # what calls other compiled functions has no key that another process would find again
        alone = not any(isinstance(cell, Dispatcher) for cell in cells)
        parallel = getattr(code, "is_parallel", False) and compiler.num_threads > 1
        options = {"fastmath": True, "nogil": True, "error_model": "numpy", "parallel": parallel, "cache": alone}
        return numba.njit(signature, **options)(code)

    compiler.compile = compile


def ffcv_views(task: Task) -> Iterator[Views]:
    """Two stock pipelines over the one image field: FFCV then decodes every image twice.

    Its resize is INTER_AREA, cheaper than bicubic and not antialiased where it enlarges. Left out, since FFCV 1.0.2 has
    none of it: hue, grayscale, blur, solarise. Brightness, contrast and saturation each have a coin of their own there,
    and their order is fixed. Views are a ring buffer's, channels last; nothing is copied out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ffcv.transforms as ops
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.pipeline.compiler import Compiler
        from ffcv.pipeline.pipeline_spec import PipelineSpec
        from ffcv.reader import Reader

        _keep_machine_code(Compiler)

        def pipeline(area: tuple[float, float], colours: Sequence[Any]) -> Any:
            decoder = RandomResizedCropRGBImageDecoder((task.side, task.side), area, RATIO)
            last = [ops.ToTensor(), ops.ToTorchImage()]
            return PipelineSpec("image", decoder, [ops.RandomHorizontalFlip(0.5), *colours, *last])

        kinds = (ops.RandomBrightness, ops.RandomContrast, ops.RandomSaturation)
        colours = [kind(most, JITTER_SHARE) for kind, most in zip(kinds, JITTER, strict=False)]
        count = int(Reader(str(task.beton)).num_samples)
        # its annotations know neither arrays of indices nor fields that are left out
        open_loader: Any = Loader
        loader = open_loader(
            str(task.beton),
            batch_size=task.batch,
            num_workers=task.workers,
            order=OrderOption.RANDOM,
            # one epoch that outlasts the benchmark: at each end FFCV gives its memory back and asks for it anew
            indices=np.tile(np.arange(count), -(-1_000_000 // count)),
            pipelines={"image": pipeline(SIMPLE_AREA, ()), "again": pipeline(COMPLEX_AREA, colours), "label": None},
        )
        for views in loader:
            yield views[0], views[1]


def dali_views(task: Task) -> Iterator[Views]:
    """One pipeline with conditional execution, as DALI's documentation writes augmentations, and its PyTorch iterator.

    The image is decoded once and cropped twice; two `image_random_crop` decodes, which its training examples have for
    one view, took a quarter longer. Hue, saturation, grayscale, brightness and contrast are one `color_twist`, whose
    order is fixed. The blur's width of the window is DALI's choice. With device "cuda" the decoder is "mixed".
    """
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    boolean, on_gpu = types.DALIDataType.BOOL, task.device == "cuda"
    often, seldom = BLUR_SHARES
    solarised = [value if value < 128 else 255 - value for value in range(256)]

    def coin(share: float) -> Any:
        return fn.random.coin_flip(probability=share, dtype=boolean)

    def uniform(low: float, high: float) -> Any:
        return fn.random.uniform(range=[low, high])

    def crop(image: Any, area: tuple[float, float]) -> Any:
        return fn.random_resized_crop(
            image, size=task.side, random_area=list(area), random_aspect_ratio=list(RATIO),
            interp_type=types.DALIInterpType.INTERP_CUBIC, antialias=True,
        )  # fmt: skip

    def finished(image: Any) -> Any:
        # cheaper than fn.flip and fn.transpose
        mirror = fn.random.coin_flip(probability=0.5)
        return fn.crop_mirror_normalize(image, mirror=mirror, dtype=types.DALIDataType.UINT8, output_layout="CHW")

    def twisted(image: Any) -> Any:
        brightness, contrast, saturation, hue = JITTER
        jitter, gray = (fn.random.coin_flip(probability=share) for share in (JITTER_SHARE, GRAY_SHARE))
        return fn.color_twist(
            image,
            brightness=1 + jitter * uniform(-brightness, brightness),
            contrast=1 + jitter * uniform(-contrast, contrast),
            saturation=(1 + jitter * uniform(-saturation, saturation)) * (1 - gray),
            hue=jitter * uniform(-360 * hue, 360 * hue),
        )

    @pipeline_def(enable_conditionals=True)
    def both() -> Any:
        encoded, _ = fn.readers.file(files=task.files, random_shuffle=True)
        image = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.DALIImageType.RGB)
        simple = crop(image, SIMPLE_AREA)
        complex = twisted(crop(image, COMPLEX_AREA))
        if coin(0.5):
            if coin(often):
                complex = fn.gaussian_blur(complex, sigma=uniform(*SIGMA))
        else:
            if coin(seldom):
                complex = fn.gaussian_blur(complex, sigma=uniform(*SIGMA))
            if coin(SOLARISE_SHARE):
                complex = fn.lookup_table(
                    complex, keys=list(range(256)), values=solarised, dtype=types.DALIDataType.UINT8
                )
        return finished(simple), finished(complex)

    pipe: Any = both(batch_size=task.batch, num_threads=task.workers, device_id=0 if on_gpu else None)
    for (found,) in DALIGenericIterator([pipe], ["simple", "complex"], size=-1):
        yield found["simple"], found["complex"]
