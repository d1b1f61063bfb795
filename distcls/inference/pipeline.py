"""Images through a model: decoded by threads, in batches, answered in input order.

OpenCV and ONNX Runtime release the GIL, so threads decode the next batches while the model works on
this one. Only a few batches are in memory at a time, whatever the number of images.

A batch is always the same run of consecutive inputs, so its content depends neither on timing nor
on which images are bad; a bad image makes its batch smaller and leaves the others as they are.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from distcls.cores import available_cores
from distcls.errors import BadImage
from distcls.imaging import Preprocess
from distcls.inference.inputs import Source
from distcls.inference.model import Model

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


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A batch that is being filled."""

    indices: range
    images: NDArray[np.uint8]
    errors: list[str | None]
    tasks: list[Future[None]]


def stream(
    source: Source,
    model: Model,
    *,
    indices: range | None = None,
    batch_size: int,
    workers: int | None = None,
) -> Generator[Chunk, None, None]:
    """Run the inputs at `indices` (all by default) through the model, `batch_size` at a time.

    Yields chunks in the order of `indices`. An image that cannot be decoded, or for which the model
    gives no finite numbers, is an error in its chunk; nothing is raised for it.
    """
    indices = range(len(source)) if indices is None else indices
    workers = workers or available_cores()
    ahead = 1 + math.ceil(2 * workers * TASK / batch_size)
    waiting: collections.deque[_Batch] = collections.deque()
    loader = _Loader(source, model.card.preprocess)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for start in range(0, len(indices), batch_size):
            waiting.append(loader.submit(pool, indices[start : start + batch_size]))
            if len(waiting) > ahead:
                yield _answer(model, waiting.popleft())
        while waiting:
            yield _answer(model, waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


class _Loader:
    """Fills batches with preprocessed images."""

    def __init__(self, source: Source, preprocess: Preprocess) -> None:
        self._source = source
        self._preprocess = preprocess
        self._ready = _ready_array(source, preprocess)

    def submit(self, pool: ThreadPoolExecutor, indices: range) -> _Batch:
        """A batch whose images arrive when its tasks are done."""
        images = np.empty((len(indices), *self._preprocess.size, 3), np.uint8)
        errors: list[str | None] = [None] * len(indices)
        batch = _Batch(indices, images, errors, [])
        if self._ready is not None:
            batch.tasks.append(pool.submit(self._gather, batch))
        else:
            for start in range(0, len(indices), TASK):
                batch.tasks.append(pool.submit(self._decode, batch, start))
        return batch

    def _gather(self, batch: _Batch) -> None:
        assert self._ready is not None
        run = batch.indices
        batch.images[:] = self._ready[run.start : run.stop : run.step]  # repeats a grey channel

    def _decode(self, batch: _Batch, start: int) -> None:
        for place in range(start, min(start + TASK, len(batch.indices))):
            try:
                image = self._source.load(batch.indices[place])
                batch.images[place] = self._preprocess(image)
            except BadImage as error:
                batch.errors[place] = str(error)


def _ready_array(source: Source, preprocess: Preprocess) -> NDArray[np.uint8] | None:
    """The source's array if preprocessing would leave its images (all of one shape) as they are."""
    if source.uniform is None or not len(source.uniform):
        return None
    first = np.asarray(source.uniform[0])
    return source.uniform if preprocess(first) is first else None


def _answer(model: Model, batch: _Batch) -> Chunk:
    for task in batch.tasks:
        task.result()
    good = np.array([error is None for error in batch.errors])
    logits = np.full((len(good), len(model.card.classes)), np.nan, np.float32)
    if good.any():
        logits[good] = model.logits(batch.images if good.all() else batch.images[good])
    errors = list(batch.errors)
    for place in np.flatnonzero(good & ~np.isfinite(logits).all(axis=1)):
        errors[place] = "the model's output is not finite"
        logits[place] = np.nan
    return Chunk(batch.indices, logits, errors)
