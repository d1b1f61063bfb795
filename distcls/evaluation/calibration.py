"""Temperatures, prediction sets and thresholds, fitted to the logits of a labelled split."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from distcls.errors import UsageError
from distcls.evaluation.outputs import Outputs, blocks, losses
from distcls.model_card import LEAST_TEMPERATURE
from distcls.task import Floats, Integers, Task

PRECISION = 1e-7
"""Of the logarithm of a temperature."""


def fit_temperatures(task: Task, logits: Floats, labels: Integers) -> tuple[Task, list[str]]:
    """The task with the temperatures of the least cross-entropy on raw logits [N, K] and their
    labels (Guo et al.: On calibration of modern neural networks, 2017).

    One for all classes, one for each head, or one for each label. No prediction changes: the
    thresholds of labels are moved to the new probabilities. Where none is best, because every
    prediction is right or all are alike, it is 1; the names of such heads and labels are returned,
    of a single label an empty one.
    """
    truth = labels.reshape(len(labels), -1)
    if task.kind == "multi_label":
        one = Task(kind="multi_label", classes=("label",))
        varied = (truth != truth[0]).any(axis=0)  # else nothing is said of the label
        found = [
            _fit(one, logits[:, place, None], truth[:, place, None]) if varied[place] else None
            for place in range(truth.shape[1])
        ]
        names = task.classes
    else:
        names = tuple(head.name for head in task.heads) or ("",)
        heads = [head.classes for head in task.heads] or [task.classes]
        spans = zip(heads, task.slices, truth.T, strict=True)
        found = [_fit(Task(classes=c), logits[:, span], own[:, None]) for c, span, own in spans]
    unknown = [name for name, value in zip(names, found, strict=True) if value is None]
    return _with_temperatures(task, [value or 1.0 for value in found]), unknown


def _fit(task: Task, logits: Floats, labels: Integers) -> float | None:
    """The temperature of the least loss; None if it has none between the bounds.

    The loss is convex in the inverse, so it has one minimum over the logarithm as well, which is
    searched by golden sections.
    """
    ratio = (math.sqrt(5) - 1) / 2
    bound = -math.log(LEAST_TEMPERATURE)
    low, high = -bound, bound

    def loss(at: float) -> float:
        scale = np.float32(math.exp(-at))
        parts = (losses(task, logits[r] * scale, labels[r]).sum() for r in blocks(*logits.shape))
        return float(sum(parts))

    left, right = high - ratio * (high - low), low + ratio * (high - low)
    of_left, of_right = loss(left), loss(right)
    while high - low > PRECISION:
        if of_left <= of_right:
            high, right, of_right = right, left, of_left
            left = high - ratio * (high - low)
            of_left = loss(left)
        else:
            low, left, of_left = left, right, of_right
            right = low + ratio * (high - low)
            of_right = loss(right)
    middle = (low + high) / 2
    return math.exp(middle) if abs(middle) < bound - 0.01 else None


def _with_temperatures(task: Task, temperatures: Sequence[float]) -> Task:
    """The task with other temperatures and the same predictions: thresholds of labels become those
    of the same logits."""
    thresholds = task.thresholds
    if thresholds is not None:
        limits = np.array(thresholds)
        before = np.array(task.temperatures or [1.0] * len(limits))
        logits = np.log(limits / (1 - limits)) * before / np.array(temperatures)
        moved = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
        thresholds = tuple(moved.tolist())
    return dataclasses.replace(task, temperatures=tuple(temperatures), thresholds=thresholds)


def prediction_sets(outputs: Outputs, coverage: float) -> list[float]:
    """The least probability of a class that is in the prediction set, for each head.

    The set of an image then holds its true class with at least this probability, for images that
    are drawn as those of the fit (split conformal prediction; Sadinle et al.: Least ambiguous
    set-valued classifiers with bounded error levels, 2019). Raises UsageError for too few images,
    and for labels.
    """
    if outputs.task.kind == "multi_label":
        raise UsageError("coverage: prediction sets are of one class, the model has labels")
    count = len(outputs)
    exact = Fraction(str(coverage))  # 10 times 0.7 is more than 7
    rank = math.ceil((count + 1) * exact)
    if rank > count:
        least = math.ceil(exact / (1 - exact))
        raise UsageError(
            f"coverage: {coverage:g} needs at least {least:,} images, there are {count:,}"
        )
    own = outputs.task.of_answers(outputs.probabilities, outputs.labels)
    return [float(np.sort(column)[count - rank]) for column in own.T]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Abstention:
    """A minimum probability, and what it does on the images that it was fitted to."""

    threshold: float
    """As for `distcls predict --threshold`."""
    answered: float
    """Fraction of the images that are answered."""
    accuracy: float
    """Fraction of these that are right."""


def abstain_for_accuracy(outputs: Outputs, accuracy: float) -> Abstention:
    """The threshold that leaves the most images, of which this fraction is right. Raises UsageError
    where none does."""
    ranked = _ranked(outputs)
    good = np.flatnonzero(ranked.accuracy >= accuracy)
    if not len(good):
        best = float(ranked.accuracy.max())
        raise UsageError(f"precision: {accuracy:g} is not reached, {best:.4f} is the most")
    return ranked.at(int(good[-1]))


def abstain_for_answers(outputs: Outputs, answered: float) -> Abstention:
    """The greatest threshold that leaves this fraction of the images."""
    ranked = _ranked(outputs)
    return ranked.at(int(np.flatnonzero(ranked.answered >= answered)[0]))


@dataclasses.dataclass(frozen=True, eq=False)
class _Ranked:
    thresholds: Floats
    answered: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    def at(self, place: int) -> Abstention:
        arrays = (self.thresholds, self.answered, self.accuracy)
        threshold, answered, accuracy = (float(array[place]) for array in arrays)
        return Abstention(threshold=threshold, answered=answered, accuracy=accuracy)


def _ranked(outputs: Outputs) -> _Ranked:
    """Every threshold from high to low; images of one probability are answered together."""
    if outputs.task.kind == "multi_label":
        raise UsageError("precision, answered: of one class; labels have a threshold each")
    chances = outputs.weakest(slice(None))
    order = np.argsort(-chances, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(chances[order]) != 0, True))
    number = ends + 1
    right = np.cumsum(outputs.right[order])[ends]
    return _Ranked(chances[order][ends], number / len(outputs), right / number)
