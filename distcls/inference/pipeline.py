"""Images through a model: read and decoded by threads, in batches, answered in input order.

OpenCV and ONNX Runtime release the GIL, so threads decode and compute side by side. The model's
plan says how they share the work (see `distcls.inference.providers.plan`):

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
import dataclasses
import math
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from distcls.cores import available_cores
from distcls.errors import BadImage
from distcls.inference.batches import Batch, Images, of_source
from distcls.inference.inputs import Source
from distcls.inference.model import Model, answer_width
from distcls.inference.providers.plan import plan_of
from distcls.inference.stages import Stages

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
    source: Source,
    model: Model,
    *,
    indices: range | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    stages: Stages | None = None,
) -> Generator[Chunk, None, None]:
    """Run the inputs at `indices` (all by default) through the model, `batch_size` at a time.

    Yields chunks in the order of `indices`. An image that cannot be decoded, or for which the model
    gives no finite numbers, is an error in its chunk; nothing is raised for it. The batch size is
    that of the model's plan unless given; `stages` is told where the time goes.
    """
    indices = range(len(source)) if indices is None else indices
    size = batch_size or plan_of(model).batch_size
    stages = stages or Stages()
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


def _hand_over(future: Future[Chunk], stages: Stages) -> Iterator[Chunk]:
    chunk = future.result()
    stages.images += len(chunk.indices)
    with stages.measure("write"):
        yield chunk


class _Crew:
    """Threads that turn batches into chunks; this one's each do all of it (layout `workers`)."""

    def __init__(self, model: Model, stages: Stages, threads: int) -> None:
        self._model = model
        self._preprocess = model.card.preprocess
        self._stages = stages
        self._own = threading.local()
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        stages.threads = threads
        self.ahead = 2 * threads
        """Batches under way; one a thread, and as many finished or about to begin."""

    def submit(self, batch: Batch) -> Future[Chunk]:
        """Begin with a batch as soon as a thread is free."""
        return self._decoders.submit(self._whole, batch)

    def shutdown(self) -> None:
        """Finish what is under way, drop what has not begun."""
        self._decoders.shutdown(cancel_futures=True)

    def _whole(self, batch: Batch) -> Chunk:
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
        self, batch: Batch, images: Images, errors: list[str | None], places: range
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

    def _infer(self, batch: Batch, images: Images, errors: list[str | None]) -> Chunk:
        good = np.array([error is None for error in errors])
        logits = np.full((len(good), answer_width(self._model)), np.nan, np.float32)
        if good.any():
            with self._stages.measure("infer"):
                logits[good] = self._model.logits(images if good.all() else images[good])
        for place in np.flatnonzero(good & ~np.isfinite(logits).all(axis=1)):
            errors[place] = "the model's output is not finite"
            logits[place] = np.nan
        return Chunk(batch.indices, logits, errors)


class _Staged(_Crew):
    """Some threads decode, others compute (layout `stages`)."""

    def __init__(self, model: Model, stages: Stages, threads: int, callers: int, size: int) -> None:
        super().__init__(model, stages, threads)
        self._callers = ThreadPoolExecutor(callers, thread_name_prefix="infer")
        stages.threads = threads + callers
        self.ahead = callers + math.ceil(2 * threads * TASK / size)

    def submit(self, batch: Batch) -> Future[Chunk]:
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
        self, tasks: list[Future[None]], batch: Batch, images: Images, errors: list[str | None]
    ) -> Chunk:
        for task in tasks:
            task.result()
        return self._infer(batch, images, errors)


def _crew(model: Model, size: int, workers: int | None, stages: Stages) -> _Crew:
    plan = plan_of(model)
    if plan.layout == "workers":
        return _Crew(model, stages, workers or plan.callers)
    return _Staged(model, stages, workers or available_cores(), plan.callers, size)
