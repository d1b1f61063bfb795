"""Measuring one execution config: the real pipeline over some images, its speed and its outputs.

The images are the first ones of the input, encoded in memory, so that decoding takes as much of
the cores as it will in the run, and no disk or network does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from distcls.data.source import FunctionSource, ImageSource
from distcls.errors import BadImage
from distcls.imaging import decode
from distcls.runtime.model import Floats, Model
from distcls.runtime.pipeline import stream
from distcls.runtime.providers import ExecutionConfig
from distcls.task import Task

IMAGES = 32
"""Images used for the measurement and for comparing outputs."""
MAX_LOADING_SECONDS = 0.3
"""Time for loading them; those loaded by then are enough."""
MIN_SECONDS = 0.1
"""Time that a measurement takes, at least; two batches per stream, if that is more."""
TOLERANCE = 1e-3
"""Largest difference of a logit where the model's certificate states none."""
MIN_REDUCED_AGREEMENT = 0.998
"""Least fraction of images whose prediction must be unchanged in reduced precision."""

Images = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The images to measure with."""

    images: Sequence[Images]
    """Decoded, uint8 RGB [h, w, 3] each."""
    encoded: Sequence[bytes] | None
    """The same as JPEGs, where the run will decode files; None where it reads a pack of pixels."""

    @classmethod
    def of(cls, source: ImageSource | None, count: int = IMAGES) -> Benchmark:
        """From the first images of a source; synthetic ones if none of them is readable."""
        images = [] if source is None else _first_images(source, count)
        if not images:
            images = [_synthetic(seed) for seed in range(min(count, 8))]
        if source is not None and source.uniform is not None:
            return cls(images, None)
        return cls(images, [_jpeg(image) for image in images])

    def first(self, count: int) -> Benchmark:
        """The first ones alone."""
        encoded = None if self.encoded is None else self.encoded[:count]
        return Benchmark(self.images[:count], encoded)

    def run(
        self, model: Model, execution: ExecutionConfig, count: int, workers: int | None
    ) -> tuple[float, Floats]:
        """Images per second over `count` images, and the logits of each image once, [n, K].

        The images are repeated as often as needed. Raises DistclsError if the model fails.
        """
        source = self._source(count)
        began = time.perf_counter()
        chunks = list(stream(source, model, batch_size=execution.batch_size, workers=workers))
        seconds = time.perf_counter() - began
        logits = np.concatenate([chunk.logits for chunk in chunks])
        return count / max(seconds, 1e-9), logits[: len(self.images)]

    def _source(self, count: int) -> ImageSource:
        names, distinct, encoded = [""] * count, len(self.images), self.encoded
        if encoded is not None:
            return FunctionSource(names, lambda index: decode(encoded[index % distinct]))
        order = np.arange(count) % distinct
        same = len({image.shape for image in self.images}) == 1
        return FunctionSource(
            names,
            lambda index: self.images[index % distinct],
            uniform=np.stack(self.images)[order] if same else None,
        )


def images_needed(execution: ExecutionConfig, distinct: int, rate: float) -> int:
    """Images of a measurement: each distinct one, whole batches, and enough for the clock."""
    group = execution.streams * execution.batch_size
    wanted = max(distinct, 2 * group, int(rate * MIN_SECONDS))
    return -(-wanted // group) * group


def disagreement(
    expected: Floats, found: Floats, execution: ExecutionConfig, *, task: Task, tolerance: float
) -> str | None:
    """Why logits are not those of the CPU in fp32, [n, K] both; None if they agree.

    The rule of the certificate: in fp32 every image keeps its prediction, in all heads and all
    labels, and every logit stays within the tolerance; in reduced precision 99.8 % of the images
    keep their prediction. Images whose logits are not finite on the CPU either do not count.
    """
    finite = np.isfinite(expected).all(axis=1)
    expected, found = expected[finite], found[finite]
    if not finite.any():
        return "nothing can be compared, for the CPU's own logits are not finite"
    if not np.isfinite(found).all():
        return "its logits are not finite"
    same = int((task.decide(expected) == task.decide(found)).all(axis=1).sum())
    difference = float(np.abs(expected - found).max(initial=0.0))
    if same == len(expected) and difference <= tolerance:
        return None
    if execution.precision == "reduced" and same >= MIN_REDUCED_AGREEMENT * len(expected):
        return None
    return (
        f"it disagrees with the CPU: same prediction for {same} of {len(expected)} images, "
        f"logits up to {difference:.1e} apart"
    )


def _first_images(source: ImageSource, count: int) -> list[Images]:
    images: list[Images] = []
    began = time.perf_counter()
    for index in range(min(count, len(source))):
        with contextlib.suppress(BadImage):
            images.append(source.image(index))
        if time.perf_counter() - began > MAX_LOADING_SECONDS:
            break
    return images


def _synthetic(seed: int) -> Images:
    """A smooth image with some grain, uint8 [375, 500, 3], about as hard to decode as a photo."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    soft = cv2.resize(rough, (500, 375), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    grain = rng.integers(-12, 13, soft.shape, dtype=np.int16)
    return np.asarray(np.clip(soft + grain, 0, 255), np.uint8)


def _jpeg(image: Images) -> bytes:
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return bytes(data.tobytes())
