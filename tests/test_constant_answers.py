"""A model that answers the same to every image: evaluate and export say so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from distcls.commands.evaluate import main as evaluate_main
from distcls.commands.export import main as export_main
from distcls.data.dataset import Dataset
from distcls.evaluation.metrics import LogitSpread, constant_answers, metric_state
from distcls.export.certificate import certify, certify_accuracy, load_images, reference_outputs
from distcls.runtime.model import OnnxModel
from distcls.task import Task
from tests import multi_output, tiny_dataset, tiny_onnx
from tests.small_networks import untrained

COUNT = 40
CLASSES = Task(classes=("a", "b", "c", "d"))


def problems(task: Task, logits: NDArray[np.float64], labels: NDArray[np.int64]) -> list[str]:
    """What is found, in one state and in two that are merged."""
    state, spread = metric_state(task), LogitSpread(task)
    for start in range(0, len(labels), 13):
        part = metric_state(task), LogitSpread(task)
        rows = slice(start, start + 13)
        part[0].update(logits[rows].astype(np.float32), labels[rows])
        part[1].update(logits[rows].astype(np.float32))
        state.merge(part[0].state())
        spread.merge(part[1].state())
    return constant_answers(state.compute(), spread, task)


def noise(classes: int, scale: float) -> NDArray[np.float64]:
    return np.random.default_rng(0).normal(0, scale, (COUNT, classes))


def test_nearly_all_predictions_are_one_class() -> None:
    labels = np.arange(COUNT) % 4
    logits = np.add(noise(4, 1.0), [0, 10, 0, 0])
    assert problems(CLASSES, logits, labels) == [
        "100% of the predictions are 'b', 25% of the labels are"
    ]
    logits[:2, 2] += 100
    assert problems(CLASSES, logits, labels) == [
        "95% of the predictions are 'b', 25% of the labels are"
    ]
    logits[:3, 2] += 100
    assert not problems(CLASSES, logits, labels)


def test_a_good_model_on_one_class_is_no_problem() -> None:
    labels = np.zeros(COUNT, np.int64)
    logits = np.add(noise(4, 0.01), [50, 0, 0, 0])
    assert not problems(CLASSES, logits, labels)
    labels[0] = 1  # 97.5 % are of this class: so may be the predictions
    assert not any("predictions are" in text for text in problems(CLASSES, logits, labels))


def test_logits_that_hardly_depend_on_the_image() -> None:
    labels = np.arange(COUNT) % 4
    offsets = np.array([0.0, 2.0, 1.0, 1.99])
    logits = noise(4, 0.02) + offsets
    assert 0.3 < (logits.argmax(axis=1) == 1).mean() < 0.9  # not even the predictions are constant
    found = problems(CLASSES, logits, labels)
    assert len(found) == 1
    assert "hardly depend on the image" in found[0]
    brightness = np.random.default_rng(1).normal(0, 9, (COUNT, 1))  # no difference to any class
    assert problems(CLASSES, logits + brightness, labels) == found
    assert not problems(CLASSES, noise(4, 0.4) + offsets, labels)
    assert not problems(CLASSES, noise(4, 1.0), labels)
    assert problems(CLASSES, np.zeros((COUNT, 4)), labels)
    untrained = noise(4, 0.002)  # relatively it varies, but no probability by 1 %
    assert "they vary by 0.0016 over" in problems(CLASSES, untrained, labels)[0]


def test_heads_and_labels() -> None:
    heads = multi_output.heads(3, 2, 2)
    labels = np.stack([np.arange(COUNT) % 3, np.arange(COUNT) % 2, np.arange(COUNT) % 2], axis=1)
    logits = np.add(noise(7, 1.0), [0, 0, 0, 8, 0, 0, 9])
    assert problems(heads, logits, labels) == [
        "100% of the predictions are 'b:c0', 50% of the labels are (and 1 more heads are like that)"
    ]
    tags = multi_output.labels(3)
    given = np.stack([np.arange(COUNT) % 3 == place for place in range(3)], axis=1).astype(np.int64)
    found = problems(tags, np.add(noise(3, 1.0), [-9, 9, -9]), given)
    assert found == ["all predictions are the same (l1), the labels are not"]
    assert "(no label)" in problems(tags, noise(3, 1.0) - 9, given)[0]
    assert not problems(tags, noise(3, 1.0), given)
    assert not problems(tags, noise(3, 1.0) - 50, np.zeros_like(given))


def dark(tmp_path: Path) -> Path:
    """Images that hardly differ, with any labels: the tiny model answers red to all of them."""
    images = np.full((COUNT, 8, 8, 3), (200, 20, 20), np.uint8)
    images += np.arange(COUNT, dtype=np.uint8)[:, None, None, None] // 30
    labels = [index % 3 for index in range(COUNT)]
    return tiny_dataset.write(tmp_path / "d", list(images), labels, tiny_onnx.COLOURS)


def test_evaluate_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tiny_onnx.write(tmp_path / "m.onnx"), dark(tmp_path)
    evaluate_main(["--model", str(model), "--data", str(data), "--json", "--quiet"])
    captured = capsys.readouterr()
    warnings = json.loads(captured.out)["warnings"]
    assert warnings[0] == "100% of the predictions are 'red', 35% of the labels are"
    assert "hardly depend" in warnings[1]
    assert captured.err.splitlines() == [f"warning: {text}" for text in warnings]


def test_export_warns_and_the_certificate_says_so(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = untrained(tmp_path / "best.pth", digits, (28, 28), "simple_cnn", scale=1e-3)
    export_main(["--ckpt", str(checkpoint), "--limit", "64", "--json"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [result["top1_agreement"] for result in found["results"]] == [1, 1, 1]
    assert 1 <= found["distinct_predictions"] < 10
    assert any("hardly depend on the image" in text for text in found["warnings"])
    for text in found["warnings"]:
        assert text.endswith("agreement of such predictions proves nothing")
        assert f"warning: {text}" in captured.err.splitlines()
    del found["out"]
    assert OnnxModel(tmp_path / "best.onnx").card.certificate == found


def test_the_certificates_count_distinct_predictions(tmp_path: Path) -> None:
    model = OnnxModel(tiny_onnx.write(tmp_path / "m.onnx"))
    split = Dataset.open(dark(tmp_path)).split("test")
    images = load_images(split, model.card.preprocess, 30)
    certificate = certify(model, model, images, split.labels[:30], split="test", tolerance=1e-3)
    assert certificate.holds
    assert certificate.distinct_predictions == 1
    assert len(certificate.warnings) == 2
    assert certificate.lines()[-1] == (
        "the same prediction for all of 30 images: their agreement proves nothing"
    )
    good, _ = tiny_dataset.coloured(30)
    certificate = certify(model, model, good, split="test", tolerance=1e-3)
    assert certificate.distinct_predictions == 3
    assert certificate.lines()[-1] == "3 distinct predictions among 30 images"
    accuracy = certify_accuracy(
        model,
        split,
        reference_outputs(model, split),
        precision="int8",
        max_accuracy_drop=0.1,
        min_agreement=99,
        speeds=(1.0, 1.0),
    )
    assert accuracy.distinct_predictions == 1
    assert list(accuracy.warnings) == accuracy.to_json()["warnings"] != []
    assert any("agreement proves nothing" in line for line in accuracy.lines())
    json.dumps(accuracy.to_json())
    assert dataclasses.replace(accuracy, distinct_predictions=2).holds == accuracy.holds


def test_images_are_taken_from_all_of_the_split(tmp_path: Path) -> None:
    """A split is in the order of its classes: its first images are of one class."""
    images = np.repeat(np.arange(100, dtype=np.uint8), 192).reshape(100, 8, 8, 3)
    data = tiny_dataset.write(tmp_path / "d", list(images), [0] * 100, ("a", "b"))
    split = Dataset.open(data).split("test")
    taken = load_images(split, tiny_onnx.card().preprocess, 5)[:, 0, 0, 0]
    assert taken.tolist() == [0, 25, 50, 74, 99]
    assert len(load_images(split, tiny_onnx.card().preprocess, 1000)) == 100
