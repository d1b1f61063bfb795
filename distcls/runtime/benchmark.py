"""Measuring a plan: the real pipeline over some images, its speed and its answers.

The images are the first ones of the input, encoded in memory, so that decoding takes its share of
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

from distcls.data.source import ImageSource
from distcls.errors import BadImage
from distcls.imaging import decode
from distcls.runtime.model import Model
from distcls.runtime.pipeline import stream
from distcls.runtime.providers import ExecutionConfig
from distcls.task import Task

IMAGES = 32
"""Images that are compared."""
SECONDS_TO_TAKE = 0.3
"""Time for loading them; what has come by then has to do."""
SECONDS_OF_A_TRIAL = 0.1
"""Time that a trial measures, at least; two batches a thread that computes, if that is more."""
TOLERANCE = 1e-3
"""Largest difference of a logit where the model's certificate states none."""
TOP1_OF_REDUCED = 0.998
"""Share of images to which a plan of reduced precision gives the same answer, at least."""

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The images to measure with."""

    images: Sequence[Images]
    """Decoded, uint8 RGB [h, w, 3] each."""
    encoded: Sequence[bytes] | None
    """The same as JPEGs, where the run will decode files; None where it reads a pack of pixels."""

    @classmethod
    def of(cls, source: ImageSource | None, most: int = IMAGES) -> Benchmark:
        """From the first inputs of a source; with none that is readable, from made-up pictures."""
        images = [] if source is None else _taken(source, most)
        if not images:
            images = [_made_up(seed) for seed in range(min(most, 8))]
        if source is not None and source.uniform is not None:
            return cls(images, None)
        return cls(images, [_jpeg(image) for image in images])

    def first(self, count: int) -> Benchmark:
        """The first ones alone."""
        encoded = None if self.encoded is None else self.encoded[:count]
        return Benchmark(self.images[:count], encoded)

    def run(
        self, model: Model, plan: ExecutionConfig, count: int, workers: int | None
    ) -> tuple[float, Logits]:
        """Images per second over `count` images, and the answers to each image once, [n, K].

        The images are taken again and again. Raises DistclsError if the model fails.
        """
        source = self._source(count)
        began = time.perf_counter()
        chunks = list(stream(source, model, batch_size=plan.batch_size, workers=workers))
        seconds = time.perf_counter() - began
        logits = np.concatenate([chunk.logits for chunk in chunks])
        return count / max(seconds, 1e-9), logits[: len(self.images)]

    def _source(self, count: int) -> ImageSource:
        names, known, encoded = [""] * count, len(self.images), self.encoded
        if encoded is not None:
            return ImageSource(image_ids=names, load=lambda index: decode(encoded[index % known]))
        order = np.arange(count) % known
        same = len({image.shape for image in self.images}) == 1
        return ImageSource(
            image_ids=names,
            load=lambda index: self.images[index % known],
            uniform=np.stack(self.images)[order] if same else None,
        )


def images_needed(plan: ExecutionConfig, known: int, rate: float) -> int:
    """Images of a trial: each known one once, whole batches, and long enough to be measured."""
    together = plan.streams * plan.batch_size
    wanted = max(known, 2 * together, int(rate * SECONDS_OF_A_TRIAL))
    return -(-wanted // together) * together


def disagreement(
    expected: Logits, found: Logits, plan: ExecutionConfig, *, task: Task, tolerance: float
) -> str | None:
    """Why a plan's answers are not those of the CPU in fp32, [n, K] both; None if they are.

    The rule of the certificate: in fp32 every image keeps its answer, all heads' and all labels,
    and every logit stays within the tolerance; in reduced precision 99.8 % of the images keep their
    answer. Images for which the CPU itself has no finite answer say nothing.
    """
    known = np.isfinite(expected).all(axis=1)
    expected, found = expected[known], found[known]
    if not known.any():
        return "nothing can be compared, for the CPU's own answers are not finite"
    if not np.isfinite(found).all():
        return "its answers are not finite"
    same = int((task.decide(expected) == task.decide(found)).all(axis=1).sum())
    difference = float(np.abs(expected - found).max(initial=0.0))
    if same == len(expected) and difference <= tolerance:
        return None
    if plan.precision == "reduced" and same >= TOP1_OF_REDUCED * len(expected):
        return None
    return (
        f"its answers are not the CPU's: same answer on {same} of {len(expected)} images, "
        f"logits up to {difference:.1e} apart"
    )


def _taken(source: ImageSource, most: int) -> list[Images]:
    images: list[Images] = []
    began = time.perf_counter()
    for index in range(min(most, len(source))):
        with contextlib.suppress(BadImage):
            images.append(source.load(index))
        if time.perf_counter() - began > SECONDS_TO_TAKE:
            break
    return images


def _made_up(seed: int) -> Images:
    """A soft picture with some grain, uint8 [375, 500, 3], about as hard to decode as a photo."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    soft = cv2.resize(rough, (500, 375), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    grain = rng.integers(-12, 13, soft.shape, dtype=np.int16)
    return np.asarray(np.clip(soft + grain, 0, 255), np.uint8)


def _jpeg(image: Images) -> bytes:
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return bytes(data.tobytes())
