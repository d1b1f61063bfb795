"""Metrics of heads and of labels against scikit-learn, and states that add up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from distcls.errors import UsageError
from distcls.evaluation.metrics import (
    METRICS,
    Metrics,
    MetricState,
    default_mode,
    metric_state,
    require_metrics,
)
from distcls.registry import reference
from distcls.task import Task
from tests import multi_output
from tests.conftest import registered_here

SIZES = (3, 8, 2)
HEADS = multi_output.heads(*SIZES)
LABELS = multi_output.labels(4, (0.3, 0.5, 0.7, 0.5))
COUNT = 101


def of_heads() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits, right in most heads, and the class in each."""
    rng = np.random.default_rng(1)
    labels = np.stack([rng.integers(0, size, COUNT) for size in SIZES], axis=1)
    logits = rng.normal(size=(COUNT, sum(SIZES)))
    for head, part in enumerate(HEADS.slices):
        logits[np.arange(COUNT), part.start + labels[:, head]] += 2
    return logits.astype(np.float32), labels


def of_labels() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits that know something of the labels; the last label never occurs."""
    rng = np.random.default_rng(2)
    labels = (rng.random((COUNT, 4)) < (0.5, 0.2, 0.6, 0.0)).astype(np.int64)
    logits = rng.normal(size=labels.shape) + 1.5 * labels - (0.7, 0.7, 0.7, 9.0)
    return logits.astype(np.float32), labels


def state_of(
    task: Task, logits: NDArray[np.float32], labels: NDArray[np.int64], step: int = 7
) -> MetricState:
    state = metric_state(task)
    for start in range(0, len(labels), step):
        state.update(logits[start : start + step], labels[start : start + step])
    return state


def test_heads_equal_scikit_learn() -> None:
    logits, labels = of_heads()
    metrics = state_of(HEADS, logits, labels).compute()
    answers = HEADS.decide(logits)
    assert metrics.count == COUNT
    words = [[str(row) for row in rows.tolist()] for rows in (labels, answers)]
    assert metrics.exact == accuracy_score(*words)
    accuracies, top5, losses = [], [], []
    for head, (size, part) in enumerate(zip(SIZES, HEADS.slices, strict=True)):
        truth, own = labels[:, head], logits[:, part]
        per_class = precision_recall_fscore_support(
            truth, answers[:, head], labels=range(size), zero_division=0
        )
        found = (metrics.precision, metrics.recall, metrics.f1, metrics.support)
        for mine, theirs in zip(found, per_class, strict=True):
            np.testing.assert_allclose(mine[part], theirs, rtol=1e-12)
        matrix = confusion_matrix(truth, answers[:, head], labels=range(size))
        np.testing.assert_array_equal(metrics.confusion[part, part], matrix)
        accuracies.append(accuracy_score(truth, answers[:, head]))
        top5.append(top_k_accuracy_score(truth, own, k=5, labels=range(size)) if size > 5 else 1)
        losses.append(float(F.cross_entropy(torch.from_numpy(own), torch.from_numpy(truth))))
    assert metrics.confusion.sum() == COUNT * len(SIZES)  # nothing off the blocks
    assert metrics.top1 == pytest.approx(np.mean(accuracies), rel=1e-12)
    assert metrics.top5 == pytest.approx(np.mean(top5), rel=1e-12)
    assert metrics.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics.macro_f1 == pytest.approx(metrics.f1.mean(), rel=1e-12)
    assert metrics.weighted_recall == pytest.approx(metrics.top1, rel=1e-12)
    assert list(metrics.scalars()) == list(METRICS.names())


def test_labels_equal_scikit_learn() -> None:
    logits, labels = of_labels()
    metrics = state_of(LABELS, logits, labels).compute()
    answers = LABELS.decide(logits)
    np.testing.assert_array_equal(metrics.confusion, multilabel_confusion_matrix(labels, answers))
    per_label = precision_recall_fscore_support(labels, answers, zero_division=0)
    found = (metrics.precision, metrics.recall, metrics.f1, metrics.support)
    for mine, theirs in zip(found, per_label, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)
    assert metrics.exact == pytest.approx(accuracy_score(labels, answers), rel=1e-12)
    assert metrics.top1 == pytest.approx((labels == answers).mean(), rel=1e-12)
    weighted = f1_score(labels, answers, average="weighted", zero_division=0)
    assert metrics.weighted_f1 == pytest.approx(weighted, rel=1e-12)
    # the label that neither occurs nor is given says nothing
    macro = f1_score(labels, answers, average="macro", labels=[0, 1, 2])
    assert metrics.macro_f1 == pytest.approx(macro, rel=1e-12)
    truth = torch.from_numpy(labels).double()
    loss = F.binary_cross_entropy_with_logits(torch.from_numpy(logits).double(), truth)
    assert metrics.loss == pytest.approx(float(loss), rel=1e-9)
    assert list(metrics.scalars()) == [name for name in METRICS.names() if name != "top5"]


def best_f1(probabilities: NDArray[np.float64], truth: NDArray[np.int64]) -> list[float]:
    """F1 at every multiple of 0.001, by trying them."""
    chosen = probabilities >= np.arange(1, 1000)[:, None] / 1000
    hits = (chosen & (truth == 1)).sum(1)
    found: list[float] = (2 * hits / (chosen.sum(1) + truth.sum())).tolist()
    assert found[299] == f1_score(truth, chosen[299])
    return found


def test_thresholds_are_those_of_trying_them_all() -> None:
    logits, labels = of_labels()
    metrics = state_of(LABELS, logits, labels).compute()
    assert metrics.thresholds is not None
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for place, found in enumerate(metrics.thresholds[:3]):
        every = best_f1(probabilities[:, place], labels[:, place])
        own = f1_score(labels[:, place], probabilities[:, place] >= found)
        assert own == max(every)
        nearest = min(abs((k + 1) / 1000 - 0.5) for k, f1 in enumerate(every) if f1 == max(every))
        assert abs(found - 0.5) == pytest.approx(nearest, abs=1e-12)
        assert own > f1_score(labels[:, place], probabilities[:, place] >= 0.97)
    assert metrics.thresholds[3] == 0.5  # never occurs: nothing is known of it


@pytest.mark.parametrize("kind", ["heads", "labels"])
def test_states_of_processes_add_up(kind: str) -> None:
    task, (logits, labels) = (HEADS, of_heads()) if kind == "heads" else (LABELS, of_labels())
    whole = state_of(task, logits, labels).compute()
    parts = [state_of(task, logits[r::3], labels[r::3]).state() for r in range(3)]
    assert parts[0].dtype == np.float64
    added = metric_state(task)
    added.merge(np.sum(parts, axis=0))
    assert_equal(added.compute(), whole)
    empty = metric_state(task)
    empty.merge(parts[0] * 0)
    assert set(empty.compute().scalars().values()) == {0.0}


def assert_equal(one: Metrics, other: Metrics) -> None:
    assert one.scalars() == pytest.approx(other.scalars(), rel=1e-12)
    assert (one.count, one.thresholds) == (other.count, other.thresholds)
    np.testing.assert_array_equal(one.confusion, other.confusion)
    np.testing.assert_array_equal(one.support, other.support)


def test_what_does_not_fit_is_refused() -> None:
    logits, labels = of_heads()
    with pytest.raises(ValueError, match="heads"):
        metric_state(HEADS).update(logits, labels[:, 0])
    with pytest.raises(ValueError, match="classes"):
        metric_state(HEADS).update(logits[:, 1:], labels)
    with pytest.raises(ValueError, match="classes"):
        metric_state(HEADS).update(logits, labels + 1)
    logits, labels = of_labels()
    with pytest.raises(ValueError, match="labels"):
        metric_state(LABELS).update(logits, labels[:, :3])
    with pytest.raises(ValueError, match="other than 0 and 1"):
        metric_state(LABELS).update(logits, labels * 2)


def test_a_nan_is_seen_in_the_loss() -> None:
    for task, (logits, labels) in ((HEADS, of_heads()), (LABELS, of_labels())):
        logits[3, 1] = np.nan
        assert np.isnan(state_of(task, logits, labels).compute().loss)


def test_exact_may_be_watched() -> None:
    assert default_mode("exact") == "max"


def test_a_metric_of_ones_own_for_another_task() -> None:
    labels = Task(classes=("a", "b", "c"), kind="multi_label")
    single = Task(classes=("a", "b", "c"))

    def of_one_class(logits: Any, labels: Any) -> Any:
        return logits[np.arange(len(labels)), labels]

    def of_labels(logits: Any, labels: Any) -> Any:
        return (labels.sum(1) > 0).astype(float)

    def of_exact(metrics: Metrics) -> float:
        return 2 * metrics.exact  # type: ignore[operator]

    with registered_here():
        for metric, own, other in (
            (of_one_class, single, labels),
            (of_labels, labels, single),
            (of_exact, labels, single),
        ):
            require_metrics(own, [reference(metric)])
            with pytest.raises(UsageError, match=rf"^metric: object:{metric.__name__}") as caught:
                require_metrics(other, [reference(metric)])
            text = str(caught.value)
            assert "\n" not in text
            assert "test_multi_output_metrics.py, line" in text or "a number for each" in text
