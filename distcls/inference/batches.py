"""Inputs in batches: runs of consecutive inputs, each a function of the batch size alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from distcls.imaging import Preprocess
from distcls.inference.inputs import Source

Images = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Batch:
    """A run of inputs, and how to load the one at a place of it."""

    indices: range
    """Which inputs."""
    load: Callable[[int], Images]
    """Decodes the one at a place of the batch."""
    ready: Images | None = None
    """All of them, [n, H, W, 1 or 3], if they need no preprocessing."""


def of_source(source: Source, preprocess: Preprocess, indices: range, size: int) -> Iterator[Batch]:
    """The inputs at `indices`, `size` at a time."""
    ready = _ready_array(source, preprocess)
    for start in range(0, len(indices), size):
        run = indices[start : start + size]

        def load(place: int, run: range = run) -> Images:
            return source.load(run[place])

        rows = None if ready is None else ready[run.start : run.stop : run.step]
        yield Batch(run, load, ready=rows)


def _ready_array(source: Source, preprocess: Preprocess) -> Images | None:
    """The source's array if preprocessing would leave its images (all of one shape) as they are."""
    if source.uniform is None or not len(source.uniform):
        return None
    first = np.asarray(source.uniform[0])
    return source.uniform if preprocess(first) is first else None
