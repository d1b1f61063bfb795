"""Metrics against scikit-learn, states that add up, and the registry."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    log_loss,
    matthews_corrcoef,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from distcls.errors import UsageError
from distcls.evaluation.metrics import (
    METRICS,
    Metrics,
    SingleLabelState,
    default_mode,
    register_metric,
)
from tests.conftest import registered_here


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exact / exact.sum(axis=1, keepdims=True)


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    classes = draw(st.integers(2, 9))
    count = draw(st.integers(1, 40))
    present = draw(st.integers(1, classes))  # classes from here on have no sample
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = rng.integers(0, present, count)
    logits = rng.normal(0, draw(st.sampled_from([0.1, 3.0, 30.0])), (count, classes))
    logits[np.arange(count), labels] += draw(st.sampled_from([0.0, 2.0, 20.0]))
    return logits.astype(np.float32), labels


@settings(max_examples=60, deadline=None)
@given(cases())
def test_equals_scikit_learn(case: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    logits, labels = case
    classes = list(range(logits.shape[1]))
    predicted = logits.argmax(axis=1)
    state = SingleLabelState(len(classes))
    for start in range(0, len(labels), 7):
        state.update(logits[start : start + 7], labels[start : start + 7])
    metrics = state.compute()
    np.testing.assert_array_equal(
        metrics.confusion, confusion_matrix(labels, predicted, labels=classes)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn tells of classes that are absent
        per_class = precision_recall_fscore_support(labels, predicted, labels=classes)
        for kind in ("macro", "weighted"):
            expected = precision_recall_fscore_support(
                labels, predicted, average=kind, labels=np.unique(labels)
            )[:3]
            names = [f"{kind}_{name}" for name in ("precision", "recall", "f1")]
            scalars = metrics.scalars()
            np.testing.assert_allclose([scalars[name] for name in names], expected, rtol=1e-12)
    for own, theirs in zip(
        (metrics.precision, metrics.recall, metrics.f1, metrics.support), per_class, strict=True
    ):
        np.testing.assert_allclose(own, theirs, rtol=1e-12)
    assert metrics.top1 == pytest.approx(accuracy_score(labels, predicted), rel=1e-12)
    assert metrics.count == len(labels)
    probabilities = softmax(logits)
    tiny = np.finfo(np.float64).eps
    if probabilities[np.arange(len(labels)), labels].min() > 10 * tiny:  # sklearn clips below
        expected_loss = log_loss(labels, probabilities, labels=classes)
        assert metrics.loss == pytest.approx(expected_loss, rel=1e-6, abs=1e-12)
    if len(classes) > 5:
        expected_top5 = top_k_accuracy_score(labels, logits, k=5, labels=classes)
        assert metrics.top5 == pytest.approx(expected_top5, rel=1e-12)
    else:
        assert "top5" not in metrics.scalars()  # it would be 1 whatever the model


def test_loss_is_stable_where_exp_overflows() -> None:
    state = SingleLabelState(2)
    state.update(np.array([[5000, 0], [-5000, 0]], np.float32), np.array([0, 0]))
    assert state.compute().loss == pytest.approx(2500.0)


def test_ties_are_no_hits() -> None:
    state = SingleLabelState(8)
    state.update(np.zeros((2, 8), np.float32), np.array([7, 0]))
    metrics = state.compute()
    assert (metrics.top1, metrics.top5) == (0.5, 0.5)


def test_states_of_processes_add_up() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(101, 7)).astype(np.float32)
    labels = rng.integers(0, 7, 101)
    whole = SingleLabelState(7)
    whole.update(logits, labels)
    parts = []
    for rank in range(3):
        part = SingleLabelState(7)
        part.update(logits[rank::3], labels[rank::3])
        parts.append(part.state())
    assert parts[0].dtype == np.float64
    added = SingleLabelState(7)
    added.merge(np.sum(parts, axis=0))
    np.testing.assert_array_equal(added.confusion, whole.confusion)
    assert added.confusion.dtype == np.int64
    assert added.top5_hits == whole.top5_hits
    assert added.compute().scalars() == pytest.approx(whole.compute().scalars(), rel=1e-12)


def test_no_samples_give_zero() -> None:
    state = SingleLabelState(3)
    state.update(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
    assert set(state.compute().scalars().values()) == {0.0}


def test_a_nan_is_seen_in_the_loss() -> None:
    state = SingleLabelState(2)
    state.update(np.array([[np.nan, 1], [1, np.inf]], np.float32), np.array([0, 1]))
    assert np.isnan(state.compute().loss)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [((2, 3), [0, 3]), ((2, 3), [0, -1]), ((2, 4), [0, 0]), ((3, 3), [0, 0])],
)
def test_what_does_not_fit_is_refused(logits: tuple[int, int], labels: list[int]) -> None:
    with pytest.raises(ValueError, match="classes"):
        SingleLabelState(3).update(np.zeros(logits, np.float32), np.array(labels))


def test_modes() -> None:
    assert default_mode("loss") == "min"
    assert default_mode("macro_f1") == "max"
    names = [name for name in METRICS.names() if name != "exact"]  # of a single label it is top-1
    assert list(SingleLabelState(6).compute().scalars()) == names
    with pytest.raises(UsageError, match="did you mean 'macro_f1'"):
        default_mode("macrof1")


@pytest.fixture
def _registering() -> Iterator[None]:
    with registered_here():
        yield


@pytest.mark.usefixtures("_registering")
def test_a_registered_metric_is_computed_and_monitored() -> None:
    from distcls.training.config import MonitorConfig

    @register_metric("matthews")
    def matthews(metrics: Metrics) -> float:
        """Matthews' correlation coefficient (Gorodkin, 2004) from the confusion matrix."""
        matrix = metrics.confusion.astype(np.float64)
        truth, predicted, count = matrix.sum(1), matrix.sum(0), matrix.sum()
        spread = (count**2 - truth @ truth) * (count**2 - predicted @ predicted)
        return float((np.trace(matrix) * count - truth @ predicted) / np.sqrt(spread))

    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 4, 50), rng.normal(size=(50, 4)).astype(np.float32)
    state = SingleLabelState(4)
    state.update(logits, labels)
    expected = matthews_corrcoef(labels, logits.argmax(axis=1))
    assert state.compute().scalars()["matthews"] == pytest.approx(expected, rel=1e-12)
    assert MonitorConfig(metric="matthews").resolved_mode == "max"
    with pytest.raises(UsageError, match="'matthews' is registered already"):
        register_metric("matthews")(softmax)


@pytest.mark.usefixtures("_registering")
def test_a_metric_may_be_best_at_its_least() -> None:
    register_metric("error", higher_is_better=False)(lambda metrics: 1 - metrics.top1)
    assert default_mode("error") == "min"
