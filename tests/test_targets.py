"""Kinds of answers: what logits decide, what it is called, and its JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from distcls.errors import BadValue, UsageError
from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.task import Head, Task, sigmoid
from tests import multi_output

SINGLE = Task(classes=("cat", "dog", "owl"))
WORD = Task.of_heads([Head(str(place), ("a", "b", "")) for place in (1, 2, 3)])
KINDS = [
    SINGLE,
    WORD,
    multi_output.heads(2, 4),
    multi_output.labels(3),
    multi_output.labels(2, (0.25, 0.75)),
]


def logits(targets: Task, count: int = 20) -> np.ndarray:
    shape = (count, len(targets.classes))
    return np.random.default_rng(0).normal(0, 3, shape).astype(np.float32)


def test_heads_are_argmax_and_softmax_of_their_own_logits() -> None:
    targets = multi_output.heads(2, 4)
    assert targets.classes == ("a:c0", "a:c1", "b:c0", "b:c1", "b:c2", "b:c3")
    given = logits(targets)
    answers, probabilities = targets.decide(given), targets.probabilities(given)
    assert answers.dtype == np.int64
    np.testing.assert_array_equal(answers[:, 0], given[:, :2].argmax(1))
    np.testing.assert_array_equal(answers[:, 1], given[:, 2:].argmax(1))
    for part in (probabilities[:, :2], probabilities[:, 2:]):
        np.testing.assert_allclose(part.sum(1), 1, rtol=1e-6)
    expected = probabilities[:, :2].max(1) * probabilities[:, 2:].max(1)
    np.testing.assert_allclose(targets.confidence(probabilities, answers), expected, rtol=1e-6)
    np.testing.assert_array_equal(
        targets.of_answers(probabilities, answers)[:, 1], probabilities[:, 2:].max(1)
    )
    assert targets.flat([1, 2]) == [1, 4]


def test_labels_are_given_from_their_thresholds_on() -> None:
    targets = multi_output.labels(2, (0.25, 0.75))
    given = np.log(np.array([[1 / 3, 3.0], [0.3, 2.9], [9.0, 9.0]], np.float32))
    given[0] += 1e-6  # 0.25 and 0.75 but for rounding
    np.testing.assert_array_equal(targets.decide(given), [[1, 1], [0, 0], [1, 1]])
    assert multi_output.labels(2).decide(given).tolist() == [[0, 1], [0, 1], [1, 1]]
    probabilities = targets.probabilities(given)
    np.testing.assert_allclose(probabilities[2], 0.9, rtol=1e-6)
    whole = targets.confidence(probabilities, targets.decide(given))
    np.testing.assert_allclose(whole[1:], [0.7 / 0.91 * 1 / 3.9, 0.81], rtol=1e-1)
    assert targets.texts(targets.decide(given)) == ["l0|l1", "", "l0|l1"]
    assert targets.flat([1]) == [1]


def test_sigmoid_neither_overflows_nor_loses_small_ones() -> None:
    values = sigmoid(np.array([-800.0, -50.0, 0.0, 800.0], np.float32))
    np.testing.assert_allclose(values, [0.0, np.exp(-50.0), 0.5, 1.0], rtol=1e-12)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([0, 1, 0], "aba"),
        ([1, 2, 2], "b"),
        ([2, 2, 2], ""),
        ([0, 2, 1], "a␣b"),  # a text that no image has, not `ab`
        ([2, 2, 0], "␣␣a"),
    ],
)
def test_characters_make_a_word_without_its_last_blanks(answer: list[int], text: str) -> None:
    assert WORD.text(answer) == text
    assert multi_output.heads(2, 4).text([1, 3]) == "c1|c3"


def test_texts_of_all_kinds_of_labels() -> None:
    assert SINGLE.texts(np.array([2, 0])) == ["owl", "cat"]
    assert SINGLE.texts(np.array([[2], [0]])) == ["owl", "cat"]
    assert WORD.texts(np.array([[0, 0, 2]])) == ["aa"]


@pytest.mark.parametrize("targets", KINDS, ids=lambda targets: targets.summary())
def test_json_round_trip(targets: Task) -> None:
    assert Task.from_json(json.loads(json.dumps(targets.to_json()))) == targets
    card = ModelCard(
        architecture={},
        task=targets,
        preprocess=Preprocess(size=(8, 8)),
    )
    assert ("targets" in card.to_json()) == (not targets.single)
    read = ModelCard.from_metadata(card.to_metadata(), "m.onnx")
    assert read == card
    assert read.task == targets


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "heads"},
        {"kind": "heads", "heads": []},
        {"kind": "heads", "heads": [{"name": "a", "classes": "xy"}]},
        {"kind": "heads", "heads": [{"name": "a", "classes": ["x", "x"]}]},
        {"kind": "ranks", "classes": ["x"]},
        {"kind": "multi_label", "classes": ["x"], "thresholds": [0.5, 0.5]},
        {"kind": "multi_label", "classes": ["x"], "thresholds": [1.5]},
        {"kind": "multi_label", "classes": ["y"]},
        "x",
    ],
)
def test_a_card_with_other_targets_is_refused(values: Any) -> None:
    card = ModelCard(architecture={}, task=Task(classes=("x",)), preprocess=Preprocess(size=(8, 8)))
    with pytest.raises(UsageError, match=r"^m.onnx: not a model written by distcls"):
        ModelCard.from_json({**card.to_json(), "targets": values}, "m.onnx")


def test_shortage_and_summary() -> None:
    assert [targets.shortage() for targets in KINDS] == [""] * 5
    assert multi_output.heads(2, 1).shortage() == "head 'b' has one class only ('c0')"
    assert Task(classes=("cat",)).shortage() == "one class only ('cat')"
    assert Task(classes=()).shortage() == "no class"
    assert multi_output.labels(1).shortage() == ""
    assert multi_output.labels(0).shortage() == "no label"
    assert SINGLE.summary() == "3 classes"
    assert WORD.summary() == "3 heads of 3 classes each"
    assert multi_output.heads(2, 4).summary() == "2 heads of several classes (a 2, b 4)"


def test_thresholds_belong_to_labels() -> None:
    with pytest.raises(BadValue, match="thresholds"):
        Task(classes=("a",), thresholds=(0.5,))
