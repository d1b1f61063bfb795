"""Inputs in batches: runs of consecutive inputs, of a list or of something nobody knows the end of.

A batch's content is a function of the inputs and of the batch size alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distcls.imaging import Preprocess
from distcls.inference.inputs import Source

Images = NDArray[np.uint8]


class Item(Protocol):
    """An input of an unknown number of them."""

    @property
    def image_id(self) -> str:
        """Its name in the output."""

    def load(self) -> Images:
        """Decode it to uint8 RGB [h, w, 3]. Raises BadImage; called once, from any thread."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """A run of inputs, and how to load the one at a place of it."""

    indices: range
    """Which inputs."""
    load: Callable[[int], Images]
    """Decodes the one at a place of the batch."""
    image_ids: Sequence[str] | None = None
    """Their names, where the source is no list that could be asked."""
    ready: Images | None = None
    """All of them, [n, H, W, 1 or 3], if they need no preprocessing."""


def of_source(
    source: Source, preprocess: Preprocess, indices: range, size: int
) -> Generator[Batch, None, None]:
    """The inputs of a list at `indices`, `size` at a time."""
    ready = _ready_array(source, preprocess)
    for start in range(0, len(indices), size):
        run = indices[start : start + size]

        def load(place: int, run: range = run) -> Images:
            return source.load(run[place])

        rows = None if ready is None else ready[run.start : run.stop : run.step]
        yield Batch(run, load, ready=rows)


def of_items(items: Iterable[Item], size: int) -> Generator[Batch, None, None]:
    """Inputs of an unknown number, `size` at a time, counted from 0."""
    remaining, at = iter(items), 0
    while taken := list(itertools.islice(remaining, size)):

        def load(place: int, taken: list[Item] = taken) -> Images:
            return taken[place].load()

        yield Batch(range(at, at + len(taken)), load, [item.image_id for item in taken])
        at += len(taken)


def in_a_thread(batches: Iterator[Batch]) -> Generator[Future[Batch | None], None, None]:
    """The same batches as futures, made in a thread of their own; the last one holds None.

    The next one is only begun when it is asked for, so nothing is read far ahead.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        while True:
            future: Future[Batch | None] = reader.submit(next, batches, None)
            yield future
            if future.result() is None:
                return


def _ready_array(source: Source, preprocess: Preprocess) -> Images | None:
    """The source's array if preprocessing would leave its images (all of one shape) as they are."""
    if source.uniform is None or not len(source.uniform):
        return None
    first = np.asarray(source.uniform[0])
    return source.uniform if preprocess(first) is first else None
