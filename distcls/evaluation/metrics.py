"""Classification metrics: states that processes sum up, and the figures computed from them.

A state is a handful of sums, so that every sample counts once whatever the number of processes and
the size of the last batch. NumPy alone: the metrics of a checkpoint and of its ONNX file come from
the same lines.

    metric_state(task)    an empty state: SingleLabelState, MultiHeadState or MultiLabelState
    state.update(...)     add a batch of logits and labels
    state.state()         all sums as one vector; those of all processes add up
    state.merge(vector)   add such a vector
    state.compute()       Metrics
    METRICS               the registry of the figures; `register_metric` adds one
    LogitSpread           how much the logits depend on the image
    constant_answers(...) what is wrong with a model that answers the same to every image
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from distcls.errors import DistclsError, UsageError, reason_of
from distcls.registry import Registry, kind_of, positional
from distcls.task import THRESHOLD, Task, sigmoid, softplus

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mode = Literal["min", "max"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Metrics:
    """The figures of one evaluation. 0 divided by 0 is 0, as in scikit-learn.

    K counts all classes: those of the heads one after the other, or the labels.
    """

    loss: float
    """Mean cross-entropy in nats, over the heads too; of labels the mean binary one."""
    top1: float
    """Fraction of the samples whose class has the greatest logit; for multi-head and multi-label
    the fraction of all decisions (a head's class, a label's yes or no) that are right."""
    top5: float | None
    """Fraction of the samples whose class is among the greatest five logits, the mean over the
    heads; None where it would always be 1 (see `has_top5`), and for labels."""
    count: int
    """Samples."""
    precision: Floats
    """Of the samples predicted as a class, the fraction that is one; [K]."""
    recall: Floats
    """Of the samples of a class, the fraction that was predicted so; [K]."""
    f1: Floats
    """Harmonic mean of precision and recall, [K]."""
    support: Integers
    """Samples of each class, [K]."""
    confusion: Integers
    """Samples by true class (rows) and predicted class (columns), [K, K], of heads block by block;
    of labels for each one by no and yes, [K, 2, 2]."""
    exact: float | None = None
    """Fraction of the samples with all heads or labels right; None for a single label."""
    thresholds: tuple[float, ...] | None = None
    """Of labels: the probability that gives each the greatest F1 on these samples, [K]."""
    image_means: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of the metrics that are a number for each image: the mean over the samples."""
    beside: tuple[str, ...] = ()
    """Import paths of metrics beside the registered ones."""

    # Macro means run over the classes with support (scikit-learn: labels=unique(truth)): a class
    # without a sample is no evidence about the model, so a wrong prediction as it adds no zero.

    @property
    def macro_precision(self) -> float:
        """Mean precision over the classes with support."""
        return self._macro(self.precision)

    @property
    def macro_recall(self) -> float:
        """Mean recall over the classes with support."""
        return self._macro(self.recall)

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes with support."""
        return self._macro(self.f1)

    @property
    def weighted_precision(self) -> float:
        """Precision averaged by support."""
        return self._weighted(self.precision)

    @property
    def weighted_recall(self) -> float:
        """Recall averaged by support; equals top-1, but not for labels."""
        return self._weighted(self.recall)

    @property
    def weighted_f1(self) -> float:
        """F1 averaged by support."""
        return self._weighted(self.f1)

    def scalars(self) -> dict[str, float]:
        """The figures that the task has by name, in the order of `METRICS`.

        Raises UsageError for a registered metric that is no number.
        """
        figures = {METRICS.short(each): _figure(each, self) for each in _all(self.beside)}
        return {name: value for name, value in figures.items() if value is not None}

    @property
    def predicted(self) -> Integers:
        """Samples predicted as each class, [K]."""
        labels = self.confusion.ndim == 3
        return np.asarray(self.confusion[:, :, 1].sum(1) if labels else self.confusion.sum(axis=0))

    def _macro(self, values: Floats) -> float:
        occurs = self.support > 0
        return float(values[occurs].mean()) if occurs.any() else 0.0

    def _weighted(self, values: Floats) -> float:
        return float((values * self.support).sum() / max(1, int(self.support.sum())))


METRICS: Registry[Callable[..., Any]] = Registry("metric", "monitor.metric")
"""Every figure by name, as in metrics.json, history.csv and `monitor.metric`: a function of an
evaluation's `Metrics`, which returns None where the task has no such figure, or a function of a
batch's logits [N, classes] and labels (see `MetricState.update`), which returns a number for each
image, [N]: then the figure is their mean."""


def register_metric(name: str, *, higher_is_better: bool = True) -> Callable[[F], F]:
    """Decorate a metric of your own, see `METRICS`: `@distcls.register_metric("name")`.

    Every evaluation then has the figure, and training may monitor it. Raises UsageError for a name
    that is taken or none.
    """
    return METRICS.register(name, higher_is_better=higher_is_better)


for _name, _compute in {
    "loss": lambda metrics: metrics.loss,
    "top1": lambda metrics: metrics.top1,
    "top5": lambda metrics: metrics.top5,
    "macro_precision": lambda metrics: metrics.macro_precision,
    "macro_recall": lambda metrics: metrics.macro_recall,
    "macro_f1": lambda metrics: metrics.macro_f1,
    "weighted_precision": lambda metrics: metrics.weighted_precision,
    "weighted_recall": lambda metrics: metrics.weighted_recall,
    "weighted_f1": lambda metrics: metrics.weighted_f1,
    "exact": lambda metrics: metrics.exact,
}.items():
    register_metric(_name, higher_is_better=_name != "loss")(_compute)
EXACT = "exact"
"""The one that a single-label task does not have."""


def has_top5(task: Task) -> bool:
    """Whether top-5 accuracy says anything: one class of more than five is predicted."""
    choices = max(part.stop - part.start for part in task.slices)
    return task.kind != "multi_label" and choices > 5


def default_mode(name: str) -> Mode:
    """Whether a metric is best at its least or greatest, the greatest unless it was registered
    otherwise. Raises UsageError for an unknown one, and for what cannot be called."""
    entry = METRICS.find(name)
    if not callable(entry.value):
        raise UsageError(
            f"monitor.metric: {name} is {kind_of(entry.value)}, expected a function of (metrics), "
            "or of (logits, labels)"
        )
    return "max" if entry.defaults.get("higher_is_better", True) else "min"


def _of_images(function: Callable[..., Any]) -> bool:
    """Whether a metric is a function of logits and labels."""
    return positional(function)[0] == 2


def _figure(name: str, metrics: Metrics) -> float | None:
    """A figure of an evaluation; None if it has none. Raises UsageError if it is no number."""
    function = METRICS.find(name).value
    if _of_images(function):
        return metrics.image_means.get(METRICS.short(name))
    own = METRICS.find(name).own
    with _explained(name, "the figures of the evaluation"):
        found = function(copy.deepcopy(metrics) if own else metrics)
    if found is None:
        return None
    try:
        return float(found)
    except (TypeError, ValueError):
        what = repr(found) if isinstance(found, str) else f"a value {kind_of(found)}"
        raise UsageError(
            f"metric: {name} returned {what}, expected a number, or None where there is none"
        ) from None


@contextlib.contextmanager
def _explained(name: str, given: str) -> Iterator[None]:
    """Turn what a metric of the user's raises into a UsageError: it may be for another task."""
    try:
        yield
    except DistclsError:
        raise
    except Exception as error:
        if not METRICS.find(name).own:
            raise
        raise UsageError(f"metric: {name} failed on {given}: {reason_of(error)}") from error


class MetricState(Protocol):
    """Sums over samples from which all metrics follow, whatever the task."""

    def update(self, logits: NDArray[np.float32], labels: Integers) -> None:
        """Add a batch: logits [N, classes], and labels as `distcls.data.dataset.Split` has them.

        Raises ValueError if the shapes do not fit or a label is no class.
        """

    def state(self) -> Floats:
        """All sums as one vector; counts are exact in float64 up to 2**53."""

    def merge(self, state: Floats) -> None:
        """Add the vector of another process, or the sum of such."""

    def compute(self) -> Metrics:
        """The metrics so far."""


def metric_state(task: Task, beside: Sequence[str] = ()) -> MetricState:
    """An empty state for a task; `beside` are import paths of metrics that are not registered."""
    state: MetricState
    if task.single:
        state = SingleLabelState(len(task.classes))
    else:
        state = MultiHeadState(task) if task.heads else MultiLabelState(task)
    names = _all(beside)
    sums = {name: 0.0 for name in names if _of_images(METRICS.find(name).value)}
    return StateWithImages(state, sums, tuple(beside)) if sums or beside else state


def _all(beside: Sequence[str]) -> list[str]:
    """The names of all metrics of an evaluation, each once."""
    return list({METRICS.short(name): name for name in (*METRICS.names(), *beside)}.values())


def require_metrics(task: Task, beside: Sequence[str] = ()) -> None:
    """Compute all metrics of a few answers that are made up, so that one of the user's shows its
    mistakes before anything is trained. Raises UsageError for a metric that is no number."""
    count = 4
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, len(task.classes))).astype(np.float32)
    state = metric_state(task, beside)
    answers = task.decide(logits)
    state.update(logits, answers[:, 0] if task.single else answers)
    figures = state.compute().scalars()
    for name in beside:
        if METRICS.short(name) not in figures:
            raise UsageError(f"monitor.metric: {name} is None for {task.summary()}")


class StateWithImages:
    """See `MetricState`; beside a state, the sums of metrics that are a number for each image."""

    def __init__(self, state: MetricState, sums: dict[str, float], beside: tuple[str, ...]) -> None:
        self._state, self._sums, self._beside = state, sums, beside

    def update(self, logits: NDArray[np.float32], labels: Integers) -> None:
        """See `MetricState`. Raises UsageError unless a metric is a number for each image."""
        self._state.update(logits, labels)
        for name in self._sums:
            given = f"logits {list(logits.shape)} and labels {list(labels.shape)}"
            with _explained(name, given):
                found = np.asarray(METRICS.find(name).value(logits.copy(), labels.copy()))
            if found.shape != (len(labels),) or found.dtype.kind not in "biuf":
                raise UsageError(
                    f"metric: {name} returned {found.dtype} {list(found.shape)} for {len(labels)} "
                    "images, expected a number for each, [N]"
                )
            self._sums[name] += float(found.astype(np.float64).sum())

    def state(self) -> Floats:
        """The vector of the state, and the sums."""
        return np.concatenate([self._state.state(), list(self._sums.values())])

    def merge(self, state: Floats) -> None:
        """Add the vector of another process, or the sum of such."""
        place = len(state) - len(self._sums)
        self._state.merge(state[:place])
        for name, value in zip(self._sums, state[place:].tolist(), strict=True):
            self._sums[name] += value

    def compute(self) -> Metrics:
        """The metrics so far."""
        found = self._state.compute()
        means = {METRICS.short(name): s / max(1, found.count) for name, s in self._sums.items()}
        return dataclasses.replace(found, image_means=means, beside=self._beside)


class SingleLabelState:
    """See `MetricState`; one class per sample."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.confusion: Integers = np.zeros((num_classes, num_classes), np.int64)
        self.loss_sum = 0.0
        self.top5_hits = 0

    @property
    def count(self) -> int:
        """Samples so far."""
        return int(self.confusion.sum())

    def update(self, logits: NDArray[np.float32], labels: Integers) -> None:
        """Add a batch: `logits` [N, K] and the true classes `labels`, int64 [N].

        Raises ValueError if the shapes do not fit or a label is no class.
        """
        classes = self.num_classes
        if logits.ndim != 2 or logits.shape != (len(labels), classes):
            raise ValueError(f"logits {logits.shape} for {len(labels)} labels, {classes} classes")
        if not len(labels):
            return
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels {labels.min()}..{labels.max()}, {classes} classes")
        exact = logits.astype(np.float64)
        of_truth = exact[np.arange(len(labels)), labels]
        predicted = logits.argmax(axis=1)
        pairs = np.bincount(labels * classes + predicted, minlength=classes * classes)
        self.confusion += pairs.reshape(classes, classes)
        self.loss_sum += float((_log_sum_exp(exact) - of_truth).sum())
        self.top5_hits += _hits(exact, of_truth, labels, k=5)

    def state(self) -> Floats:
        """All sums as float64 [K * K + 2]."""
        return np.concatenate([self.confusion.ravel(), [self.loss_sum, self.top5_hits]])

    def merge(self, state: Floats) -> None:
        """Add the vector of another process, or the sum of such."""
        self.confusion += np.rint(state[:-2]).astype(np.int64).reshape(self.confusion.shape)
        self.loss_sum += float(state[-2])
        self.top5_hits += round(float(state[-1]))

    def compute(self) -> Metrics:
        """The metrics so far."""
        hits = np.diag(self.confusion).astype(np.float64)
        support = self.confusion.sum(axis=1)
        predicted = self.confusion.sum(axis=0)
        count = self.count
        return Metrics(
            loss=self.loss_sum / max(1, count),
            top1=float(hits.sum()) / max(1, count),
            top5=self.top5_hits / max(1, count) if self.num_classes > 5 else None,
            count=count,
            precision=_quotient(hits, predicted),
            recall=_quotient(hits, support),
            f1=_quotient(2 * hits, support + predicted),
            support=support,
            confusion=self.confusion.copy(),
        )


class MultiHeadState:
    """See `MetricState`; a state for each head, and the samples with all heads right."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._heads = [SingleLabelState(len(head.classes)) for head in task.heads]
        self._exact = 0

    def update(self, logits: NDArray[np.float32], labels: Integers) -> None:
        """Add a batch: `logits` [N, classes] and the class in each head, int64 [N, heads].

        Raises ValueError if the shapes do not fit or a label is no class.
        """
        if labels.ndim != 2 or labels.shape[1] != len(self._heads):
            raise ValueError(f"labels {labels.shape} for {len(self._heads)} heads of classes")
        if logits.ndim != 2 or logits.shape[1] != len(self._task.classes):
            raise ValueError(f"logits {logits.shape}, {len(self._task.classes)} classes")
        for position, (head, span) in enumerate(zip(self._heads, self._task.slices, strict=True)):
            head.update(logits[:, span], labels[:, position])
        self._exact += int((self._task.decide(logits) == labels).all(axis=1).sum())

    def state(self) -> Floats:
        """The heads' vectors one after the other, and the exact matches."""
        return np.concatenate([*(head.state() for head in self._heads), [self._exact]])

    def merge(self, state: Floats) -> None:
        """Add the vector of another process, or the sum of such."""
        *own, exact = np.split(state, np.cumsum([len(head.state()) for head in self._heads]))
        for head, span in zip(self._heads, own, strict=True):
            head.merge(span)
        self._exact += round(float(exact[0]))

    def compute(self) -> Metrics:
        """Means over the heads, and the figures of all their classes one after the other."""
        heads = [head.compute() for head in self._heads]
        top5 = [head.top5_hits / max(1, head.count) for head in self._heads]
        total = len(self._task.classes)
        confusion = np.zeros((total, total), np.int64)
        for head, span in zip(heads, self._task.slices, strict=True):
            confusion[span, span] = head.confusion
        return Metrics(
            loss=float(np.mean([head.loss for head in heads])),
            top1=float(np.mean([head.top1 for head in heads])),
            top5=float(np.mean(top5)) if has_top5(self._task) else None,
            count=heads[0].count,
            precision=np.concatenate([head.precision for head in heads]),
            recall=np.concatenate([head.recall for head in heads]),
            f1=np.concatenate([head.f1 for head in heads]),
            support=np.concatenate([head.support for head in heads]),
            confusion=confusion,
            exact=self._exact / max(1, heads[0].count),
        )


class MultiLabelState:
    """See `MetricState`; a 2x2 table for each label, and a histogram of its probabilities."""

    def __init__(self, task: Task) -> None:
        self._task = task
        labels = len(task.classes)
        self._confusion: Integers = np.zeros((labels, 2, 2), np.int64)
        self._histogram: Integers = np.zeros((2, labels, BINS), np.int64)
        self._loss_sum = 0.0
        self._exact = 0
        self._count = 0

    def update(self, logits: NDArray[np.float32], labels: Integers) -> None:
        """Add a batch: `logits` [N, labels] and 0 or 1 for each label, int64 [N, labels].

        Raises ValueError if the shapes do not fit or a label is neither.
        """
        number = len(self._task.classes)
        if logits.shape != labels.shape or labels.ndim != 2 or labels.shape[1] != number:
            raise ValueError(f"logits {logits.shape} and labels {labels.shape}, {number} labels")
        if ((labels != 0) & (labels != 1)).any():
            raise ValueError("labels other than 0 and 1")
        exact = logits.astype(np.float64)
        decided = self._task.decide(logits)
        columns = np.broadcast_to(np.arange(number), labels.shape)
        np.add.at(self._confusion, (columns, labels, decided), 1)
        bins = np.searchsorted(_edges(), sigmoid(logits), side="right")
        np.add.at(self._histogram, (labels, columns, bins), 1)
        # -log of the sigmoid where the label is 1, of one minus it where 0
        self._loss_sum += float(softplus(np.where(labels == 1, -exact, exact)).sum())
        self._exact += int((decided == labels).all(axis=1).sum())
        self._count += len(labels)

    def state(self) -> Floats:
        """All sums as float64, [labels * (4 + 2 * BINS) + 3]."""
        counts = [self._confusion.ravel(), self._histogram.ravel()]
        return np.concatenate([*counts, [self._loss_sum, self._exact, self._count]])

    def merge(self, state: Floats) -> None:
        """Add the vector of another process, or the sum of such."""
        counts = np.rint(state[:-3]).astype(np.int64)
        confusion, histogram = np.split(counts, [self._confusion.size])
        self._confusion += confusion.reshape(self._confusion.shape)
        self._histogram += histogram.reshape(self._histogram.shape)
        self._loss_sum += float(state[-3])
        self._exact += round(float(state[-2]))
        self._count += round(float(state[-1]))

    def compute(self) -> Metrics:
        """The metrics so far, and the thresholds that would have given each label its best F1."""
        hits = self._confusion[:, 1, 1].astype(np.float64)
        support, predicted = self._confusion[:, 1].sum(1), self._confusion[:, :, 1].sum(1)
        right = int(np.trace(self._confusion, axis1=1, axis2=2).sum())
        decisions = max(1, self._count * len(self._task.classes))
        return Metrics(
            loss=self._loss_sum / decisions,
            top1=right / decisions,
            top5=None,
            count=self._count,
            precision=_quotient(hits, predicted),
            recall=_quotient(hits, support),
            f1=_quotient(2 * hits, support + predicted),
            support=support,
            confusion=self._confusion.copy(),
            exact=self._exact / max(1, self._count),
            thresholds=tuple(self.thresholds().tolist()),
        )

    def thresholds(self) -> Floats:
        """For each label the threshold of the greatest F1, float64 [labels].

        Of all multiples of 1 / BINS, and of equally good ones the nearest to 0.5: a label that
        never occurs keeps that.
        """
        # predicted with threshold k: all that lies in the bins k, k + 1, ...
        no, yes = np.cumsum(self._histogram[:, :, ::-1], axis=2)[:, :, ::-1][:, :, 1:]
        support = self._histogram[1].sum(axis=1, keepdims=True)
        f1 = _quotient(2.0 * yes, support + yes + no)
        nearest = np.argsort(np.abs(_edges() - THRESHOLD), kind="stable")
        return np.asarray(_edges()[nearest[f1[:, nearest].argmax(axis=1)]], np.float64)


NEARLY_ALL = 0.95
"""Fraction of the samples from which predictions count as constant, unless the labels are so."""
LEAST_EXCESS = 0.05
"""By how much the fraction predicted as a class has to exceed the fraction that is one."""
LEAST_SPREAD, LEAST_NATS = 0.05, 0.01
"""Spread of the logits over the images, as a fraction of the differences between the classes and in
nats (1 % of a probability), below which the answers hardly depend on the image."""


class LogitSpread:
    """How much the logits vary over the images, beside how much they differ between the classes.

    Sums that processes add up, like `MetricState`. Only differences between classes that compete
    count, so of each head the image's mean logit is taken off; of labels the logits count as such.
    """

    def __init__(self, task: Task) -> None:
        self._slices = () if task.kind == "multi_label" else task.slices
        self._sums: Floats = np.zeros((2, len(task.classes)), np.float64)
        self._count = 0

    def update(self, logits: NDArray[np.float32]) -> None:
        """Add a batch, [N, classes]."""
        exact = logits.astype(np.float64)
        for span in self._slices:
            exact[:, span] -= exact[:, span].mean(axis=1, keepdims=True)
        self._sums += (exact.sum(axis=0), np.square(exact).sum(axis=0))
        self._count += len(exact)

    def state(self) -> Floats:
        """All sums as float64, [2 * classes + 1]."""
        return np.append(self._sums, self._count)

    def merge(self, state: Floats) -> None:
        """Add the vector of another process, or the sum of such."""
        self._sums += state[:-1].reshape(self._sums.shape)
        self._count += round(float(state[-1]))

    def problem(self) -> str | None:
        """What is wrong if the logits hardly depend on the image; of two images at least."""
        if self._count < 2:
            return None
        means, squares = self._sums / self._count
        spread = float(np.sqrt(np.maximum(0, squares - np.square(means)).mean()))
        differences = float(np.sqrt(np.square(means).mean()))
        if spread > max(LEAST_SPREAD * differences, LEAST_NATS):
            return None
        return (
            f"the logits hardly depend on the image: they vary by {spread:.2g} over the images, "
            f"and differ by {differences:.2g} between the classes"
        )


def constant_answers(metrics: Metrics, spread: LogitSpread, task: Task) -> list[str]:
    """What is wrong with a model that answers (nearly) the same to every image; empty if nothing.

    Nothing is where the labels are constant too: then such answers may be right.
    """
    found = []
    share, truth = (n / max(1, metrics.count) for n in (metrics.predicted, metrics.support))
    if task.kind == "multi_label":
        varied = bool(((truth > 0) & (truth < 1)).any())
        if varied and ((share == 0) | (share == 1)).all():
            names = "|".join(np.array(task.classes)[share == 1].tolist())
            found.append(
                f"all predictions are the same ({names or 'no label'}), the labels are not"
            )
    else:
        varied = any((truth[span] > 0).sum() > 1 for span in task.slices)
        places = np.flatnonzero((share >= NEARLY_ALL) & (share - truth >= LEAST_EXCESS)).tolist()
        for place in places[:1]:
            others = f" (and {len(places) - 1} more heads are like that)" if places[1:] else ""
            found.append(
                f"{share[place]:.0%} of the predictions are {task.classes[place]!r}, "
                f"{truth[place]:.0%} of the labels are{others}"
            )
    if varied and (problem := spread.problem()) is not None:
        found.append(problem)
    return found


BINS = 1000
"""Resolution of the thresholds: multiples of 1 / BINS."""


def _log_sum_exp(logits: Floats) -> Floats:
    """log(sum(exp(logits))) of each row, without overflow, [N]."""
    peak = logits.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a row with inf or NaN gives NaN, which the caller sees
        return np.asarray(np.log(np.exp(logits - peak).sum(axis=1)) + peak[:, 0], np.float64)


def _hits(logits: Floats, of_truth: Floats, labels: Integers, k: int) -> int:
    """How many rows have their true class among the greatest `k`.

    Of equal logits the lower class comes first, as in argmax, so that ties never help.
    """
    above = (logits > of_truth[:, None]).sum(axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    tied = ((logits == of_truth[:, None]) & earlier).sum(axis=1)
    return int(((above + tied < k) & ~np.isnan(of_truth)).sum())


def _quotient(numerator: Floats, denominator: Integers) -> Floats:
    """Elementwise; 0 divided by 0 is 0."""
    return np.asarray(np.where(denominator > 0, numerator / np.maximum(denominator, 1), 0.0))


def _edges() -> Floats:
    """Where the bins but the first begin, float64 [BINS - 1]."""
    return np.arange(1, BINS) / BINS
