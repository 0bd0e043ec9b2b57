"""Decoders for FFCV's own `ffcv.Loader`: images decoded by our own decoder, to the bit as Pillow does.

In the place of FFCV's decoders of the same names, with their arguments and their crops:

    from fastpmae_loaders.ffcv import RandomResizedCropRGBImageDecoder

    loader = ffcv.loader.Loader(path, batch_size=256, num_workers=8, order=OrderOption.RANDOM, pipelines={
        "image": [RandomResizedCropRGBImageDecoder((224, 224)), ToTensor(), ...], "label": [IntDecoder(), ToTensor()]})

FFCV's pipeline asks Python once for each batch, whose images are then decoded on threads of our own, as many as the
loader has workers, and no more of each than its crop shows. The crops are resized by FFCV. What is not an ordinary JPEG
is decoded by Pillow; of an image that does not decode all is black, and a warning names it.
"""

import ctypes
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from fastpmae_loaders.engines.ffcv_package import import_ffcv
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.jit.memory import fetch_add
from fastpmae_loaders.native.data import STEP
from fastpmae_loaders.native.decoder import decode, make_workspace, planes_size
from fastpmae_loaders.native.huffman import SLACK
from fastpmae_loaders.sources.beton import JPG, RAW
from fastpmae_loaders.sources.pictures import ImageError, decode_jpeg

try:
    _package = import_ffcv()
except UserError as error:
    raise ImportError(str(error)) from None

_fields: Any = _package.fields.rgb_image
_compiler: Any = _package.pipeline.compiler.Compiler
_query: Any = _package.pipeline.allocation_query.AllocationQuery

__all__ = ["CenterCropRGBImageDecoder", "RandomResizedCropRGBImageDecoder", "SimpleRGBImageDecoder"]

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


def _array_at(address: int, *shape: int, kind: Any = np.uint8) -> np.ndarray:
    """The memory at an address as an array; nothing keeps it there."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(kind).reshape(shape)


class _Ending(Exception):
    """The interpreter is at its end, and takes no work any more."""


class _Memory:
    """What one thread decodes in, for the largest image of a file."""

    def __init__(self, metadata: Any) -> None:
        height, width = (metadata[side].astype(np.int64) for side in ("height", "width"))
        planes = int(planes_size(height, width).max())
        self.work = make_workspace(int(height.max()), int(width.max()), 0, planes)
        self.pixels = np.empty(3 * int((height * width).max()), np.uint8)

    def fit(self, stored: int) -> None:
        """Have room for an image of so many bytes: FFCV's metadata do not tell how many there are at most."""
        if len(self.work.data) < stored + SLACK + STEP:
            self.work = self.work._replace(data=np.empty(2 * stored + SLACK + STEP, np.uint8))


class _Decoding:
    """What the decoders share: from FFCV's compiled pipeline to our threads, and back when a batch is done."""

    metadata: Any
    memory_read: Any
    _shape: tuple[int, ...]

    def generate_code(self) -> Callable[..., Any]:
        """FFCV's pipeline stage: it tells where each image of a batch lies, and waits."""
        read, shape, workers = self.memory_read, self._shape, _compiler.num_threads
        self._pool = ThreadPoolExecutor(workers, "fastpmae-ffcv")
        self._idle: list[_Memory] = []

        def of_batch(images: int, count: int, target: int) -> int:
            batch = _array_at(target, count, *shape)
            try:
                self._decode_batch(_array_at(images, count, 6, kind=np.int64), batch, workers)
            except _Ending:  # a loader that was left in mid-epoch: nobody sees the batch
                batch[:] = 0
            except Exception as error:  # nothing may escape into compiled code; FFCV would wait for ever
                batch[:] = 0
                warnings.warn(f"a batch does not decode and is shown black: {error}", RuntimeWarning, stacklevel=1)
            return 0

        callback = self._callback = _CALLBACK(of_batch)

        def stage(batch_indices, destination, metadata, storage_state):
            images = np.empty((len(batch_indices), 6), np.int64)
            for row in range(len(batch_indices)):
                field = metadata[batch_indices[row]]
                data = read(field["data_ptr"], storage_state)
                images[row, 0], images[row, 1] = data.ctypes.data, data.size
                images[row, 2], images[row, 3] = field["height"], field["width"]
                images[row, 4], images[row, 5] = field["mode"], batch_indices[row]
            callback(images.ctypes.data, len(batch_indices), destination.ctypes.data)
            return destination[: len(batch_indices)]

        return stage

    def _decode_batch(self, images: np.ndarray, batch: np.ndarray, workers: int) -> None:
        counter = np.zeros(1, np.int64)
        # one after another, as chance has it
        boxes = [self._box(int(image[2]), int(image[3])) for image in images]

        def work() -> None:
            with self._memory() as memory:
                while (row := int(fetch_add(counter))) < len(images):
                    self._show(images[row], boxes[row], batch[row], memory)

        try:
            parts = [self._pool.submit(work) for _ in range(min(workers, len(images)))]
        except RuntimeError as error:  # nobody but the interpreter shuts the pool down
            raise _Ending from error
        for done in parts:
            done.result()

    @contextmanager
    def _memory(self) -> Iterator[_Memory]:
        """Memory that no other thread has meanwhile."""
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = _Memory(self.metadata)
        try:
            yield memory
        finally:
            self._idle.append(memory)

    def _box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of what is shown of an image."""
        return 0, 0, height, width

    def _show(self, image: np.ndarray, box: tuple[int, int, int, int], target: np.ndarray, memory: _Memory) -> None:
        address, size, height, width, mode, index = map(int, image)
        pixels = memory.pixels[: 3 * height * width].reshape(height, width, 3)
        try:
            top, left, tall, wide = box
            if min(top, left) < 0 or min(tall, wide) < 1 or top + tall > height or left + wide > width:
                # OpenCV, which FFCV resizes by, would end the process
                raise ImageError(f"its {width}x{height} pixels have no crop of {wide}x{tall} at ({left}, {top})")
            _decode(_array_at(address, size), mode, box, pixels, memory)
        except ImageError as error:
            target[:] = 0
            warnings.warn(f"sample {index} does not decode and is shown black: {error}", RuntimeWarning, stacklevel=1)
        else:
            self._put(pixels, box, target)

    def _put(self, pixels: np.ndarray, box: tuple[int, int, int, int], target: np.ndarray) -> None:
        target[:] = pixels


def _decode(data: np.ndarray, mode: int, box: tuple[int, int, int, int], pixels: np.ndarray, memory: _Memory) -> None:
    """Pixels of an image, as far as its box shows them. ImageError where it does not decode."""
    height, width = pixels.shape[:2]
    if mode == RAW and data.size == pixels.size:
        pixels[:] = data.reshape(pixels.shape)
    elif mode == JPG:
        memory.fit(len(data))
        boxes = np.array([box], np.int32)
        if not decode(data, height, width, boxes, pixels.ctypes.data, memory.work):
            pixels[:] = decode_jpeg(data.tobytes(), height, width)
    else:
        raise ImageError(f"its {data.size} bytes are no {width}x{height} pixels, and its storage mode is {mode}")


class SimpleRGBImageDecoder(_Decoding, _fields.SimpleRGBImageDecoder):
    """Whole images, which all have the same size: the pixels that Pillow makes of them, to the bit."""

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        """What FFCV's does, which raises TypeError where sizes differ."""
        state, memory = super().declare_state_and_memory(previous_state)
        self._shape = tuple(map(int, state.shape))
        return state, memory


class _Cropping(_Decoding):
    output_size: tuple[int, int]
    scale: Any
    ratio: Any
    get_crop_generator: Any

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        """Memory for what goes out alone: where an image is decoded is a thread's own; ValueError for no pixels."""
        if min(self.output_size) < 1:
            raise ValueError(f"output_size is {self.output_size}; expected two sides of at least one pixel")
        self._shape = (int(self.output_size[0]), int(self.output_size[1]), 3)
        state = replace(previous_state, jit_mode=True, shape=self._shape, dtype=np.dtype("u1"))
        return state, _query(self._shape, np.dtype("u1"))

    def generate_code(self) -> Callable[..., Any]:
        """See `_Decoding`."""
        self._crop = _compiler.compile(self.get_crop_generator)
        self._limits = [np.array(part) if isinstance(part, tuple) else part for part in (self.scale, self.ratio)]
        return super().generate_code()

    def _box(self, height: int, width: int) -> tuple[int, int, int, int]:
        top, left, tall, wide = map(int, self._crop(height, width, *self._limits))
        return top, left, tall, wide

    def _put(self, pixels: np.ndarray, box: tuple[int, int, int, int], target: np.ndarray) -> None:
        height, width = pixels.shape[:2]
        top, left, tall, wide = box
        source, out = (0, pixels.ctypes.data, height, width), (target.ctypes.data, *target.shape[:2])
        _package.libffcv.ctypes_resize(*source, top, top + tall, left, left + wide, *out)


class RandomResizedCropRGBImageDecoder(_Cropping, _fields.RandomResizedCropRGBImageDecoder):
    """A random part of each image, drawn and resized as FFCV does (`output_size`, `scale`, `ratio`)."""


class CenterCropRGBImageDecoder(_Cropping, _fields.CenterCropRGBImageDecoder):
    """The middle of each image, resized as FFCV does (`output_size`, `ratio` of the shorter side, up to 1)."""

    def __init__(self, output_size: tuple[int, int], ratio: float) -> None:
        super().__init__(output_size, ratio)  # pyright: ignore[reportCallIssue]
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio is {ratio}; expected a share of the shorter side, above 0 and at most 1")
