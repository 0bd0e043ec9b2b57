"""The FFCV engine: a decoder operation of our own inside FFCV's Loader, one libjpeg-turbo decode a sample.

FFCV's Loader opens the file, builds the pipeline and keeps its memory map; its own iterator thread is not
used, since an exception there leaves the consumer waiting for ever and an epoch left early leaves the
thread. FFCV also sets torch's number of threads, on import and on every Loader: it is put back.

libjpeg-turbo is called by us, not by FFCV's `imdecode`, which asks for the fast DCT: pixels that are 0.8/255 darker on
average, for a few per cent of the time. Asked for the accurate one, it makes what Pillow makes, to the bit.

Whether a sample is bad is Pillow's verdict, as in the other engines: what libjpeg-turbo does not decode without a
warning, or with the tables of the image before it, is given to Pillow, which passes over most warnings and
refuses what is cut short.
"""

# ffcv is an extra, which may be missing
# pyright: reportMissingImports=false

import ctypes
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numba
import numba.typed
import numpy as np
import torch

from fastpmae_loaders.engines.base import ATTEMPTS, Job, Source, make_job
from fastpmae_loaders.engines.scratch import Scratch
from fastpmae_loaders.engines.second_opinion import images_of, second_opinion
from fastpmae_loaders.engines.views import Rows, draw_row, fill_row, show_row
from fastpmae_loaders.engines.workspaces import Workspaces
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.jit.compiled import kernel
from fastpmae_loaders.jit.memory import bytes_at, fetch_add, read_into
from fastpmae_loaders.native.coefficients import unpack
from fastpmae_loaders.sampling import CHOICES, FACTORS
from fastpmae_loaders.sources.beton import COEFFICIENTS, JPG, RAW, Beton
from fastpmae_loaders.sources.jpeg import TurboDecoders, turbo_available
from fastpmae_loaders.sources.markers import stands_alone
from fastpmae_loaders.sources.pictures import one_line
from fastpmae_loaders.sources.turbo import call_decoder

_MISSING = (
    "engine 'ffcv' needs the package ffcv, which is not installed here: pip install 'fastpmae-loaders[ffcv]' (a build "
    "that takes a C++ compiler and the headers of libturbojpeg and OpenCV; in a checkout, make setup FFCV=1), or use "
    "engine 'native', which gives the same bytes"
)


@kernel
def _fill(
    counter,
    indices,
    images,
    following,
    data,
    decoder,
    handle,
    second,
    seed,
    epoch,
    recipes,
    colours,
    work,
    scratch,
    out,
):
    """Rows of a batch until none is left to take; how many were done here.

    `data` is the address of the file's bytes, or, below 0, -1 minus the descriptor of the open file.
    """
    count = images.mode.shape[0]
    target = np.int64(scratch.decoded.ctypes.data)
    done = 0
    while True:
        row = fetch_add(counter)
        if row >= indices.shape[0]:
            return done
        done += 1
        index = indices[row]
        out.index[row] = -1
        for _ in range(min(ATTEMPTS, count)):
            height, width = images.height[index], images.width[index]
            source = np.int64(images.pointer[index])
            size = np.int64(images.size[index])
            if data < 0:
                here, source = source, np.int64(scratch.stored.ctypes.data)
                readable = read_into(-1 - data, source, size, here)
            else:
                source, readable = data + source, True
            if readable and images.mode[index] == COEFFICIENTS:
                # as far as the views show them, and so with the native engine's verdict on what is damaged
                draw_row(row, index, height, width, seed, epoch, recipes, scratch, out)
                if unpack(bytes_at(source, size), height, width, out.boxes[row], target, work):
                    show_row(row, target, height, width, recipes, colours, scratch, out)
                    break
                out.index[row] = -1
            if readable and images.mode[index] == RAW:
                pixels = source
            elif (readable and images.mode[index] == JPG) and (
                (
                    stands_alone(source, size, height, width)
                    and call_decoder(decoder, handle, source, size, height, width, target) == 0
                )
                or call_decoder(second, 0, source, size, height, width, target) == 0
            ):
                pixels = target
            else:
                index = following[index] if following.shape[0] else (index + 1) % count
                continue
            fill_row(row, index, pixels, height, width, seed, epoch, recipes, colours, scratch, out)
            break


@contextmanager
def _plain_dict() -> Iterator[None]:
    """FFCV keeps its two storage modes in a compiled numba dictionary, which costs every import four seconds.

    Only Python code ever reads it, so for the time of the import a Python dictionary takes its place.
    """
    typed: Any = numba.typed
    compiled = typed.Dict
    typed.Dict = dict
    try:
        yield
    finally:
        typed.Dict = compiled


@contextmanager
def _thread_counts_kept() -> Iterator[None]:
    before, compiled = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
        numba.set_num_threads(compiled)


def import_ffcv() -> Any:
    """The package, as it is told to leave the rest of the process alone. UserError where it is not to be had."""
    with _thread_counts_kept(), _plain_dict(), warnings.catch_warnings():
        # it imports distutils and builds syntax trees in deprecated ways
        warnings.simplefilter("ignore")
        try:
            import ffcv
            import ffcv.fields
            import ffcv.loader
            import ffcv.memory_managers
            import ffcv.pipeline.allocation_query
            import ffcv.pipeline.compiler
            import ffcv.pipeline.operation
            import ffcv.reader
            import ffcv.traversal_order.base
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "ffcv":
                raise UserError(_MISSING) from None
            raise UserError(f"the package ffcv is installed but {error.name!r}, which it needs, is not") from None
        except (ImportError, OSError) as error:
            raise UserError(f"the package ffcv is installed but does not load: {error}") from None
    if not turbo_available():
        raise UserError("the package ffcv is installed but was built without libjpeg-turbo's libturbojpeg")
    _leave_shared_types_alone(ffcv)
    return ffcv


def _leave_shared_types_alone(ffcv: Any) -> None:
    """Give FFCV's memory map a reader whose types are its own.

    FFCV declares the map read-only by changing numba's one and only uint8[::1], whose hash changes with it: every
    function that was compiled for such an array before is then lost to numba (a KeyError in the next compilation).
    """
    from ffcv.memory_managers import OSCacheManager

    data = numba.types.Array(numba.uint8, 1, "C", readonly=True)
    table = numba.types.Array(numba.uint64, 1, "C")
    state = numba.types.Tuple([data, table, table])

    def compile_reader(self: Any) -> Any:
        def region(pointer: Any, state: Any) -> Any:
            data, pointers, sizes = state
            return data[pointer : pointer + sizes[np.searchsorted(pointers, pointer)]]

        return ffcv.pipeline.compiler.Compiler.compile(region, data(numba.uint64, state))

    manager: Any = OSCacheManager
    manager.state_type = property(lambda self: state)
    manager.compile_reader = compile_reader


# FFCV compiles what it is given unless this switch of the whole process says no
_switch = threading.RLock()


@contextmanager
def _uncompiled(ffcv: Any) -> Iterator[None]:
    """Our operation is compiled already: FFCV's wrapping of it would take a second and 4 MB a loader, for ever."""
    compiler = ffcv.pipeline.compiler.Compiler
    with _switch:
        before = compiler.is_enabled
        compiler.set_enabled(False)
        try:
            yield
        finally:
            compiler.set_enabled(before)


@contextmanager
def _any_version(ffcv: Any, version: int) -> Iterator[None]:
    """FFCV refuses files with coefficients by their version: where our operation decodes them it need not."""
    with _switch:
        before = ffcv.reader.CURRENT_VERSION
        ffcv.reader.CURRENT_VERSION = version
        try:
            yield
        finally:
            ffcv.reader.CURRENT_VERSION = before


def _operation_class(ffcv: Any) -> Any:
    query = ffcv.pipeline.allocation_query.AllocationQuery

    class ViewsDecoder(ffcv.pipeline.operation.Operation):
        """Decodes a sample once and emits its Rows.

        In FFCV's own iterator the memory of the outputs is the ring that FFCV allocates; the decoded image
        lies in the thread's scratch, never in the ring, whose size would be that of the largest image
        times the batch. `epoch` is the epoch whose views are drawn.
        """

        def __init__(self, source: Source) -> None:
            super().__init__()
            self.epoch = 0
            self._source = source
            self._recipes = source.recipes()
            beton: Any = source.samples
            self._images = images_of(beton)
            self._data = -1 - beton.descriptor
            self._decoders = TurboDecoders()
            self._workspaces = Workspaces(self._images, (COEFFICIENTS,))
            self._second = int(ctypes.cast(second_opinion, ctypes.c_void_p).value or 0)
            self._thread = threading.local()

        def work_on(self, job: Job, scratch: Scratch) -> None:
            """What the calling thread's next entry into the pipeline works on."""
            self._thread.job, self._thread.scratch = job, scratch

        def run(self, indices: np.ndarray, memory: tuple[np.ndarray, ...]) -> None:
            """Entered from the pipeline: take rows of this thread's job until none is left.

            Where FFCV's own iterator is what runs the pipeline there is no job: then all rows of its `memory`.
            """
            here, source = self._thread, self._source
            job: Job | None = getattr(here, "job", None)
            if getattr(here, "scratch", None) is None:
                here.scratch = source.scratch()
            if job is None:
                views = len(source.views)
                addresses = np.array([view.ctypes.data for view in memory[:views]], np.int64)
                counter, epoch, rows = np.zeros(1, np.int64), self.epoch, Rows(addresses, *memory[views:])
            else:
                counter, epoch, rows = job.counter, job.epoch, job.rows
            with self._decoders.lend() as handle, self._workspaces.lend() as work:
                here.done = _fill(
                    counter, np.ascontiguousarray(indices, np.int64), self._images, source.following, self._data,
                    self._decoders.function, handle, self._second,
                    source.seed, epoch, self._recipes, source.colours, work, here.scratch, rows,
                )  # fmt: skip

        @property
        def done(self) -> int:
            """Rows that the calling thread did when it was last in the pipeline."""
            return self._thread.done

        def declare_state_and_memory(self, previous_state: Any) -> Any:
            source = self._source
            count = len(source.views)
            views = [query((3, view.size, view.size), np.dtype("u1")) for view in source.views]
            memory = (
                *views,
                query((source.visible,), np.dtype("i8")),
                query((source.patches - source.visible,), np.dtype("i8")),
                query((count, 4), np.dtype("i4")),
                query((count,), np.dtype("?")),
                query((count, FACTORS), np.dtype("f8")),
                query((count, CHOICES), np.dtype("u1")),
                query((2,), np.dtype("i4")),
                query((), np.dtype("i8")),
            )
            return replace(previous_state, jit_mode=True, shape=views[0].shape, dtype=views[0].dtype), memory

        def generate_code(self) -> Any:
            def decode(batch_indices, destination, metadata, storage_state):
                self.run(batch_indices, destination)
                return destination

            return decode

    return ViewsDecoder


class _EpochOrder:
    """FFCV's traversal order: whatever the loader set last."""

    def __init__(self, indices: np.ndarray) -> None:
        self.indices = indices

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.indices


def open_ffcv(source: Source, batch_size: int) -> tuple[Any, Any]:
    """An `ffcv.loader.Loader` of the file with our decoder as the one pipeline, and the decoder."""
    ffcv = import_ffcv()
    path, version = str(source.samples.path), cast(Beton, source.samples).version
    base = ffcv.traversal_order.base.TraversalOrder

    class Order(_EpochOrder, base):
        # FFCV asks for an instance and then calls it with the loader
        def __call__(self, loader: Any) -> "Order":
            return self

    try:
        with _any_version(ffcv, version), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = ffcv.reader.Reader(path)
    except Exception as error:  # it takes the fields that are not ours as they come
        raise UserError(
            f"{path}: FFCV cannot read its fields ({one_line(error)}); write it anew with fastpmae-write, or use "
            "engine='torch'"
        ) from None
    try:
        kind = ffcv.fields.RGBImageField
        image = next(name for name, handler in reader.handlers.items() if isinstance(handler, kind))
        operation = _operation_class(ffcv)(source)
        pipelines: dict[str, Any] = dict.fromkeys(reader.handlers)
        pipelines[image] = ffcv.loader.loader.PipelineSpec(image, decoder=operation)
        with _thread_counts_kept(), _any_version(ffcv, version), _uncompiled(ffcv), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader = ffcv.loader.Loader(
                path,
                batch_size=batch_size,
                num_workers=1,
                seed=0,
                order=Order(np.arange(len(source.samples), dtype=np.uint64)),
                pipelines=pipelines,
                drop_last=False,
                batches_ahead=1,
            )
    except (KeyError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: FFCV cannot open it ({one_line(error)}); write it anew with fastpmae-write") from None
    # per-sample sets and dicts that only FFCV's page cache would read: hundreds of bytes a sample
    manager = loader.memory_manager
    manager.sample_to_pages = manager.page_to_samples = manager.ptr_to_size = {}
    return loader, operation


class FFCVEngine:
    """Runs FFCV's compiled pipeline from the loader's threads, several at once on the same batch."""

    threads = None

    def __init__(self, source: Source) -> None:
        if not isinstance(source.samples, Beton):
            raise UserError(
                f"{source.samples.path}: the FFCV engine reads .beton files alone; write one with fastpmae-write, or "
                "use engine='torch'"
            )
        self._loader, self._operation = open_ffcv(source, 64)
        self._memory = self._loader.memory_manager.schedule_epoch([])
        self._memory.__enter__()
        (stage, _), *rest = self._loader.code[0]
        assert not rest
        self._stage = stage
        (self._node,) = self._loader.graph.id_to_node
        # on an empty batch, so that what is compiled is there before the threads are
        self.fill(make_job(np.zeros(0, np.int64), 0, source), source.scratch())

    def fill(self, job: Job, scratch: Scratch) -> int:
        """See Engine."""
        self._operation.work_on(job, scratch)
        self._stage(
            batch_indices=job.indices,
            metadata=self._loader.reader.metadata,
            storage_state=self._memory.state,
            **{f"memory_{self._node}": (job.counter,), f"shared_memory_{self._node}": None},
        )
        return self._operation.done

    def close(self) -> None:
        """The map goes with the engine."""
