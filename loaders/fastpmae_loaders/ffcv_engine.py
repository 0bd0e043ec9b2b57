"""The FFCV engine: a decoder operation of our own inside FFCV's Loader, one libjpeg-turbo decode a sample.

FFCV's Loader opens the file, compiles the pipeline and keeps its memory map; its own iterator thread is not
used, since an exception there leaves the consumer waiting for ever and an epoch left early leaves the
thread. FFCV also sets torch's number of threads, on import and on every Loader: it is put back.
"""

import ctypes
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numba
import numba.typed
import numpy as np
import torch
from numba import objmode

from .beton import RAW, Beton
from .compiled import helper, kernel
from .engine import ATTEMPTS, Job, Source, make_job
from .errors import UserError
from .scratch import Scratch, scratch_for
from .vectors import call_decoder, fetch_add, load_byte
from .views import Rows, fill_row

_MISSING = (
    "the FFCV loader needs the package ffcv, which is not installed here: pip install ffcv (on Linux, with "
    "libturbojpeg and OpenCV's headers), or use engine='torch'"
)


class Images(NamedTuple):
    """Where each image of a file lies and what it is, as compiled code reads it."""

    pointer: np.ndarray
    size: np.ndarray
    height: np.ndarray
    width: np.ndarray
    mode: np.ndarray


@helper
def _jpeg_has_size(address, size, height, width):
    """Does the JPEG's own header say height x width? The metadata, which sized the buffer, may not lie."""
    at = 2
    while at + 9 <= size:
        if load_byte(address + at) != 0xFF:
            at += 1
            continue
        code = load_byte(address + at + 1)
        if code == 0xFF:
            at += 1
        elif code == 0 or code == 1 or 0xD0 <= code <= 0xD7:
            at += 2
        elif 0xC0 <= code <= 0xCF and code != 0xC4 and code != 0xC8 and code != 0xCC:
            high = load_byte(address + at + 5) * 256 + load_byte(address + at + 6)
            wide = load_byte(address + at + 7) * 256 + load_byte(address + at + 8)
            return high == height and wide == width
        else:
            at += 2 + load_byte(address + at + 2) * 256 + load_byte(address + at + 3)
    return False


@kernel
def _fill(counter, indices, images, data, decoder, seed, epoch, recipe, shorter, scratch, out):
    """Rows of a batch until none is left to take; how many were done here."""
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
            source = data + np.int64(images.pointer[index])
            size = np.int64(images.size[index])
            if images.mode[index] == RAW:
                pixels = source
            elif _jpeg_has_size(source, size, height, width) and (
                call_decoder(decoder, source, size, height, width, target) == 0
            ):
                pixels = target
            else:
                index = (index + 1) % count
                continue
            fill_row(row, index, pixels, height, width, seed, epoch, recipe, shorter, scratch, out)
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


def _import_ffcv() -> Any:
    with _thread_counts_kept(), _plain_dict(), warnings.catch_warnings():
        # it imports distutils and builds syntax trees in deprecated ways
        warnings.simplefilter("ignore")
        try:
            import ffcv
            import ffcv.fields
            import ffcv.libffcv
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

    OSCacheManager.state_type = property(lambda self: state)  # pyright: ignore[reportAttributeAccessIssue]
    OSCacheManager.compile_reader = compile_reader


# the compiled pipeline finds its operation here by number; dropping the operation clears its entry
_operations: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


def _run(number: int, indices: np.ndarray, rows: tuple[np.ndarray, ...]) -> None:
    _operations[number].run(indices, Rows(*rows))


def _operation_class(ffcv: Any) -> Any:
    query = ffcv.pipeline.allocation_query.AllocationQuery

    class PairDecoder(ffcv.pipeline.operation.Operation):
        """Decodes a sample once and emits its Rows.

        In FFCV's own iterator the memory of the outputs is the ring that FFCV allocates; the decoded image
        lies in the thread's scratch, never in the ring, whose size would be that of the largest image
        times the batch. `epoch` is the epoch whose views are drawn.
        """

        def __init__(self, source: Source) -> None:
            super().__init__()
            self.epoch = 0
            self._source = source
            self._recipe = source.settings.recipe()
            beton = source.beton
            # copies: arrays that may not be written to are another type to numba
            self._images = Images(*(np.array(getattr(beton, name)) for name in Images._fields))
            self._data = int(beton.data.ctypes.data)
            function = ctypes.cast(ffcv.libffcv.ctypes_imdecode, ctypes.c_void_p).value
            self._decoder = int(function or 0)
            self._thread = threading.local()
            _operations[id(self)] = self

        def work_on(self, job: Job, scratch: Scratch) -> None:
            """What the calling thread's next entry into the pipeline works on."""
            self._thread.job, self._thread.scratch = job, scratch

        def run(self, indices: np.ndarray, rows: Rows) -> None:
            """Entered from the compiled pipeline: take rows of this thread's job until none is left."""
            here, source = self._thread, self._source
            job: Job | None = getattr(here, "job", None)
            if getattr(here, "scratch", None) is None:
                here.scratch = scratch_for(source.beton, source.settings)
            counter = np.zeros(1, np.int64) if job is None else job.counter
            here.done = _fill(
                counter, np.ascontiguousarray(indices, np.int64), self._images, self._data, self._decoder,
                source.seed, self.epoch if job is None else job.epoch, self._recipe, source.shorter,
                here.scratch, rows,
            )  # fmt: skip

        @property
        def done(self) -> int:
            """Rows that the calling thread did when it was last in the pipeline."""
            return self._thread.done

        def declare_state_and_memory(self, previous_state: Any) -> Any:
            settings = self._source.settings
            side, visible = settings.image_size, settings.visible
            view = query((3, side, side), np.dtype("u1"))
            memory = (
                view,
                view,
                query((visible,), np.dtype("i8")),
                query((settings.patches - visible,), np.dtype("i8")),
                query((2, 4), np.dtype("i4")),
                query((2,), np.dtype("?")),
                query((2,), np.dtype("i4")),
                query((), np.dtype("i8")),
            )
            return replace(previous_state, jit_mode=True, shape=view.shape, dtype=view.dtype), memory

        def generate_code(self) -> Any:
            number = id(self)

            # thin on purpose: FFCV compiles this anew for every loader, and what it calls comes from numba's cache
            def decode(batch_indices, destination, metadata, storage_state):
                with objmode():
                    _run(number, batch_indices, destination)
                return destination

            return decode

    return PairDecoder


class _EpochOrder:
    """FFCV's traversal order: whatever the loader set last."""

    def __init__(self, indices: np.ndarray) -> None:
        self.indices = indices

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.indices


def open_ffcv(source: Source, batch_size: int) -> tuple[Any, Any]:
    """An `ffcv.loader.Loader` of the file with our decoder as the one pipeline, and the decoder."""
    ffcv = _import_ffcv()
    path = str(source.beton.path)
    base = ffcv.traversal_order.base.TraversalOrder

    class Order(_EpochOrder, base):
        # FFCV asks for an instance and then calls it with the loader
        def __call__(self, loader: Any) -> "Order":
            return self

    try:
        reader = ffcv.reader.Reader(path)
        kind = ffcv.fields.RGBImageField
        image = next(name for name, handler in reader.handlers.items() if isinstance(handler, kind))
        operation = _operation_class(ffcv)(source)
        pipelines: dict[str, Any] = dict.fromkeys(reader.handlers)
        pipelines[image] = ffcv.loader.loader.PipelineSpec(image, decoder=operation)
        with _thread_counts_kept():
            loader = ffcv.loader.Loader(
                path,
                batch_size=batch_size,
                num_workers=1,
                seed=0,
                order=Order(np.arange(len(source.beton), dtype=np.uint64)),
                pipelines=pipelines,
                drop_last=False,
                batches_ahead=1,
            )
    except (KeyError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: FFCV cannot open it ({error}); write it anew with fastpmae-write") from None
    # per-sample sets and dicts that only FFCV's page cache would read: hundreds of bytes a sample
    manager = loader.memory_manager
    manager.sample_to_pages = manager.page_to_samples = manager.ptr_to_size = {}
    return loader, operation


class FFCVEngine:
    """Runs FFCV's compiled pipeline from the loader's threads, several at once on the same batch."""

    def __init__(self, source: Source) -> None:
        self._beton: Beton = source.beton
        self._loader, self._operation = open_ffcv(source, 64)
        self._memory = self._loader.memory_manager.schedule_epoch([])
        self._memory.__enter__()
        (stage, _), *rest = self._loader.code[0]
        assert not rest
        self._stage = stage
        (self._node,) = self._loader.graph.id_to_node
        # compile now, on an empty batch: numba warns that Python code within the pipeline holds the lock, which
        # is what it is for, and warnings may be errors where the threads run
        nothing = make_job(np.zeros(0, np.int64), 0, source.settings, source.shorter == 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.fill(nothing, scratch_for(source.beton, source.settings))

    def fill(self, job: Job, scratch: Scratch) -> int:
        """See Engine."""
        self._operation.work_on(job, scratch)
        self._stage(
            batch_indices=job.indices,
            metadata=self._loader.reader.metadata,
            storage_state=self._memory.state,
            **{f"memory_{self._node}": tuple(job.rows), f"shared_memory_{self._node}": None},
        )
        return self._operation.done
