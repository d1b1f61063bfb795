"""Figures of predictions against scikit-learn's, and whether their intervals hold what they say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sk

from distcls.evaluation import intervals
from distcls.evaluation.intervals import mcnemar, paired_difference, student_p, wilson
from distcls.evaluation.metrics import metric_state
from distcls.evaluation.outputs import Outputs
from distcls.evaluation.scores import figures, per_class_areas, with_intervals
from distcls.task import Head, Task

HEADS = Task.of_heads([Head("shape", ("a", "b", "c")), Head("colour", ("x", "y"))])
LABELS = Task(kind="multi_label", classes=("sea", "sky", "sun"))


def outputs_of(
    task: Task, count: int = 400, seed: int = 0, digits: int = 1, skill: float = 1.0
) -> Outputs:
    """Predictions that are often right; rounded logits have many ties."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, len(task.classes))).round(digits).astype(np.float32)
    if task.kind == "multi_label":
        labels = rng.integers(0, 2, (count, len(task.classes)))
        logits += skill * (2 * labels - 1)
    else:
        labels = np.stack([rng.integers(0, s.stop - s.start, count) for s in task.slices], axis=1)
        for place, span in enumerate(task.slices):
            logits[np.arange(count), labels[:, place] + span.start] += skill
    labels = labels[:, 0] if task.single else labels
    return Outputs.of(task, logits, labels, [str(number) for number in range(count)])


def values(outputs: Outputs) -> dict[str, float]:
    return {name: figure.value for name, figure in figures(outputs).items()}


def expected(
    truth: Sequence[NDArray[np.int64]], said: Sequence[NDArray[np.int64]]
) -> dict[str, float]:
    """Means over heads or labels."""
    pairs = list(zip(truth, said, strict=True))
    by_name = {
        "mcc": sk.matthews_corrcoef,
        "kappa": sk.cohen_kappa_score,
        "balanced_accuracy": sk.balanced_accuracy_score,
    }
    return {name: float(np.mean([f(*pair) for pair in pairs])) for name, f in by_name.items()}


@pytest.mark.parametrize("classes", [2, 3, 12])
def test_a_single_label_equals_scikit_learn(classes: int) -> None:
    outputs = outputs_of(Task(classes=tuple(f"c{i}" for i in range(classes))))
    truth, said = outputs.labels[:, 0], outputs.decided[:, 0]
    chances = outputs.probabilities.astype(np.float64)
    chances /= chances.sum(axis=1, keepdims=True)
    each = np.eye(classes)[truth]
    wanted = expected([truth], [said]) | {
        "loss": sk.log_loss(truth, chances),
        "top1": sk.accuracy_score(truth, said),
        "macro_f1": sk.f1_score(truth, said, average="macro"),
        "auroc": sk.roc_auc_score(each, outputs.probabilities, average="macro"),
        "average_precision": sk.average_precision_score(each, outputs.probabilities),
        "brier": np.square(chances - each).sum(axis=1).mean(),
    }
    for k in (2, 3, 5, 10):
        if k < classes:
            wanted[f"top{k}"] = np.mean(outputs.ranks < k)
    found = values(outputs)
    assert found.pop("ece") == pytest.approx(by_hand(chances.max(axis=1), truth == said), rel=1e-5)
    assert found == pytest.approx(wanted, rel=1e-5)
    areas, precisions = per_class_areas(outputs)
    found = [
        [
            function(column, scores)
            for column, scores in zip(each.T, outputs.probabilities.T, strict=True)
        ]
        for function in (sk.roc_auc_score, sk.average_precision_score)
    ]
    np.testing.assert_allclose([areas, precisions], found)


def by_hand(chances: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """The expected calibration error in 15 bins, as Guo et al. define it."""
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (chances > low) & (chances <= low + 1 / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - chances[inside].mean())
    return total


def test_heads_equal_scikit_learn() -> None:
    outputs = outputs_of(HEADS)
    truth, said = outputs.labels.T, outputs.decided.T
    found = values(outputs)
    wanted = expected(truth, said)
    f1 = [sk.f1_score(t, s, average=None) for t, s in zip(truth, said, strict=True)]
    wanted |= {"macro_f1": float(np.concatenate(f1).mean()), "top1": float((truth == said).mean())}
    wanted["exact"] = float((truth == said).all(axis=0).mean())
    areas = [
        sk.roc_auc_score(truth[place] == label, outputs.probabilities[:, span.start + label])
        for place, span in enumerate(HEADS.slices)
        for label in range(span.stop - span.start)
    ]
    wanted["auroc"] = float(np.mean(areas))
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)


def test_labels_equal_scikit_learn() -> None:
    outputs = outputs_of(LABELS)
    truth, said, chances = outputs.labels, outputs.decided, outputs.probabilities
    wanted = expected(truth.T, said.T) | {
        "macro_f1": sk.f1_score(truth, said, average="macro"),
        "micro_f1": sk.f1_score(truth, said, average="micro"),
        "auroc": sk.roc_auc_score(truth, chances, average="macro"),
        "average_precision": sk.average_precision_score(truth, chances, average="macro"),
        "brier": np.mean(
            [sk.brier_score_loss(t, c) for t, c in zip(truth.T, chances.T, strict=True)]
        ),
        "loss": np.mean([sk.log_loss(t, c) for t, c in zip(truth.T, chances.T, strict=True)]),
        "ece": by_hand(chances.ravel(), truth.ravel() == 1),
    }
    found = values(outputs)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("task", [Task(classes=("a", "b", "c", "d", "e", "f")), HEADS, LABELS])
def test_the_figures_of_metrics_are_the_same(task: Task) -> None:
    outputs = outputs_of(task, digits=4)
    state = metric_state(task)
    logits = np.log(outputs.probabilities)
    if task.kind == "multi_label":
        logits -= np.log1p(-outputs.probabilities)
    state.update(logits, outputs.labels[:, 0] if task.single else outputs.labels)
    known, found = state.compute().scalars(), values(outputs)
    shared = known.keys() & found.keys()
    assert {"loss", "top1", "macro_f1"} <= shared
    assert {n: found[n] for n in shared} == pytest.approx({n: known[n] for n in shared}, rel=1e-4)


@pytest.mark.parametrize("task", [Task(classes=("a", "b", "c")), HEADS, LABELS])
def test_the_spread_is_that_of_the_figure_over_resampled_images(task: Task) -> None:
    """The influence of an image stands for what leaving it out or doubling it does."""
    outputs = outputs_of(task, count=300, digits=3)
    found = figures(outputs)
    rng = np.random.default_rng(1)
    draws = [values(outputs.take(rng.integers(0, 300, 300))) for _ in range(200)]
    for name, figure in found.items():
        if name != "ece":  # which resampling alone makes greater
            spread = np.std([draw[name] for draw in draws])
            assert figure.values.std() / np.sqrt(300) == pytest.approx(spread, rel=0.25), name


def test_a_class_without_an_image_is_in_no_mean() -> None:
    task = Task(classes=("a", "b", "c", "never"))
    outputs = outputs_of(task)
    some = outputs.take(np.flatnonzero(outputs.labels[:, 0] < 3))
    areas, _ = per_class_areas(some)
    assert np.isnan(areas).tolist() == [False, False, False, True]
    assert values(some)["auroc"] == pytest.approx(areas[:3].mean())
    one = outputs.take(np.flatnonzero(outputs.labels[:, 0] == 0))
    assert "auroc" not in values(one)
    assert values(one)["kappa"] == pytest.approx(0)


# --- intervals

DRAWS = 1000


def covered(pairs: Sequence[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in pairs]))


@pytest.mark.parametrize("share", [0.6, 0.93])
def test_wilson_covers_what_it_says(share: float) -> None:
    hits = np.random.default_rng(0).binomial(2000, share, DRAWS).tolist()
    assert 0.935 <= covered([wilson(hit, 2000) for hit in hits], share) <= 0.965


def test_paired_differences_cover_what_they_say() -> None:
    cells = np.random.default_rng(0).multinomial(1000, [0.05, 0.03, 0.92], DRAWS).tolist()
    pairs = [paired_difference(one, other, 1000) for one, other, _ in cells]
    assert 0.935 <= covered(pairs, 0.02) <= 0.965


@pytest.mark.parametrize(
    ("draws", "images", "low", "high"),
    [(150, 500, 0.9, 0.99), pytest.param(2000, 500, 0.935, 0.965, marks=pytest.mark.slow)],
)
def test_the_bootstrap_covers_what_it_says(
    draws: int, images: int, low: float, high: float
) -> None:
    """Of a skewed number, such as the loss, and of figures that are no means."""
    task = Task(classes=("a", "b", "c"))
    truth = values(outputs_of(task, count=300_000, seed=9, digits=3))
    found = [
        with_intervals(figures(outputs_of(task, count=images, seed=seed, digits=3)))
        for seed in range(draws)
    ]
    assert all("ece" not in each for each in found)
    for name in ("loss", "brier", "auroc", "average_precision", "macro_f1", "mcc", "top1"):
        assert low <= covered([each[name] for each in found], truth[name]) <= high, name


def test_p_values_equal_scipy() -> None:
    for one, other in [(0, 0), (3, 3), (0, 6), (10, 25), (400, 300)]:
        known = stats.binomtest(one, one + other).pvalue if one + other else 1.0
        assert mcnemar(one, other) == pytest.approx(known, rel=1e-9)
    for t, freedom in [(0.0, 3), (2.5, 1.5), (2.5, 4), (-3, 40), (1, 1e6)]:
        assert student_p(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=2e-3)
    for freedom in (1.0, 2.3, 30.0, 5000.0):
        found = intervals.student_quantile(freedom)
        assert found == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)


def test_equal_predictions_have_no_interval_but_wilsons() -> None:
    task = Task(classes=("a", "b"))
    logits = np.tile(np.float32([[3, 0]]), (50, 1))
    outputs = Outputs.of(task, logits, np.zeros(50, np.int64), [str(n) for n in range(50)])
    found = with_intervals(figures(outputs))
    assert found == {"top1": pytest.approx((0.9287, 1.0), abs=1e-3)}
