"""Temperatures, prediction sets and thresholds, fitted to the logits of a labelled split."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from distcls.errors import UsageError
from distcls.evaluation.intervals import student_quantile
from distcls.evaluation.outputs import Outputs, blocks, losses
from distcls.task import Floats, Integers, Task

PRECISION, ROUGH = 1e-7, 1e-3
"""Of the logarithm of a temperature, and of one of a part of the images."""
MOST_TEMPERATURE = 50.0
"""The least is its inverse."""
PRIOR = 1.0
"""Weight of the prior, in images."""
FOLDS = 5
"""Parts of the images, each of which is judged by a temperature of the others."""


class Unreached(UsageError):
    """No threshold does what was asked for."""


def fit_temperatures(task: Task, logits: Floats, labels: Integers) -> tuple[Task, list[str]]:
    """The task with the temperatures of the least cross-entropy on raw logits [N, K] and their
    labels (Guo et al.: On calibration of modern neural networks, 2017).

    One for all classes, one for each head, or one for each label. No prediction changes: the
    thresholds of labels are moved to the new probabilities. Where none is better than 1 by more
    than chance (see `_better_than_chance`), or none is best because every prediction is right or
    all are alike, it is 1; the names of such heads and labels are returned, of a single label an
    empty one.
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
    """The temperature of the least loss; None where 1 does as well for all that is known."""
    if (task.decide(logits).reshape(labels.shape) == labels).all():
        return None  # the sharper the better, without end
    found = _least(task, logits, labels, PRECISION)
    return found if _better_than_chance(task, logits, labels) else None


def _least(task: Task, logits: Floats, labels: Integers, precision: float) -> float:
    """The temperature of the least sum of losses and of a weak prior, by golden sections.

    The prior counts as much as one image or two: a Gamma density of the inverse temperature, with
    its mode at 1. Both are convex in the inverse, so there is one minimum over the logarithm, too.
    """
    ratio = (math.sqrt(5) - 1) / 2
    high = math.log(MOST_TEMPERATURE)
    low = -high

    def loss(at: float) -> float:
        scale = np.float32(math.exp(-at))
        parts = (losses(task, logits[r] * scale, labels[r]).sum() for r in blocks(*logits.shape))
        return float(sum(parts)) + PRIOR * (math.exp(-at) + at - 1)

    left, right = high - ratio * (high - low), low + ratio * (high - low)
    of_left, of_right = loss(left), loss(right)
    while high - low > precision:
        if of_left <= of_right:
            high, right, of_right = right, left, of_left
            left = high - ratio * (high - low)
            of_left = loss(left)
        else:
            low, left, of_left = left, right, of_right
            right = low + ratio * (high - low)
            of_right = loss(right)
    return math.exp((low + high) / 2)


def _better_than_chance(task: Task, logits: Floats, labels: Integers) -> bool:
    """Whether temperatures that are fitted to some images lessen the loss of others.

    Each fifth of the images has the temperature of the other four; the 95 % interval of the mean
    gain has to lie above 0.
    """
    count = len(labels)
    if count < 2 * FOLDS:
        return False
    fold = np.random.default_rng(0).permutation(count) % FOLDS
    gains = np.zeros(count)
    for each in range(FOLDS):
        inside = fold == each
        temperature = _least(task, logits[~inside], labels[~inside], ROUGH)
        places = np.flatnonzero(inside)
        for rows in blocks(len(places), logits.shape[1]):
            part, truth = logits[places[rows]], labels[places[rows]]
            after = losses(task, part / np.float32(temperature), truth)
            gains[places[rows]] = losses(task, part, truth) - after
    half = student_quantile(count - 1) * float(gains.std(ddof=1)) / math.sqrt(count)
    return float(gains.mean()) > half


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
    """The least probability of a class that is in the prediction set, for each head; of labels that
    of yes for each, and then that of no.

    The set of an image then holds its true class with at least this probability, for images that
    are drawn as those of the fit (split conformal prediction; Sadinle et al.: Least ambiguous
    set-valued classifiers with bounded error levels, 2019). Of a label that holds for the images
    that have it, and for those that have not (Vovk: Conditional validity of inductive conformal
    predictors, 2012): it is 0 where these are too few, so that the answer is always in the set.
    Raises UsageError for too few images.
    """
    count, labels = len(outputs), outputs.labels
    exact = Fraction(str(coverage))  # 10 times 0.7 is more than 7
    enough = math.ceil(exact / (1 - exact))
    if outputs.task.kind == "multi_label":
        sides = ((labels == 1, outputs.probabilities), (labels == 0, 1 - outputs.probabilities))
        groups = [
            chances[has]
            for side, rows in sides
            for has, chances in zip(side.T, rows.T, strict=True)
        ]
        most, what = max(map(len, groups)), "images with a label, or without it"
    else:
        groups = list(outputs.task.of_answers(outputs.probabilities, labels).T)
        most, what = count, "images"
    if most < enough:
        raise UsageError(
            f"coverage: {coverage:g} needs at least {enough:,} {what}, there are {most:,}"
        )
    ranks = [math.ceil((len(chances) + 1) * exact) for chances in groups]
    return [
        float(np.sort(chances)[len(chances) - rank]) if rank <= len(chances) else 0.0
        for chances, rank in zip(groups, ranks, strict=True)
    ]


def spread_of_coverage(outputs: Outputs, coverage: float) -> tuple[int, float, float]:
    """How far the coverage of sets that are fitted so varies from one draw of images to another:
    the images of a fit (of labels, the fewest that suffice, which have one or lack it), the mean,
    and the standard deviation.

    It is a beta variable (Vovk: Conditional validity of inductive conformal predictors, 2012).
    """
    exact, count = Fraction(str(coverage)), len(outputs)
    if outputs.task.kind == "multi_label":
        have = (outputs.labels == 1).sum(axis=0)
        sizes = [*have.tolist(), *(count - have).tolist()]
        count = min(size for size in sizes if size >= exact / (1 - exact))
    rank = math.ceil((count + 1) * exact)
    mean = rank / (count + 1)
    return count, mean, math.sqrt(mean * (1 - mean) / (count + 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Abstention:
    """A minimum probability, and what it does on the images that it was fitted to."""

    threshold: float
    """As for `distcls predict --threshold`."""
    answered: float
    """Fraction of the images that are answered."""
    images: int
    """How many these are."""
    accuracy: float
    """Fraction of these that are right."""


def abstain_for_accuracy(outputs: Outputs, accuracy: float) -> Abstention:
    """The threshold that leaves the most images, of which this fraction is right. Raises Unreached
    where none does."""
    ranked = _ranked(outputs)
    good = np.flatnonzero(ranked.accuracy >= accuracy)
    if not len(good):
        best = float(ranked.accuracy.max())
        raise Unreached(f"precision: {accuracy:g} is not reached, {best:.4f} is the most")
    return ranked.at(int(good[-1]))


def abstain_for_answers(outputs: Outputs, answered: float) -> Abstention:
    """The greatest threshold that leaves this fraction of the images."""
    ranked = _ranked(outputs)
    return ranked.at(int(np.flatnonzero(ranked.answered >= answered)[0]))


@dataclasses.dataclass(frozen=True, eq=False)
class _Ranked:
    thresholds: Floats
    number: Integers
    """Images that each threshold leaves, and their fraction."""
    answered: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    def at(self, place: int) -> Abstention:
        return Abstention(
            threshold=float(self.thresholds[place]),
            answered=float(self.answered[place]),
            images=int(self.number[place]),
            accuracy=float(self.accuracy[place]),
        )


def _ranked(outputs: Outputs) -> _Ranked:
    """Every threshold from high to low; images of one probability are answered together."""
    if outputs.task.kind == "multi_label":
        raise UsageError("precision, answered: of one class; labels have a threshold each")
    chances = outputs.weakest(slice(None))
    order = np.argsort(-chances, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(chances[order]) != 0, True))
    number = ends + 1
    right = np.cumsum(outputs.right[order])[ends]
    return _Ranked(chances[order][ends], number, number / len(outputs), right / number)
