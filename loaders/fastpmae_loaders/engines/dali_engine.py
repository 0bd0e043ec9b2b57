"""The DALI engine: NVIDIA's decoders and resize do a batch at a time, on the CPU or, for a CUDA device, on the GPU.

A job is cut into parts, and while DALI works on one the next is made ready. DALI gives a whole part up for one image
that does not decode: the part is then looked through with Pillow, what is broken replaced, and DALI asked again.

On a GPU nothing is waited for: a part's views are copied from DALI's memory on a stream of ours, DALI's own stream
waits there before that memory is used again, and an event behind the last copy tells who takes the batch when it is
there. Hardware decoders are the exception. They write without regard to what is queued on their stream (seen on an
H100, github.com/meta-pytorch/torchcodec/pull/1634), so with them a part begins when all of the one before is done.
"""

import ctypes
import importlib
import io
import os
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastpmae_loaders.engines.base import ATTEMPTS, Job, Source
from fastpmae_loaders.engines.dali_settings import PARTS
from fastpmae_loaders.engines.scratch import Scratch
from fastpmae_loaders.engines.torch_engine import decode
from fastpmae_loaders.errors import BetonError, UserError
from fastpmae_loaders.jit.compiled import kernel
from fastpmae_loaders.jit.memory import view_at
from fastpmae_loaders.pixels.colour import change_colours
from fastpmae_loaders.sampling import SampleDraws, draw_samples
from fastpmae_loaders.sources.beton import JPG, RAW
from fastpmae_loaders.sources.jpeg import check_scans, jpeg_header, segments_belong

_JOBS = 2
"""Jobs that may be under way on a GPU, whoever takes them."""
_MISSING = (
    "engine='dali' needs NVIDIA DALI, and {} is not installed here: pip install 'fastpmae-loaders[dali-cuda130]' "
    "(or [dali-cuda120], to fit the CUDA of your torch), or use another engine"
)
# what is known of a sample
_UNKNOWN, _PLAIN, _BY_PILLOW, _BROKEN = range(4)
_NOTHING = np.zeros(3, np.uint8)
"""A black pixel, which stands where no sample could be found."""


@dataclass
class _Part:
    """Rows start ... stop-1 of a job, which samples stand in them (-1 where there is none), and what DALI is given."""

    start: int
    stop: int
    samples: np.ndarray
    inputs: dict[str, Any]


@kernel
def _change_colours(start, stop, recipes, coloured, scratch, out):
    """Colours of finished views, as the other engines change them."""
    for row in range(start, stop):
        for view in range(recipes.shape[0]):
            if coloured[view]:
                side = recipes[view].side
                image = view_at(out.views[view] + row * 3 * side * side, side)
                threshold = recipes[view].solarise_threshold
                change_colours(image, out.factors[row, view], out.choices[row, view], threshold, scratch)


class DALIEngine:
    """Decodes, crops, flips and, on a GPU, changes the colours in one DALI pipeline.

    On the CPU the colours are left to the compiled functions of the other engines: the same bytes at a tenth of
    what DALI's own operators take there. The pipeline is made with the first job and given back by `close`.

    Raises:
        UserError: without the package.
    """

    threads = 1

    def __init__(self, source: Source) -> None:
        self._definition = _import_pipeline()
        self._source = source
        self._recipes = source.recipes()
        self._device = _cuda_device(source.device)
        self._kind = "cpu" if self._device is None else "gpu"
        self._part = source.dali.part or PARTS[self._kind]
        self._by_hardware = self._kind == "gpu" and source.dali.hw_decoder_load > 0
        self._coloured = np.array([source.colours and view.coloured for view in source.views], np.bool_)
        self._known = np.zeros(len(source.samples), np.uint8)
        # several streams may run at once, and there is one pipeline
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._pipeline: Any = None
        self._lost: Exception | None = None
        self._stream: torch.cuda.Stream | None = None
        self._under_way: deque[torch.cuda.Event] = deque()

    def fill(self, job: Job, scratch: Scratch) -> int:
        """See Engine."""
        count = len(job.indices)
        if count == 0:
            return 0
        if os.getpid() != self._process:
            raise UserError(
                "DALI's threads stayed in the process that this one was forked from: open a loader of its own here"
            )
        with self._lock:
            size = -(-count // max(1, -(-count // self._part)))
            waiting: deque[_Part] = deque()
            if self._device is not None:
                self._place_on_device(job)
            try:
                # a stream that is closed sets the counter to the end
                while (start := int(job.counter[0])) < count:
                    job.counter[0] = stop = min(start + size, count)
                    part = self._prepare(job, start, stop)
                    while len(waiting) >= (1 if self._by_hardware else 2):
                        self._finish(job, waiting, scratch)
                    self._schedule(part)
                    waiting.append(part)
                while waiting:
                    self._finish(job, waiting, scratch)
                if self._stream is not None:
                    job.ready = self._mark()
                    self._under_way.append(job.ready)
            except BaseException:
                self._pipeline = self._lost = None
                raise
        return count

    def close(self) -> None:
        """Give DALI's threads and memory back; they are made anew when needed."""
        if os.getpid() != self._process:  # neither is here
            return
        with self._lock:
            self._pipeline = None

    def _prepare(self, job: Job, start: int, stop: int) -> _Part:
        """Draw what is random about some rows and collect what DALI is to be given for them."""
        source, rows = self._source, job.rows
        found, data, raw = zip(*self._find_all(job.indices[start:stop]), strict=True)
        samples = np.array(found, np.int64)
        there = samples >= 0
        height = np.where(there, source.samples.height[np.maximum(samples, 0)], 1)
        width = np.where(there, source.samples.width[np.maximum(samples, 0)], 1)
        # what stands in for another sample is drawn by its own number
        wanted = job.indices[start:stop]
        keys = np.where(samples == wanted, job.keys[start:stop], np.maximum(samples, 0))
        draws = draw_samples(source.seed, job.epoch, keys, height, width, source.views, source.patches)
        here = slice(start, stop)
        rows.index[here] = samples
        job.label[here] = source.samples.label[np.maximum(samples, 0)]
        rows.size[here] = np.stack([height, width], 1)
        rows.boxes[here], rows.flips[here] = draws.boxes, draws.flips
        rows.factors[here], rows.choices[here] = draws.factors, draws.choices
        rows.visible[here], rows.folds[here] = np.split(draws.order, [source.visible], 1)
        hardware = chosen_for_hardware(samples, source.dali.hw_decoder_load)
        return _Part(start, stop, samples, self._inputs(list(data), np.array(raw), hardware, height, width, draws))

    def _inputs(
        self,
        data: list[np.ndarray],
        raw: np.ndarray,
        hardware: np.ndarray,
        height: np.ndarray,
        width: np.ndarray,
        draws: SampleDraws,
    ) -> dict[str, Any]:
        shape = np.stack([height, width, np.full_like(height, 3)], 1).astype(np.int32)
        inputs: dict[str, Any] = {"data": data, "raw": raw, "shape": shape}
        if self._definition.shares_decoders(self._kind, self._source.dali.hw_decoder_load):
            inputs["hardware"] = hardware
        views, colours = self._source.views, self._colours_in_pipeline
        return inputs | self._definition.view_inputs(views, draws, height, width, colours)

    def _schedule(self, part: _Part) -> None:
        """Give a part to DALI and let it begin.

        A pipeline that has failed at a part before it takes no more: `_finish` finds that out, and begins anew.
        """
        if self._lost is not None:
            return
        try:
            if self._pipeline is None:
                self._pipeline = self._make_pipeline()
            for name, values in part.inputs.items():
                self._pipeline.feed_input(name, values)
            self._pipeline.schedule_run()
        except Exception as error:
            self._lost = error

    def _finish(self, job: Job, waiting: deque[_Part], scratch: Scratch) -> None:
        """Wait for the first part that DALI works on and take its views."""
        while True:
            try:
                if self._lost is not None:
                    raise self._lost
                outputs = self._pipeline.share_outputs(cuda_stream=self._stream)
                break
            except Exception:
                if not self._look_through(waiting):
                    raise
                # its pipeline is no longer valid, and all that it was given is lost
                self._pipeline = self._lost = None
                parts = list(waiting)
                waiting.clear()
                for part in parts:
                    again = self._prepare(job, part.start, part.stop)
                    self._schedule(again)
                    waiting.append(again)
        part = waiting.popleft()
        for view, output in zip(job.views, outputs, strict=True):
            target = ctypes.c_void_p(view[part.start : part.stop].data_ptr())
            if self._stream is None:
                output.copy_to_external(target)
            else:
                output.copy_to_external(target, ctypes.c_void_p(self._stream.cuda_stream), non_blocking=True)
        self._pipeline.release_outputs()
        if self._by_hardware:
            self._mark().synchronize()
        if self._stream is None and self._coloured.any():
            _change_colours(part.start, part.stop, self._recipes, self._coloured, scratch, job.rows)

    @property
    def _colours_in_pipeline(self) -> bool:
        return self._source.colours and self._kind == "gpu"

    def _make_pipeline(self) -> Any:
        source = self._source
        pipeline = self._definition.views_pipeline(
            source.views,
            self._kind,
            self._colours_in_pipeline,
            source.dali.hw_decoder_load if self._by_hardware else 0.0,
            batch_size=self._part,
            num_threads=source.workers,
            device_id=None if self._device is None else self._device.index,
        )
        pipeline.build()
        if self._by_hardware:
            self._settle(pipeline)
        return pipeline

    def _settle(self, pipeline: Any) -> None:
        """Let a whole part of small JPEGs through.

        How many of a batch the hardware takes is settled by nvImageCodec with the first batch, for good: after one
        that was smaller, the last images of a part would go to the other decoder.
        """
        file = io.BytesIO()
        Image.new("RGB", (64, 64)).save(file, "jpeg")
        height = width = np.full(self._part, 64)
        draws = draw_samples(0, 0, np.arange(self._part), height, width, self._source.views)
        every, none = np.ones(self._part, np.bool_), np.zeros(self._part, np.bool_)
        jpegs = [np.frombuffer(file.getvalue(), np.uint8)] * self._part
        for name, values in self._inputs(jpegs, none, every, height, width, draws).items():
            pipeline.feed_input(name, values)
        pipeline.schedule_run()
        # without a stream the outputs are there when this returns
        pipeline.share_outputs()
        pipeline.release_outputs()

    def _place_on_device(self, job: Job) -> None:
        """Memory for the job's views on the GPU, of a stream of our own so that no training step is waited for."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        # whoever takes batches may be far ahead of the GPU, and its memory is worth more than a wait here
        while len(self._under_way) >= _JOBS:
            self._under_way.popleft().synchronize()
        count = len(job.indices)
        with torch.cuda.stream(self._stream):
            job.views = [
                torch.empty(count, 3, view.size, view.size, dtype=torch.uint8, device=self._device)
                for view in self._source.views
            ]

    def _mark(self) -> torch.cuda.Event:
        """An event behind all that our stream has to do; who waits for it leaves its core to others."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def _find_all(self, indices: np.ndarray) -> list[tuple[int, np.ndarray, bool]]:
        wanted = indices.tolist()
        by_pillow = (self._source.samples.mode[indices] > RAW) | (self._known[indices] == _BY_PILLOW)
        if by_pillow.sum() < 2 or self._source.workers == 1:
            return [self._find(index) for index in wanted]
        with ThreadPoolExecutor(self._source.workers, "fastpmae-loader-pillow") as pool:
            return list(pool.map(self._find, wanted))

    def _find(self, index: int) -> tuple[int, np.ndarray, bool]:
        """The sample asked for or the next good one (-1 for none), its bytes, and whether they are pixels."""
        count = len(self._source.samples)
        for _ in range(min(ATTEMPTS, count)):
            found = self._payload(index)
            if found is not None:
                return index, *found
            index = self._source.after(index)
        return -1, _NOTHING, True

    def _payload(self, index: int) -> tuple[np.ndarray, bool] | None:
        """What DALI is given for a sample: a JPEG that it is sure to read as we would, or pixels."""
        samples, known = self._source.samples, self._known
        if known[index] == _BROKEN:
            return None
        if known[index] != _BY_PILLOW and samples.mode[index] in (JPG, RAW):
            try:
                payload = samples.payload(index)
            except UserError:  # a file that has gone
                return None
            if samples.mode[index] == RAW:
                return payload, True
            if known[index] == _PLAIN or _is_plain(payload, int(samples.height[index]), int(samples.width[index])):
                known[index] = _PLAIN
                return payload, False
        pixels = decode(samples, index)
        known[index] = _BROKEN if pixels is None else _BY_PILLOW
        return None if pixels is None else (pixels.reshape(-1), True)

    def _look_through(self, parts: Iterable[_Part]) -> bool:
        """After a failure: decode what DALI decoded; false where that could not be the reason.

        Any of the parts may be at fault, since DALI works ahead. Where Pillow finds nothing wrong, Pillow is to decode
        all of the first one that DALI decoded from now on.
        """
        suspects = [[int(i) for i in part.samples if i >= 0 and self._known[i] == _PLAIN] for part in parts]
        suspects = [some for some in suspects if some]
        broken = [index for some in suspects for index in some if decode(self._source.samples, index) is None]
        if broken:
            self._known[broken] = _BROKEN
        elif suspects:
            self._known[suspects[0]] = _BY_PILLOW
        return bool(suspects)


def chosen_for_hardware(samples: np.ndarray, share: float) -> np.ndarray:
    """Whether each sample [n] is among the share that a decoder in hardware decodes, by its number alone: bool [n]."""
    # multiples of the golden ratio fall evenly, whichever numbers in a row are looked at
    return (samples.astype(np.uint64) * np.uint64(2654435769)) % np.uint64(1 << 32) < share * (1 << 32)


def _is_plain(payload: np.ndarray, height: int, width: int) -> bool:
    """Is it a JPEG of this size in gray or YCbCr, and whole, so that its decoding leaves nothing to choose?"""
    if not (_has_end(payload) and segments_belong(payload)):
        return False
    try:
        header = jpeg_header(payload)
        check_scans(payload)
    except BetonError:
        return False
    colours = len(header.component_ids) == 1 or header.is_ycbcr
    return header.is_ordinary and colours and (header.height, header.width) == (height, width)


def _has_end(payload: np.ndarray) -> bool:
    """Whether a JPEG's end is there, perhaps with some padding behind it: not every decoder complains without."""
    return b"\xff\xd9" in payload[-64:].tobytes()


def _cuda_device(device: torch.device | None) -> torch.device | None:
    """The GPU with its number, which another thread would take for 0; None where it is no GPU."""
    if device is None or device.type != "cuda":
        return None
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def _import_pipeline() -> Any:
    try:
        importlib.import_module("nvidia.nvimgcodec")  # without it DALI decodes nothing
        from fastpmae_loaders.engines import dali_pipeline
    except ModuleNotFoundError as error:
        raise UserError(_MISSING.format(f"the package {error.name}")) from None
    except (ImportError, OSError) as error:
        raise UserError(f"NVIDIA DALI is installed but does not load: {error}") from None
    return dali_pipeline
