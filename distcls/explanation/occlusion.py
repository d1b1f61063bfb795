"""Occlusion maps: how much a prediction falls where a part of the image is covered; without torch.

Zeiler, Fergus: Visualizing and Understanding Convolutional Networks, 2014, section 4.2. Any model
that gives logits will do. Large patches find large objects, small ones place them, so both are
slid over the image with half of their side as the step: about 270 forward passes for an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from distcls.imaging.preprocess import Box
from distcls.runtime.model import Images, Model
from distcls.task import Floats, Task

PARTS = (4, 8)
"""The sides of the image divided by these are those of the patches, in pixels at least ..."""
SMALLEST = 4
"""... so many."""
BATCH = 32
"""Covered images that are computed at once at most."""


def log_odds(logits: Floats, task: Task, chosen: Sequence[int]) -> NDArray[np.float64]:
    """The log-odds of a prediction, float64 [N], of logits [N, K].

    It is that of the classes at the positions `chosen`: one, or one in each head, or the labels
    found, of which the log-odds are added up.

    A probability near 1 hardly falls when a part is covered, and a logit alone may fall with those
    of all other classes; their log-odds do neither.
    """
    exact = logits.astype(np.float64)
    total = np.zeros(len(exact))
    for index in chosen:
        if task.kind == "multi_label":
            total += exact[:, index]
            continue
        span = next(each for each in task.slices if each.start <= index < each.stop)
        others = [place for place in range(span.start, span.stop) if place != index]
        if others:
            top = exact[:, others].max(axis=1)
            rest = top + np.log(np.exp(exact[:, others] - top[:, None]).sum(axis=1))
            total += exact[:, index] - rest
    return total


def occlusion_map(model: Model, pixels: Images, chosen: Sequence[int]) -> NDArray[np.float32]:
    """How much each pixel of a preprocessed image speaks for a prediction.

    `pixels` are uint8 [H, W, 3], at the network's size; `chosen` are the positions of its classes
    among the logits. Returns float32 [H, W] in [0, 1], 1 where covering lowers the log-odds most;
    zeros if it lowers them nowhere. Raises DistclsError if the model cannot compute.
    """
    task, count = model.card.task, len(model.card.classes)
    size = max(1, min(BATCH, model.execution.batch_size))
    boxes = [box for group in all_patches(*pixels.shape[:2]) for box in group]
    groups = [boxes[start : start + size] for start in range(0, len(boxes), size)]
    with ThreadPoolExecutor(max(1, model.execution.streams)) as pool:
        waiting = [
            pool.submit(lambda group: model.logits(covered(pixels, group)), group)
            for group in groups
        ]
        logits = np.concatenate([each.result() for each in waiting])[:, :count]
    whole = model.logits(pixels[None])[:, :count]
    return heat_of(pixels.shape[:2], log_odds(whole, task, chosen), log_odds(logits, task, chosen))


def heat_of(
    size: tuple[int, ...], before: NDArray[np.float64], after: NDArray[np.float64]
) -> NDArray[np.float32]:
    """The map of the log-odds of an image [1] and of its `covered` images [N], for all boxes of
    `all_patches` in their order; see `occlusion_map`."""
    heat, at = np.zeros(size), 0
    for boxes in all_patches(*size):
        heat += _spread(heat.shape, boxes, before[0] - after[at : at + len(boxes)])
        at += len(boxes)
    heat = np.where(np.isfinite(heat), heat, 0.0).clip(0)
    return (heat / heat.max() if heat.max() > 0 else heat).astype(np.float32)


def all_patches(height: int, width: int) -> list[list[Box]]:
    """The patches of each size."""
    return [list(patches(height, width, part)) for part in PARTS]


def covered(pixels: Images, boxes: Sequence[Box]) -> Images:
    """The image, uint8 [H, W, 3], once for each box, which is filled with its mean colour."""
    fill = pixels.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    images = np.repeat(pixels[None], len(boxes), axis=0)
    for image, box in zip(images, boxes, strict=True):
        image[box.top : box.top + box.height, box.left : box.left + box.width] = fill
    return images


def patches(height: int, width: int, part: int) -> Iterator[Box]:
    """Squares or rectangles of a `part` of each side, half of it apart, which cover all pixels."""
    tall, wide = (min(side, max(SMALLEST, side // part)) for side in (height, width))
    for top in _starts(height, tall):
        for left in _starts(width, wide):
            yield Box(top, left, tall, wide)


def _starts(side: int, patch: int) -> list[int]:
    steps = -(-(side - patch) // max(1, patch // 2))
    return [round(place) for place in np.linspace(0, side - patch, steps + 1)]


def _spread(
    shape: tuple[int, ...], boxes: list[Box], falls: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The mean fall of the patches over each pixel, scaled to at most 1, [H, W]."""
    total, number = np.zeros(shape), np.zeros(shape)
    for box, fall in zip(boxes, falls, strict=True):
        place = np.s_[box.top : box.top + box.height, box.left : box.left + box.width]
        total[place] += fall
        number[place] += 1
    mean = total / number
    return np.asarray(mean / max(float(np.abs(mean).max()), 1e-12))
