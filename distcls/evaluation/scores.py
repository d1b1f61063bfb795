"""Figures of the predictions of all images, each as the mean of a number for every image.

Of a figure that is no mean, such as F1 or the area under the ROC curve, the numbers are its value
plus the influence of the image on it (the infinitesimal jackknife: Efron 1981). Their mean is the
figure, and their spread gives its interval, and that of the difference of two models.

    figures(outputs)      all figures by name
    with_intervals(...)   their 95 % intervals
    calibration_bins(...) the reliability diagram
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from distcls.evaluation.intervals import Pair, percentiles, resampled_means, wilson
from distcls.evaluation.outputs import Outputs, blocks
from distcls.task import Integers, Task

Floats = NDArray[np.float64]

TOP_K = (2, 3, 5, 10)
CALIBRATION_BINS = 15
"""Equally wide (Guo et al.: On calibration of modern neural networks, 2017)."""
COLUMNS = 64
"""Classes whose probabilities are copied at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Figure:
    """One figure."""

    value: float
    values: Floats | NDArray[np.bool_]
    """A number for each image, [N], whose mean is the value."""

    @property
    def is_fraction(self) -> bool:
        """Whether it counts images that are right: then the numbers are 0 and 1."""
        return self.values.dtype == np.bool_


def figures(outputs: Outputs) -> dict[str, Figure]:
    """The figures beside those of `distcls.evaluation.metrics`, and those in it that have an
    interval; a figure that is not defined, such as the AUROC of one class, is left out.

    top1     fraction of the decisions that are right; exact: of the images, of several outputs
    loss     mean cross-entropy
    auroc, average_precision   one class against the rest, the mean over the classes that occur;
             of labels each one's
    balanced_accuracy, macro_f1, mcc, kappa   of the confusion matrix; the mean over the heads, or
             labels (of macro_f1 over their classes)
    micro_f1 of labels, over all images and labels together
    ece      expected calibration error of the predicted class, of a label that of its yes
    brier    squared distance of probabilities and truth, the sum over the classes
    """
    task, several = outputs.task, not outputs.task.single
    found = {"loss": Figure(float(outputs.loss.mean()), outputs.loss)}
    top1 = outputs.hits.mean(axis=1) if several else outputs.right
    found["top1"] = Figure(float(top1.mean()), top1)
    if several:
        found["exact"] = Figure(float(outputs.right.mean()), outputs.right)
    else:
        for k in TOP_K:
            if k < len(task.classes):
                among = outputs.ranks[:, 0] < k
                found[f"top{k}"] = Figure(float(among.mean()), among)
    found |= _of_tables(outputs)
    found |= _of_rankings(outputs)
    bins = calibration_bins(outputs)
    found["ece"] = Figure(bins.error, _calibration_values(outputs, bins))
    brier = _brier(outputs)
    found["brier"] = Figure(float(brier.mean()), brier)
    return found


def with_intervals(found: Mapping[str, Figure]) -> dict[str, Pair]:
    """The 95 % intervals of figures: Wilson's of fractions, of others the bootstrap's.

    A figure whose numbers are the same for all images has none; nor has the calibration error,
    which is too great of few images, more so than it varies: no such interval holds the true one.
    """
    intervals: dict[str, Pair] = {}
    means = {
        name: figure for name, figure in found.items() if not figure.is_fraction and name != "ece"
    }
    columns = np.stack([np.asarray(figure.values, np.float64) for figure in means.values()], axis=1)
    bounds = dict(zip(means, percentiles(resampled_means(columns)), strict=True))
    for name, figure in found.items():
        if figure.is_fraction:
            intervals[name] = wilson(float(figure.values.sum()), len(figure.values))
        elif (pair := bounds.get(name)) is not None:
            intervals[name] = _within(name, pair)
    return intervals


def _within(name: str, pair: Pair) -> Pair:
    """The part of an interval that the figure can take."""
    low = -1.0 if name in ("mcc", "kappa") else 0.0
    high = np.inf if name in ("loss", "brier") else 1.0
    return (max(low, pair[0]), float(min(high, pair[1])))


def per_class_areas(outputs: Outputs) -> tuple[Floats, Floats]:
    """Area under the ROC curve and average precision of each class against the rest, [K] each; NaN
    where a class, or its rest, does not occur."""
    areas = np.full((2, outputs.probabilities.shape[1]), np.nan)
    for column, scores, truth in class_columns(outputs):
        if 0 < truth.sum() < len(truth):
            areas[:, column] = [values.mean() for values in _rankings(scores, truth)]
    return areas[0], areas[1]


def class_columns(outputs: Outputs) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.bool_]]]:
    """Of each class: its place, its probabilities, and which images are of it, [N] each."""
    of_labels = outputs.task.kind == "multi_label"
    owners = [
        (place, label)
        for place, span in enumerate(outputs.task.slices)
        for label in range(span.stop - span.start)
    ]
    width = outputs.probabilities.shape[1]
    for start in range(0, width, COLUMNS):
        copied = np.ascontiguousarray(outputs.probabilities[:, start : start + COLUMNS].T)
        for column, scores in enumerate(copied, start):
            place, label = (column, 1) if of_labels else owners[column]
            yield column, scores, outputs.labels[:, place] == label


def _of_rankings(outputs: Outputs) -> dict[str, Figure]:
    """Mean area under the ROC curve and mean average precision."""
    totals, number = np.zeros((2, len(outputs))), 0
    for _, scores, truth in class_columns(outputs):
        if 0 < truth.sum() < len(truth):
            totals += _rankings(scores, truth)
            number += 1
    if not number:
        return {}
    names = ("auroc", "average_precision")
    means = totals / number
    return {n: Figure(float(m.mean()), m) for n, m in zip(names, means, strict=True)}


def _rankings(scores: NDArray[np.float32], truth: NDArray[np.bool_]) -> Floats:
    """Area under the ROC curve and average precision as numbers of each image, [2, N].

    The area's are the placements of DeLong et al. (Comparing the areas under two or more correlated
    ROC curves, 1988); of average precision, the sum of TP/ALL at each positive, they are its
    derivatives by the weight of each image. Equal scores count as one.
    """
    count, positives = len(scores), int(truth.sum())
    ranked = np.sort(scores)
    found = np.sort(scores[truth])
    below = np.searchsorted(found, scores, "left")
    up_to = np.searchsorted(found, scores, "right")
    others = np.sort(scores[~truth])
    half = (
        np.searchsorted(others, scores[truth], "left")
        + np.searchsorted(others, scores[truth], "right")
    ) / 2
    area = float(half.mean()) / len(others)
    roc = np.empty(count)
    roc[truth] = area + count / positives * (half / len(others) - area)
    above = 1 - (below[~truth] + up_to[~truth]) / 2 / positives
    roc[~truth] = area + count / len(others) * (above - area)

    every = count - np.searchsorted(ranked, found, "left")  # images at least as likely
    hits = positives - np.searchsorted(found, found, "left")
    precision = hits / every
    average = float(precision.mean())
    gain = np.concatenate([[0], np.cumsum(1 / every)])[up_to]
    cost = np.concatenate([[0], np.cumsum(hits / every**2)])[up_to]
    at_own = np.zeros(count)
    at_own[truth] = precision[below[truth]] - average
    slopes = (at_own + np.where(truth, gain, 0) - cost) / positives
    return np.stack([roc, average + count * slopes])


def _of_tables(outputs: Outputs) -> dict[str, Figure]:
    """The figures of confusion matrices."""
    names = ("balanced_accuracy", "mcc", "kappa")
    count, heads = outputs.labels.shape
    sums = {name: np.zeros(count) for name in names}
    f1, supported = np.zeros(count), 0
    for place, size in enumerate(_sizes(outputs.task)):
        truth, decided = outputs.labels[:, place], outputs.decided[:, place]
        table = np.bincount(truth * size + decided, minlength=size * size).reshape(size, size)
        of_cells = {
            "balanced_accuracy": _balanced_accuracy(table),
            "mcc": _mcc(table),
            "kappa": _kappa(table),
        }
        for name, cells in of_cells.items():
            sums[name] += cells[truth, decided] / heads
        only_yes = outputs.task.kind == "multi_label"
        cells, classes = _f1_sum(table, only_yes)
        f1 += cells[truth, decided]
        supported += classes
    sums["macro_f1"] = f1 / max(1, supported)
    if outputs.task.kind == "multi_label":
        sums["micro_f1"] = _micro_f1(outputs.labels, outputs.decided)
    return {name: Figure(float(values.mean()), values) for name, values in sums.items()}


def _sizes(task: Task) -> list[int]:
    if task.kind == "multi_label":
        return [2] * len(task.classes)
    return [span.stop - span.start for span in task.slices]


def _balanced_accuracy(table: Integers) -> Floats:
    """Mean recall of the classes that occur, as the number of each cell, [K, K]."""
    support = table.sum(axis=1)
    occurs = support > 0
    recall = np.diag(table) / np.maximum(support, 1)
    value = recall[occurs].mean()
    scale = np.where(occurs, table.sum() / np.maximum(support, 1), 0) / occurs.sum()
    return np.asarray(value + (np.eye(len(table)) - recall[:, None]) * scale[:, None])


def _f1_sum(table: Integers, only_yes: bool) -> tuple[Floats, int]:
    """The sum of the F1 of the classes that occur, as the number of each cell, and how many do."""
    support, total = table.sum(axis=1), table.sum(axis=1) + table.sum(axis=0)
    counted = support > 0
    if only_yes:
        counted[0] = False
    f1 = 2 * np.diag(table) / np.maximum(total, 1)
    scale = np.where(counted, table.sum() / np.maximum(total, 1), 0)
    loss = f1 * scale
    cells = f1[counted].sum() - loss[:, None] - loss[None, :] + 2 * np.diag(scale)
    return np.asarray(cells), int(counted.sum())


def _micro_f1(labels: Integers, decided: NDArray[np.int32]) -> Floats:
    """Twice the labels that are found, by those that there are and those that are said, as a number
    of each image, [N]; 0 without any."""
    hits = 2 * (labels & decided).sum(axis=1)
    every = labels.sum(axis=1) + decided.sum(axis=1)
    if not (total := int(every.sum())):
        return np.zeros(len(labels))
    value = hits.sum() / total
    return np.asarray(value + (hits - value * every) * len(labels) / total)


def _mcc(table: Integers) -> Floats:
    """Matthews' correlation (Gorodkin 2004) as the number of each cell; 0 of constant answers."""
    exact = table.astype(np.float64)
    count, hits = exact.sum(), np.trace(exact)
    truth, decided = exact.sum(axis=1), exact.sum(axis=0)
    x, y = count**2 - decided @ decided, count**2 - truth @ truth
    if not x or not y:
        return np.zeros_like(exact)
    value = (hits * count - truth @ decided) / np.sqrt(x * y)
    slope = count * np.eye(len(table)) + hits - decided[:, None] - truth[None, :]
    slope = slope / np.sqrt(x * y)
    slope -= value * ((count - decided[None, :]) / x + (count - truth[:, None]) / y)
    return np.asarray(value + count * slope)


def _kappa(table: Integers) -> Floats:
    """Cohen's kappa (1960) as the number of each cell; 0 where chance alone explains all."""
    exact = table.astype(np.float64)
    count = exact.sum()
    truth, decided = exact.sum(axis=1) / count, exact.sum(axis=0) / count
    agreed, chance = np.trace(exact) / count, truth @ decided
    if chance == 1:
        return np.zeros_like(exact)
    change = np.eye(len(table)) - agreed
    of_chance = decided[:, None] + truth[None, :] - 2 * chance
    slope = (change * (1 - chance) - (1 - agreed) * of_chance) / (1 - chance) ** 2
    return np.asarray((agreed - chance) / (1 - chance) + slope)


@dataclasses.dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence against accuracy, in `CALIBRATION_BINS` bins."""

    count: Integers
    """Decisions in each bin."""
    confidence: Floats
    """Their mean probability; 0 in an empty bin."""
    accuracy: Floats
    """The fraction of them that is right."""

    @property
    def error(self) -> float:
        """Expected calibration error, 0 to 1: the mean distance of the two over the decisions."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float((gaps * self.count).sum() / max(1, int(self.count.sum())))


def calibration_bins(outputs: Outputs) -> Reliability:
    """Those of the predicted class, of all heads together; of labels those of yes."""
    sums = np.zeros((3, CALIBRATION_BINS))
    for rows in blocks(len(outputs), outputs.probabilities.shape[1]):
        chances, hits = _decisions(outputs, rows)
        places = _bins(chances).ravel()
        for row, weights in enumerate((None, chances.ravel(), hits.ravel())):
            sums[row] += np.bincount(places, weights, CALIBRATION_BINS)
    filled = np.maximum(sums[0], 1)
    return Reliability(sums[0].astype(np.int64), sums[1] / filled, sums[2] / filled)


def _calibration_values(outputs: Outputs, bins: Reliability) -> Floats:
    """The calibration error as a number of each image: its decisions' share in the bins' gaps."""
    signs = np.sign(bins.confidence - bins.accuracy)
    values = np.empty(len(outputs))
    for rows in blocks(len(outputs), outputs.probabilities.shape[1]):
        chances, hits = _decisions(outputs, rows)
        values[rows] = (signs[_bins(chances)] * (chances - hits)).mean(axis=1)
    return values


def _decisions(outputs: Outputs, rows: slice) -> tuple[Floats, Integers]:
    """Probability of each decision and whether it came true, [n, H]."""
    chances = outputs.probabilities[rows]
    if outputs.task.kind == "multi_label":
        return chances.astype(np.float64), outputs.labels[rows]
    own = outputs.task.of_answers(chances, outputs.decided[rows].astype(np.int64))
    return own.astype(np.float64), outputs.hits[rows].astype(np.int64)


def _bins(chances: Floats) -> Integers:
    places = np.ceil(chances * CALIBRATION_BINS).astype(np.int64) - 1
    return np.clip(places, 0, CALIBRATION_BINS - 1)


def _brier(outputs: Outputs) -> Floats:
    """Of each image, the mean over heads or labels (Brier 1950), [N]."""
    values = np.zeros(len(outputs))
    for rows in blocks(len(outputs), outputs.probabilities.shape[1]):
        chances, truth = outputs.probabilities[rows].astype(np.float64), outputs.labels[rows]
        if outputs.task.kind == "multi_label":
            values[rows] = np.square(chances - truth).mean(axis=1)
            continue
        own = outputs.task.of_answers(outputs.probabilities[rows], truth).astype(np.float64)
        squares = np.square(chances).sum(axis=1)
        values[rows] = (squares + (1 - 2 * own).sum(axis=1)) / own.shape[1]
    return values
