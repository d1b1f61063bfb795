"""Tallies of images with several answers: a class in each head, or any number of labels.

Like `distcls.evaluation.metrics.Tally` they are sums, so that several processes can add them up.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distcls.evaluation.metrics import Floats, Integers, Metrics, Tally, quotient
from distcls.targets import THRESHOLD, Targets, sigmoid, softplus

BINS = 1000
"""Thresholds are found to one part in so many."""


class AnyTally(Protocol):
    """Sums over samples from which all metrics follow, whatever the kind of answer."""

    def update(self, logits: NDArray[np.float32], labels: Integers) -> None:
        """Add a batch: logits [N, classes], and labels as `distcls.data.dataset.Split` has them."""

    def vector(self) -> Floats:
        """All sums as float64; vectors of several processes add up to the whole."""

    def metrics(self) -> Metrics:
        """The metrics so far."""


class HeadsTally:
    """A tally for each head, and how often all of them were right."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._heads = [Tally(len(head.classes)) for head in targets.heads]
        self._exact = 0

    def update(self, logits: NDArray[np.float32], labels: Integers) -> None:
        """Add a batch: `logits` [N, classes] and the class in each head, int64 [N, heads].

        Raises ValueError if the shapes do not fit or a label is no class.
        """
        if labels.ndim != 2 or labels.shape[1] != len(self._heads):
            raise ValueError(f"labels {labels.shape} for {len(self._heads)} heads of classes")
        if logits.ndim != 2 or logits.shape[1] != len(self._targets.classes):
            raise ValueError(f"logits {logits.shape}, {len(self._targets.classes)} classes")
        for place, (tally, part) in enumerate(zip(self._heads, self._targets.slices, strict=True)):
            tally.update(logits[:, part], labels[:, place])
        self._exact += int((self._targets.decide(logits) == labels).all(axis=1).sum())

    def vector(self) -> Floats:
        """The heads' vectors one after the other, and the exact ones."""
        return np.concatenate([*(tally.vector() for tally in self._heads), [self._exact]])

    @classmethod
    def from_vector(cls, vector: Floats, targets: Targets) -> HeadsTally:
        """The tally of a (summed) `vector`."""
        tally = cls(targets)
        sizes = [len(own.vector()) for own in tally._heads]
        parts = np.split(vector, np.cumsum(sizes))
        tally._heads = [
            Tally.from_vector(part, own.num_classes)
            for part, own in zip(parts, tally._heads, strict=False)  # the last part is one number
        ]
        tally._exact = round(float(vector[-1]))
        return tally

    def metrics(self) -> Metrics:
        """Means over the heads, and the figures of all their classes one after the other."""
        heads = [tally.metrics() for tally in self._heads]
        total = len(self._targets.classes)
        confusion = np.zeros((total, total), np.int64)
        for head, part in zip(heads, self._targets.slices, strict=True):
            confusion[part, part] = head.confusion
        return Metrics(
            loss=float(np.mean([head.loss for head in heads])),
            top1=float(np.mean([head.top1 for head in heads])),
            top5=float(np.mean([head.top5 or 0.0 for head in heads])),
            count=heads[0].count,
            precision=np.concatenate([head.precision for head in heads]),
            recall=np.concatenate([head.recall for head in heads]),
            f1=np.concatenate([head.f1 for head in heads]),
            support=np.concatenate([head.support for head in heads]),
            confusion=confusion,
            exact=self._exact / max(1, heads[0].count),
        )


class LabelsTally:
    """Yes and no for each label, and where the probabilities of both lie."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        labels = len(targets.classes)
        self._confusion: Integers = np.zeros((labels, 2, 2), np.int64)
        self._histogram: Integers = np.zeros((2, labels, BINS), np.int64)
        self._loss_sum = 0.0
        self._exact = 0
        self._count = 0

    def update(self, logits: NDArray[np.float32], labels: Integers) -> None:
        """Add a batch: `logits` [N, labels] and 0 or 1 for each label, int64 [N, labels].

        Raises ValueError if the shapes do not fit or a label is neither.
        """
        number = len(self._targets.classes)
        if logits.shape != labels.shape or labels.ndim != 2 or labels.shape[1] != number:
            raise ValueError(f"logits {logits.shape} and labels {labels.shape}, {number} labels")
        if ((labels != 0) & (labels != 1)).any():
            raise ValueError("labels other than 0 and 1")
        exact = logits.astype(np.float64)
        answers = self._targets.decide(logits)
        columns = np.broadcast_to(np.arange(number), labels.shape)
        np.add.at(self._confusion, (columns, labels, answers), 1)
        bins = np.searchsorted(_edges(), sigmoid(logits), side="right")
        np.add.at(self._histogram, (labels, columns, bins), 1)
        # -log of the sigmoid where the label is given, of one minus it where not
        self._loss_sum += float(softplus(np.where(labels == 1, -exact, exact)).sum())
        self._exact += int((answers == labels).all(axis=1).sum())
        self._count += len(labels)

    def vector(self) -> Floats:
        """All sums as float64, [labels * (4 + 2 * BINS) + 3]."""
        counts = [self._confusion.ravel(), self._histogram.ravel()]
        return np.concatenate([*counts, [self._loss_sum, self._exact, self._count]])

    @classmethod
    def from_vector(cls, vector: Floats, targets: Targets) -> LabelsTally:
        """The tally of a (summed) `vector`."""
        tally = cls(targets)
        cut = tally._confusion.size
        counts = np.rint(vector[:-3]).astype(np.int64)
        tally._confusion = counts[:cut].reshape(tally._confusion.shape)
        tally._histogram = counts[cut:].reshape(tally._histogram.shape)
        tally._loss_sum = float(vector[-3])
        tally._exact, tally._count = round(float(vector[-2])), round(float(vector[-1]))
        return tally

    def metrics(self) -> Metrics:
        """The metrics so far, and the thresholds that would have given each label its best F1."""
        hits = self._confusion[:, 1, 1].astype(np.float64)
        support, predicted = self._confusion[:, 1].sum(1), self._confusion[:, :, 1].sum(1)
        right = int(np.trace(self._confusion, axis1=1, axis2=2).sum())
        decisions = max(1, self._count * len(self._targets.classes))
        return Metrics(
            loss=self._loss_sum / decisions,
            top1=right / decisions,
            top5=None,
            count=self._count,
            precision=quotient(hits, predicted),
            recall=quotient(hits, support),
            f1=quotient(2 * hits, support + predicted),
            support=support,
            confusion=self._confusion.copy(),
            exact=self._exact / max(1, self._count),
            thresholds=tuple(self.thresholds().tolist()),
        )

    def thresholds(self) -> Floats:
        """For each label the probability from which it is best given, float64 [labels].

        Best is the greatest F1 of all multiples of 1 / BINS, and of equal ones the nearest to 0.5:
        a label that never occurs keeps that.
        """
        # given from bin k on: all that lies in the bins k, k + 1, ...
        no, yes = np.cumsum(self._histogram[:, :, ::-1], axis=2)[:, :, ::-1][:, :, 1:]
        support = self._histogram[1].sum(axis=1, keepdims=True)
        f1 = quotient(2.0 * yes, support + yes + no)
        nearest = np.argsort(np.abs(_edges() - THRESHOLD), kind="stable")
        return np.asarray(_edges()[nearest[f1[:, nearest].argmax(axis=1)]], np.float64)


def new_tally(targets: Targets) -> AnyTally:
    """An empty tally of this kind of answers."""
    if targets.single:
        return Tally(len(targets.classes))
    return HeadsTally(targets) if targets.heads else LabelsTally(targets)


def tally_of(vector: Floats, targets: Targets) -> AnyTally:
    """The tally of a (summed) vector."""
    if targets.single:
        return Tally.from_vector(vector, len(targets.classes))
    if targets.heads:
        return HeadsTally.from_vector(vector, targets)
    return LabelsTally.from_vector(vector, targets)


def _edges() -> Floats:
    """Where the bins but the first begin, float64 [BINS - 1]."""
    return np.arange(1, BINS) / BINS
