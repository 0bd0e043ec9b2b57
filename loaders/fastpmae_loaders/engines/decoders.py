"""Rows of a batch from .beton files, by compiled code: the one loop of the native and the FFCV engine.

Where each image lies is found by Python for a few rows at a time, which may open a part of a set; compiled code then
reads, decodes and shows them. Whether a sample is bad is Pillow's verdict, whichever decoder was tried before.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np

from fastpmae_loaders.engines.base import ATTEMPTS, Job, Located, Source, largest, make_job
from fastpmae_loaders.engines.scratch import Scratch
from fastpmae_loaders.engines.second_opinion import second_opinion
from fastpmae_loaders.engines.views import draw_row, show_row
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.jit.compiled import kernel
from fastpmae_loaders.jit.memory import bytes_at, fetch_add, read_into
from fastpmae_loaders.native.coefficients import unpack
from fastpmae_loaders.native.decoder import MARGIN, Workspace, decode, make_workspace, planes_size
from fastpmae_loaders.sources.beton import COEFFICIENTS, RAW
from fastpmae_loaders.sources.jpeg import TurboDecoders
from fastpmae_loaders.sources.markers import stands_alone
from fastpmae_loaders.sources.turbo import call_decoder

_TOGETHER = 16
"""Rows that a thread takes at a time, at most."""


@kernel
def _fill(
    rows, keys, indices, places, decoder, handle, second, seed, epoch, recipes, colours, work, scratch, bad, out
):  # fmt: skip
    """Show image i of `places`, sample indices[i], in row rows[i]; `bad` gets the i of what does not decode.

    JPEGs are decoded by libjpeg-turbo where `decoder` is its address, else by our own decoder. Returns how many failed.
    """
    target = np.int64(scratch.decoded.ctypes.data)
    stored = np.int64(scratch.stored.ctypes.data)
    failed = 0
    for i in range(rows.shape[0]):
        row, height, width, size = rows[i], places.height[i], places.width[i], places.size[i]
        shown = False
        if read_into(places.descriptor[i], stored, size, places.pointer[i]):
            # before the pixels: only what the views show need be decoded
            draw_row(row, keys[i], height, width, seed, epoch, recipes, scratch, out)
            pixels = target
            if places.mode[i] == RAW:
                pixels = stored
                shown = True
            elif places.mode[i] == COEFFICIENTS:
                shown = unpack(bytes_at(stored, size), height, width, out.boxes[row], target, work)
            else:
                if decoder:
                    shown = stands_alone(stored, size, height, width)
                    shown = shown and call_decoder(decoder, handle, stored, size, height, width, target) == 0
                else:
                    shown = decode(bytes_at(stored, size), height, width, out.boxes[row], target, work)
                shown = shown or call_decoder(second, 0, stored, size, height, width, target) == 0
            if shown:
                show_row(row, pixels, height, width, recipes, colours, scratch, out)
        out.index[row] = indices[i]
        if not shown:
            out.index[row] = -1
            bad[failed] = i
            failed += 1
    return failed


class RowDecoder:
    """Fills rows from the loader's threads, several at once on the same batch.

    Args:
        engine: what it is called in sentences.
        turbo: libjpeg-turbo's decoders; our own decoder without.
    """

    def __init__(self, source: Source, engine: str, turbo: TurboDecoders | None = None) -> None:
        if not isinstance(source.samples, Located):
            raise UserError(
                f"{source.samples.path}: the {engine} engine reads .beton files alone; write one with fastpmae-write, "
                "or use engine='torch'"
            )
        self._source, self._samples, self._turbo = source, source.samples, turbo
        self._recipes = source.recipes()
        self._second = int(ctypes.cast(second_opinion, ctypes.c_void_p).value or 0)
        self._sizes = largest(self._samples)
        self._idle: list[Workspace] = []
        # of no rows, so that what is compiled is there before the threads are
        nothing = np.empty(0, np.int64)
        places, _ = self._samples.locate(nothing)
        with self._memory() as (handle, work):
            self._show(make_job(nothing, 0, source), nothing, nothing, nothing, places, handle, work, source.scratch())

    def fill(self, job: Job, scratch: Scratch) -> int:
        """See Engine."""
        count, done = len(job.indices), 0
        together = max(1, min(_TOGETHER, count // (4 * self._source.workers)))
        # what lies in one part of a set is taken together, so that few parts are open at a time
        part_of = getattr(self._samples, "part_of", None)
        order = np.arange(count) if part_of is None else np.argsort(part_of(job.indices), kind="stable")
        with self._memory() as (handle, work):
            # a stream that is closed sets the counter to the end
            while (start := int(fetch_add(job.counter)) * together) < count:
                rows = order[start : start + together]
                self._fill(job, rows, handle, work, scratch)
                done += len(rows)
        return done

    def _fill(self, job: Job, rows: np.ndarray, handle: int, work: Workspace, scratch: Scratch) -> None:
        """Rows of a job; for what does not decode the samples after it are tried."""
        source, indices, keys = self._source, job.indices[rows], job.keys[rows]
        for _ in range(min(ATTEMPTS, len(self._samples))):
            # their files stay open as long as `held` is
            places, held = self._samples.locate(indices)
            job.label[rows] = places.label
            bad = self._show(job, rows, keys, indices, places, handle, work, scratch)
            del held
            if not len(bad):
                return
            rows = rows[bad]
            indices = keys = np.array([source.after(int(index)) for index in indices[bad]], np.int64)

    def _show(
        self,
        job: Job,
        rows: np.ndarray,
        keys: np.ndarray,
        indices: np.ndarray,
        places: object,
        handle: int,
        work: Workspace,
        scratch: Scratch,
    ) -> np.ndarray:
        """One attempt at some rows: those of them that did not decode, by their places among them."""
        source, bad = self._source, np.empty(len(rows), np.int64)
        function = 0 if self._turbo is None else self._turbo.function
        failed = _fill(
            rows, keys, indices, places, function, handle, self._second,
            source.seed, job.epoch, self._recipes, source.colours, work, scratch, bad, job.rows,
        )  # fmt: skip
        return bad[:failed]

    @contextmanager
    def _memory(self) -> Iterator[tuple[int, Workspace]]:
        """A decoder of libjpeg-turbo (0 without) and a workspace of ours that no other thread has meanwhile."""
        try:
            work = self._idle.pop()
        except IndexError:
            height, width, pixels, stored = self._sizes
            # of the sides alone it would be too much where no image has both
            most = 3 * (pixels + height * (31 + 2 * MARGIN) + 15 * width + 15 * (31 + 2 * MARGIN))
            work = make_workspace(height, width, stored, min(int(planes_size(height, width)), most))
        try:
            with nullcontext(0) if self._turbo is None else self._turbo.lend() as handle:
                yield handle, work
        finally:
            self._idle.append(work)

    def close(self) -> None:
        """Nothing is held."""
