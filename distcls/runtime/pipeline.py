"""Images through a model: threads that decode, preprocess and compute.

`stream` pulls a source through the model, `stream_batches` any number of small ones; `ImageQueue`
takes images one by one, from any number of threads. All decode, compute and check alike, so an
image has the same logits either way.

OpenCV and ONNX Runtime release the GIL, so threads decode and compute side by side. The layout of
the model's execution config (see `distcls.runtime.providers`) defines how they divide the work:

- workers: each thread takes a batch, decodes it and computes it. Nothing is handed over, and as
  many threads as cores keep all cores busy.
- stages: some threads decode the next batches while others compute; for GPUs, and for models that
  compute one batch with all cores.

A batch of `stream` is always the same run of consecutive inputs, so its content depends neither on
timing nor on which images are bad; a bad image makes its batch smaller and leaves the others as
they are. Only a few batches are under way at a time, whatever the number of images.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from distcls.data.source import ImageSource
from distcls.errors import BadImage, DistclsError, MachineError
from distcls.imaging import Preprocess
from distcls.imaging.reading import leave, patiently, result_of
from distcls.runtime.model import Floats, Model
from distcls.system import available_cores

Images = NDArray[np.uint8]
T = TypeVar("T")

DECODE_TASK = 8
"""Images that a thread takes at a time: handing over costs 20 to 30 us, decoding a 28x28 PNG 30."""
NOT_FINITE = "the model's output is not finite"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """The model's output for a run of inputs."""

    indices: range
    """Which inputs of the source."""
    logits: Floats
    """[n, K]; NaN where there is an error."""
    errors: list[str | None]
    """Why an image has no logits: it cannot be decoded, or they are not finite."""
    features: Floats | None = None
    """[n, D] if the model returns them; NaN where there is an error."""


class Profiler:
    """Seconds of each phase, added up over the threads; any thread may measure.

    decode: reading, decoding and resizing. infer: the model. write: what the consumer of a stream
    does with its chunks, in its own thread. wait: the rest of the threads' time. A phase that
    shares a core with another takes longer by the clock, so with more threads than cores the
    seconds show where threads were, not what the work would cost alone.
    """

    def __init__(self) -> None:
        self.threads = 0
        """Threads that decode or infer."""
        self.images = 0
        """Images that were predicted."""
        self.seconds = 0.0
        """From the first image read to the last chunk consumed, by the clock."""
        self._spent = {"decode": 0.0, "infer": 0.0, "write": 0.0}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time of a block to a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            with self._lock:
                self._spent[phase] += spent

    def spent(self, phase: str) -> float:
        """Seconds of a phase; of `wait` those in which the threads did neither."""
        if phase == "wait":
            busy = self._spent["decode"] + self._spent["infer"]
            return max(0.0, self.threads * self.seconds - busy)
        return self._spent[phase]

    def to_json(self) -> dict[str, float | int]:
        """Plain values, in seconds."""
        phases = {name: round(self.spent(name), 3) for name in ("decode", "wait", "infer", "write")}
        return {
            "images": self.images,
            "threads": self.threads,
            "seconds": round(self.seconds, 3),
            **phases,
        }


def stream(
    source: ImageSource,
    model: Model,
    *,
    indices: range | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    profiler: Profiler | None = None,
) -> Generator[Chunk, None, None]:
    """Run the inputs at `indices` (all by default) through the model, `batch_size` at a time.

    Yields chunks in the order of `indices`. An image that cannot be decoded, or for which the model
    gives no finite numbers, is an error in its chunk; nothing is raised for it. The batch size is
    by default that of the model's execution config, and so is the number of threads. Raises
    MachineError, with the image's name, where the machine cannot read or decode.
    """
    indices = range(len(source)) if indices is None else indices
    size = batch_size or model.execution.batch_size
    source = source.on_background(model.card.preprocess.background)
    batches = _batches(source, model.card.preprocess, indices, size)
    yield from _run(batches, model, size, workers, profiler or Profiler())


def stream_batches(
    sources: Iterable[ImageSource],
    model: Model,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Generator[Chunk, None, None]:
    """Run sources through the model, each of them as one batch; yields a chunk for each, in order.

    `sources` is consumed a few batches ahead of the chunks. Each has at least one image and at most
    the batch size, `image` blends transparent pixels with the model's background. Otherwise like
    `stream`.
    """
    size = batch_size or model.execution.batch_size
    batches = (_Batch(source, range(len(source)), ready=False) for source in sources)
    yield from _run(batches, model, size, workers, Profiler())


def _run(
    batches: Iterable[_Batch], model: Model, size: int, workers: int | None, profiler: Profiler
) -> Generator[Chunk, None, None]:
    pool = _open_pool(model, size, workers, profiler)
    pending: collections.deque[Future[Chunk]] = collections.deque()
    began = time.perf_counter()
    try:
        for batch in batches:
            pending.append(pool.submit(batch))
            if len(pending) > pool.prefetch:
                yield from _next_chunk(pending, profiler)
        while pending:
            yield from _next_chunk(pending, profiler)
    except BaseException as error:
        pool.leave(pending, error)
        raise
    finally:
        pool.shutdown()
        profiler.seconds = time.perf_counter() - began


def _next_chunk(pending: collections.deque[Future[Chunk]], profiler: Profiler) -> Iterator[Chunk]:
    chunk = result_of(pending[0])
    pending.popleft()
    profiler.images += len(chunk.indices)
    with profiler.measure("write"):
        yield chunk


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A run of inputs of a source."""

    source: ImageSource
    indices: range
    ready: bool
    """Whether they are rows of one array and need no preprocessing."""

    def load(self, position: int) -> Images:
        """The input at a position of the batch, decoded, uint8 RGB [h, w, 3]."""
        return self.source.image(self.indices[position])


def _batches(
    source: ImageSource, preprocess: Preprocess, indices: range, size: int
) -> Iterator[_Batch]:
    ready = _is_ready(source, preprocess)
    for start in range(0, len(indices), size):
        yield _Batch(source, indices[start : start + size], ready)


def _is_ready(source: ImageSource, preprocess: Preprocess) -> bool:
    """Whether its images are one array, of a shape that preprocessing leaves as it is."""
    if source.uniform is None or not len(source.uniform):
        return False
    first = source.rows([0])[0]
    return preprocess(first) is first


def _open_pool(model: Model, size: int, workers: int | None, profiler: Profiler) -> _WorkerPool:
    execution = model.execution
    if execution.layout == "workers":
        return _WorkerPool(model, profiler, workers or execution.streams)
    return _StagedPool(model, profiler, workers or available_cores(), execution.streams, size)


class _WorkerPool:
    """Threads that turn batches into chunks, each from beginning to end (layout `workers`)."""

    def __init__(self, model: Model, profiler: Profiler, threads: int) -> None:
        self._model = model
        self._preprocess = model.card.preprocess
        self._profiler = profiler
        self._local = threading.local()
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="distcls-decode")
        self._pools = [self._decoders]
        self._left = False
        profiler.threads = threads
        self.prefetch = 2 * threads
        """Batches under way; one a thread, and as many finished or about to begin."""

    def submit(self, batch: _Batch) -> Future[Chunk]:
        """Begin with a batch as soon as a thread is free."""
        return self._decoders.submit(self._run, batch)

    def shutdown(self) -> None:
        """Finish work in progress, drop work that has not begun."""
        for pool in self._pools:
            pool.shutdown(wait=not self._left, cancel_futures=True)

    def leave(self, pending: Iterable[Future[Chunk]], error: BaseException) -> None:
        """The same after an error, but a read that hangs is left behind."""
        for pool in self._pools:
            leave(pool, pending, error)
        self._left = True

    def _run(self, batch: _Batch) -> Chunk:
        number = len(batch.indices)
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < number:  # reused: fresh memory costs a fault a page
            buffer = self._local.buffer = self._empty(number)
        images = buffer[:number]
        errors: list[str | None] = [None] * number
        self._decode(batch, images, errors, range(number))
        return infer(self._model, batch.indices, images, errors, self._profiler)

    def _empty(self, number: int) -> Images:
        return np.empty((number, *self._preprocess.size, 3), np.uint8)

    def _decode(
        self, batch: _Batch, images: Images, errors: list[str | None], positions: range
    ) -> None:
        with self._profiler.measure("decode"):
            if batch.ready:
                run = slice(positions.start, positions.stop)
                images[run] = batch.source.rows(batch.indices[run])  # repeats a grey channel
                return
            for position in positions:
                load = functools.partial(self._load, batch, position)
                try:
                    images[position] = patiently(load)
                except BadImage as error:
                    errors[position] = str(error)
                except MachineError as error:
                    name = batch.source.image_ids[batch.indices[position]]
                    raise MachineError(f"{name}: {error}") from error

    def _load(self, batch: _Batch, position: int) -> Images:
        return self._preprocess(batch.load(position))


class _StagedPool(_WorkerPool):
    """Separate decoding and computing threads (layout `stages`)."""

    def __init__(
        self, model: Model, profiler: Profiler, threads: int, streams: int, size: int
    ) -> None:
        super().__init__(model, profiler, threads)
        self._streams = ThreadPoolExecutor(streams, thread_name_prefix="distcls-infer")
        # the decoders first: a stream may be waiting for them, or be cancelled
        self._pools.append(self._streams)
        profiler.threads = threads + streams
        self.prefetch = streams + math.ceil(2 * threads * DECODE_TASK / size)

    def submit(self, batch: _Batch) -> Future[Chunk]:
        number = len(batch.indices)
        images = self._empty(number)
        errors: list[str | None] = [None] * number
        step = number if batch.ready else DECODE_TASK
        tasks = [
            self._decoders.submit(
                self._decode, batch, images, errors, range(start, min(start + step, number))
            )
            for start in range(0, number, step)
        ]
        return self._streams.submit(self._gather, tasks, batch, images, errors)

    def _gather(
        self, tasks: list[Future[None]], batch: _Batch, images: Images, errors: list[str | None]
    ) -> Chunk:
        for task in tasks:
            task.result()
        return infer(self._model, batch.indices, images, errors, self._profiler)


def infer(
    model: Model, indices: range, images: Images, errors: list[str | None], profiler: Profiler
) -> Chunk:
    """The model's output for images [n, H, W, 3]; fills `errors` for non-finite rows."""
    good = np.array([error is None for error in errors])
    output = np.full((len(good), model.output_width), np.nan, np.float32)
    if good.any():
        with profiler.measure("infer"):
            output[good] = model.logits(images if good.all() else images[good])
    for position in np.flatnonzero(good & ~np.isfinite(output).all(axis=1)):
        errors[position] = NOT_FINITE
        output[position] = np.nan
    classes = len(model.card.classes)
    features = output[:, classes:] if output.shape[1] > classes else None
    return Chunk(indices=indices, logits=output[:, :classes], errors=errors, features=features)


class ImageQueue(Generic[T]):
    """Threads that predict images on arrival, batched with all others that are waiting.

    No timer delays an image: a free thread takes the waiting images, up to the batch size. Where
    multiple threads compute they divide a burst between them. Thread-safe.
    """

    def __init__(
        self,
        model: Model,
        convert: Callable[[Chunk, Sequence[str | None]], Sequence[T]],
        *,
        batch_size: int | None = None,
        workers: int | None = None,
    ) -> None:
        """`convert` turns a chunk and the names of its images into a result for each of them.

        It runs in the worker threads.
        """
        execution = model.execution
        size = batch_size or execution.batch_size
        self._model = model
        self._convert = convert
        self._profiler = Profiler()
        self._batchers: list[_Batcher[_Request[T]]]
        if execution.layout == "workers":
            threads = workers or execution.streams
            self._batchers = [_Batcher(self._run, threads, size, "predict")]
        else:
            threads = workers or available_cores()
            computing = _Batcher(self._compute, execution.streams, size, "infer")
            decoding = _Batcher(self._decode_for(computing), threads, 1, "decode")
            self._batchers = [decoding, computing]

    def submit(self, load: Callable[[], Images], image_id: str | None = None) -> Future[T]:
        """Predict the image that `load` returns, uint8 RGB [h, w, 3]; returns at once.

        `load` is called in a thread of the queue and raises BadImage for an image that is none.
        The future ends with the result, or raises what the model raised, or DistclsError if the
        queue was closed before the image's turn. Raises DistclsError if it is closed already.
        """
        request: _Request[T] = _Request(load, image_id)
        self._batchers[0].put(request)
        return request.future

    @property
    def waiting(self) -> int:
        """Images that no thread has taken yet."""
        return sum(batcher.waiting for batcher in self._batchers)

    def close(self) -> None:
        """Finish the batches under way; the futures of images still waiting raise DistclsError."""
        for batcher in self._batchers:
            for request in batcher.stop():
                request.fail(DistclsError(CLOSED))
            batcher.join()

    def _run(self, requests: list[_Request[T]]) -> None:
        self._compute([request for request in requests if self._decode(request)])

    def _decode_for(self, computing: _Batcher[_Request[T]]) -> Callable[[list[_Request[T]]], None]:
        def decode_then_put(requests: list[_Request[T]]) -> None:
            for request in requests:
                if self._decode(request):
                    try:
                        computing.put(request)
                    except RuntimeError as error:  # the interpreter is shutting down
                        request.fail(error)

        return decode_then_put

    def _decode(self, request: _Request[T]) -> bool:
        """Whether the request is to be computed; not if it was cancelled or has failed."""
        if not request.future.set_running_or_notify_cancel():
            return False
        try:
            with self._profiler.measure("decode"):
                request.image = self._model.card.preprocess(request.load())
        except BadImage as error:
            request.error = str(error)
        except MachineError as error:
            name = "" if request.image_id is None else f"{request.image_id}: "
            request.fail(MachineError(f"{name}{error}"))
            return False
        except Exception as error:  # a bug, and only in this image: its neighbours continue
            request.fail(error)
            return False
        request.load = _loaded
        return True

    def _compute(self, requests: list[_Request[T]]) -> None:
        if not requests:
            return
        try:
            blank = np.zeros((*self._model.card.preprocess.size, 3), np.uint8)
            images = np.stack([blank if r.image is None else r.image for r in requests])
            errors = [request.error for request in requests]
            indices = range(len(requests))
            chunk = infer(self._model, indices, images, errors, self._profiler)
            results = self._convert(chunk, [request.image_id for request in requests])
        except Exception as error:  # the threads live on, whatever a batch does
            for request in requests:
                request.fail(error)
            return
        for request, result in zip(requests, results, strict=True):
            request.future.set_result(result)


CLOSED = "the predictor is closed; distcls.load opens the model again"


def _loaded() -> Images:
    """Stands in for a request's `load`, which holds the undecoded image, once it was called."""
    raise AssertionError("an image is loaded once")


class _Request(Generic[T]):
    """An image on its way, with the future of its result."""

    def __init__(self, load: Callable[[], Images], image_id: str | None) -> None:
        self.load = load
        self.image_id = image_id
        self.image: Images | None = None
        """Preprocessed, [H, W, 3]."""
        self.error: str | None = None
        self.future: Future[T] = Future()

    def fail(self, error: Exception) -> None:
        """End the future with an error, unless its caller has cancelled it."""
        if self.future.running() or self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class _Batcher(Generic[T]):
    """A queue whose threads each take all waiting items, up to a number of items.

    A thread runs only while something waits, so an idle batcher that nobody closes keeps no
    process from ending.
    """

    def __init__(
        self, handle: Callable[[list[T]], None], threads: int, most: int, name: str
    ) -> None:
        """`handle` must not raise."""
        self._handle = handle
        self._threads = threads
        self._most = most
        self._items: collections.deque[T] = collections.deque()
        self._active = 0
        self._closed = False
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)

    @property
    def waiting(self) -> int:
        """Items that no thread has taken yet."""
        return len(self._items)

    def put(self, item: T) -> None:
        """Add an item. Raises DistclsError after `stop`."""
        with self._lock:
            if self._closed:
                raise DistclsError(CLOSED)
            if self._active < self._threads:
                self._executor.submit(self._drain)
                self._active += 1
            self._items.append(item)

    def stop(self) -> list[T]:
        """Accept nothing more; returns the items that no thread has taken."""
        with self._lock:
            self._closed = True
            left = list(self._items)
            self._items.clear()
        return left

    def join(self) -> None:
        """Wait for work in progress, after `stop`."""
        self._executor.shutdown()

    def _drain(self) -> None:
        while items := self._take():
            self._handle(items)

    def _take(self) -> list[T]:
        with self._lock:
            # divided among the threads: one that took all would leave the rest idle meanwhile
            number = min(self._most, math.ceil(len(self._items) / self._threads))
            if not number:
                self._active -= 1
            return [self._items.popleft() for _ in range(number)]
