"""Features.

OpenCV and ONNX Runtime release the GIL, so threads decode and compute side by side. The model's
plan says how they share the work (see `distcls.runtime.providers`):

- workers: each thread takes a batch, decodes it and computes it. Nothing is handed over, and as
  many threads as cores keep all cores busy.
- stages: threads decode the next batches while others compute; for GPUs, and for models that
  answer one batch with all cores.

Only a few batches are under way at a time, whatever the number of images.

A batch is always the same run of consecutive inputs, so its content depends neither on timing nor
on which images are bad; a bad image makes its batch smaller and leaves the others as they are.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distcls.data.source import ImageSource
from distcls.errors import BadImage
from distcls.imaging import Preprocess
from distcls.plotting import draw_profile
from distcls.runtime.model import Floats, Model
from distcls.system import available_cores

Images = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class InputBatch:
    """A run of inputs, and how to load the one at a place of it."""

    indices: range
    """Which inputs."""
    load: Callable[[int], Images]
    """Decodes the one at a place of the batch."""
    ready: Images | None = None
    """All of them, [n, H, W, 1 or 3], if they need no preprocessing."""


def of_source(
    source: ImageSource, preprocess: Preprocess, indices: range, size: int
) -> Iterator[InputBatch]:
    """The inputs at `indices`, `size` at a time."""
    ready = _ready_array(source, preprocess)
    for start in range(0, len(indices), size):
        run = indices[start : start + size]

        def load(place: int, run: range = run) -> Images:
            return source.load(run[place])

        rows = None if ready is None else ready[run.start : run.stop : run.step]
        yield InputBatch(run, load, ready=rows)


def _ready_array(source: ImageSource, preprocess: Preprocess) -> Images | None:
    """The source's array if preprocessing would leave its images (all of one shape) as they are."""
    if source.uniform is None or not len(source.uniform):
        return None
    first = np.asarray(source.uniform[0])
    return source.uniform if preprocess(first) is first else None


class Profiler:
    """Seconds of each stage, added up over the threads; safe to be used by all of them.

    decode: reading, decoding and resizing. infer: the model. write: what whoever takes the answers
    does with them, in its own thread. wait: what is left of the threads' time. A stage that shares
    a core with others takes longer by the clock, so with more threads than cores the seconds say
    where threads were, not what the work would cost alone.
    """

    def __init__(self) -> None:
        self.threads = 0
        """Threads that decode or infer."""
        self.images = 0
        """Images that were answered."""
        self.seconds = 0.0
        """From the first image asked for to the last answer taken, by the clock."""
        self._spent = {"decode": 0.0, "infer": 0.0, "write": 0.0}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            with self._lock:
                self._spent[stage] += spent

    def spent(self, stage: str) -> float:
        """Seconds of a stage; of `wait` those in which the working threads did neither."""
        if stage == "wait":
            busy = self._spent["decode"] + self._spent["infer"]
            return max(0.0, self.threads * self.seconds - busy)
        return self._spent[stage]

    def draw(self, path: Path, title: str = "") -> None:
        """Draw a bar for the working threads and one for the thread that writes, as a PNG.

        Raises UsageError without matplotlib.
        """
        whole = max(self.seconds, 1e-9)
        working = f"{self.threads} working thread" + "s" * (self.threads != 1)
        write = self.spent("write")
        rows = {
            working: (
                self.threads * whole,
                {name: self.spent(name) for name in ("decode", "infer", "wait")},
            ),
            "writing thread": (whole, {"write": write, "wait": max(0.0, whole - write)}),
        }
        rate = f"{self.images:,} images, {self.images / whole:,.0f} images/s"
        below = f"percent of {whole:.2f} s, {rate}"
        draw_profile(rows, path, title=title or "where the time goes", below=below)

    def to_json(self) -> dict[str, float | int]:
        """Plain values, in seconds."""
        stages = {name: round(self.spent(name), 3) for name in ("decode", "wait", "infer", "write")}
        return {
            "images": self.images,
            "threads": self.threads,
            "seconds": round(self.seconds, 3),
            **stages,
        }


TASK = 8
"""Images that a thread takes at a time: handing over costs 20 to 30 us, decoding a 28x28 PNG 30."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The answers to a run of inputs."""

    indices: range
    """Which inputs of the source."""
    logits: NDArray[np.float32]
    """[n, K]; NaN where there is an error."""
    errors: list[str | None]
    """Why an image has no answer."""


def stream(
    source: ImageSource,
    model: Model,
    *,
    indices: range | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    stages: Profiler | None = None,
) -> Generator[Chunk, None, None]:
    """Run the inputs at `indices` (all by default) through the model, `batch_size` at a time.

    Yields chunks in the order of `indices`. An image that cannot be decoded, or for which the model
    gives no finite numbers, is an error in its chunk; nothing is raised for it. The batch size is
    that of the model's plan unless given; `stages` is told where the time goes.
    """
    indices = range(len(source)) if indices is None else indices
    size = batch_size or model.execution.batch_size
    stages = stages or Profiler()
    crew = _crew(model, size, workers, stages)
    waiting: collections.deque[Future[Chunk]] = collections.deque()
    began = time.perf_counter()
    try:
        for batch in of_source(source, model.card.preprocess, indices, size):
            waiting.append(crew.submit(batch))
            if len(waiting) > crew.ahead:
                yield from _hand_over(waiting.popleft(), stages)
        while waiting:
            yield from _hand_over(waiting.popleft(), stages)
    finally:
        crew.shutdown()
        stages.seconds = time.perf_counter() - began


def _hand_over(future: Future[Chunk], stages: Profiler) -> Iterator[Chunk]:
    chunk = future.result()
    stages.images += len(chunk.indices)
    with stages.measure("write"):
        yield chunk


class _Crew:
    """Threads that turn batches into chunks; this one's each do all of it (layout `workers`)."""

    def __init__(self, model: Model, stages: Profiler, threads: int) -> None:
        self._model = model
        self._preprocess = model.card.preprocess
        self._stages = stages
        self._own = threading.local()
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        stages.threads = threads
        self.ahead = 2 * threads
        """Batches under way; one a thread, and as many finished or about to begin."""

    def submit(self, batch: InputBatch) -> Future[Chunk]:
        """Begin with a batch as soon as a thread is free."""
        return self._decoders.submit(self._whole, batch)

    def shutdown(self) -> None:
        """Finish what is under way, drop what has not begun."""
        self._decoders.shutdown(cancel_futures=True)

    def _whole(self, batch: InputBatch) -> Chunk:
        number = len(batch.indices)
        buffer = getattr(self._own, "buffer", None)
        if buffer is None or len(buffer) < number:  # kept: fresh memory costs a fault a page
            buffer = self._own.buffer = self._empty(number)
        images = buffer[:number]
        errors: list[str | None] = [None] * number
        self._decode(batch, images, errors, range(number))
        return self._infer(batch, images, errors)

    def _empty(self, number: int) -> Images:
        return np.empty((number, *self._preprocess.size, 3), np.uint8)

    def _decode(
        self, batch: InputBatch, images: Images, errors: list[str | None], places: range
    ) -> None:
        with self._stages.measure("decode"):
            if batch.ready is not None:
                here = slice(places.start, places.stop)
                images[here] = batch.ready[here]  # repeats a grey channel
                return
            for place in places:
                try:
                    images[place] = self._preprocess(batch.load(place))
                except BadImage as error:
                    errors[place] = str(error)

    def _infer(self, batch: InputBatch, images: Images, errors: list[str | None]) -> Chunk:
        good = np.array([error is None for error in errors])
        logits = np.full((len(good), self._model.output_width), np.nan, np.float32)
        if good.any():
            with self._stages.measure("infer"):
                logits[good] = self._model.logits(images if good.all() else images[good])
        for place in np.flatnonzero(good & ~np.isfinite(logits).all(axis=1)):
            errors[place] = "the model's output is not finite"
            logits[place] = np.nan
        return Chunk(batch.indices, logits, errors)


class _Staged(_Crew):
    """Some threads decode, others compute (layout `stages`)."""

    def __init__(
        self, model: Model, stages: Profiler, threads: int, streams: int, size: int
    ) -> None:
        super().__init__(model, stages, threads)
        self._callers = ThreadPoolExecutor(streams, thread_name_prefix="infer")
        stages.threads = threads + streams
        self.ahead = streams + math.ceil(2 * threads * TASK / size)

    def submit(self, batch: InputBatch) -> Future[Chunk]:
        number = len(batch.indices)
        images = self._empty(number)
        errors: list[str | None] = [None] * number
        step = number if batch.ready is not None else TASK
        tasks = [
            self._decoders.submit(
                self._decode, batch, images, errors, range(start, min(start + step, number))
            )
            for start in range(0, number, step)
        ]
        return self._callers.submit(self._gather, tasks, batch, images, errors)

    def shutdown(self) -> None:
        super().shutdown()  # first: a caller may be waiting for what is decoded, or cancelled, here
        self._callers.shutdown(cancel_futures=True)

    def _gather(
        self, tasks: list[Future[None]], batch: InputBatch, images: Images, errors: list[str | None]
    ) -> Chunk:
        for task in tasks:
            task.result()
        return self._infer(batch, images, errors)


def _crew(model: Model, size: int, workers: int | None, stages: Profiler) -> _Crew:
    execution = model.execution
    if execution.layout == "workers":
        return _Crew(model, stages, workers or execution.streams)
    return _Staged(model, stages, workers or available_cores(), execution.streams, size)


def split_features(chunk: Chunk, width: int) -> tuple[Chunk, Floats]:
    """A chunk of such answers as a plain chunk and the features, [n, width]; NaN for bad images."""
    classes = chunk.logits.shape[1] - width
    plain = dataclasses.replace(chunk, logits=chunk.logits[:, :classes])
    return plain, chunk.logits[:, classes:]
