"""Rows and figures of multi-head and multi-label models, from the command line to the files."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score

from distcls.commands.evaluate import main as evaluate_main
from distcls.commands.predict import main as predict_main
from distcls.data.dataset import Dataset
from distcls.data.formats.detect import open_source
from distcls.errors import UsageError
from distcls.evaluation.evaluate import match_classes
from distcls.export.certificate import certify, certify_accuracy, reference_outputs
from distcls.model_card import ModelCard
from distcls.runtime.model import OnnxModel
from distcls.task import Head, Task
from tests import multi_output, tiny_dataset, tiny_onnx
from tests.test_writers import read

COUNT = 40
HEADS = multi_output.heads(3, 4)
LABELS = multi_output.labels(5, (0.9, 0.5, 0.999, 0.7, 0.8))


def card(task: Task) -> ModelCard:
    plain = tiny_onnx.card(classes=task.classes)
    return dataclasses.replace(plain, task=task)


def logits(task: Task) -> NDArray[np.float32]:
    images = tiny_dataset.coloured(COUNT)[0]
    return tiny_onnx.expected_logits(images, len(task.classes))


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """All images for testing and four for training; a, b and tags are mostly what is answered."""
    rng = np.random.default_rng(3)
    answers = HEADS.decide(logits(HEADS))
    heads = np.where(rng.random(answers.shape) < 0.8, answers, 0)
    given = LABELS.decide(logits(LABELS))
    labels = np.where(rng.random(given.shape) < 0.8, given, 1 - given)
    rows = [["path", "a", "b", "tags", "split"]]
    for number, image in enumerate(tiny_dataset.coloured(COUNT)[0]):
        assert cv2.imwrite(str(tmp_path / f"{number:03d}.png"), image[..., ::-1])
        names = [f"c{index}" for index in heads[number]]
        rows.append([f"{number:03d}.png", *names, LABELS.text(labels[number]), "test"])
    for extra in range(4):  # every class occurs and something trains
        assert cv2.imwrite(str(tmp_path / f"train{extra}.png"), np.full((8, 8, 3), extra, np.uint8))
        tags = "l0|l1|l2|l3|l4"
        rows.append([f"train{extra}.png", f"c{min(extra, 2)}", f"c{extra}", tags, "train"])
    path = tmp_path / "list.csv"
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows(rows)
    return path


@pytest.fixture
def heads(listed: Path) -> tuple[Path, Path]:
    """Dataset directory and model."""
    data = multi_output.dataset(
        listed, listed.parent / "heads", label_columns=("a", "b"), val_fraction=0
    )
    return data, tiny_onnx.write(listed.parent / "heads.onnx", card(HEADS))


@pytest.fixture
def tagged(listed: Path) -> tuple[Path, Path]:
    data = multi_output.dataset(
        listed, listed.parent / "tags", labels_column="tags", val_fraction=0
    )
    return data, tiny_onnx.write(listed.parent / "tags.onnx", card(LABELS))


def predicted(pair: tuple[Path, Path], out: Path, *more: str) -> list[dict[str, Any]]:
    predict_main([str(pair[0]), "--model", str(pair[1]), "--out", str(out), *more])
    return read(out)


def truths(listed: Path, *columns: str) -> list[str]:
    with listed.open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["split"] == "test"]
    return ["|".join(row[name] for name in columns) for row in rows]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_rows_of_heads(heads: tuple[Path, Path], tmp_path: Path, ending: str) -> None:
    rows = predicted(heads, tmp_path / f"pre{ending}", "--probabilities", "--batch-size", "7")
    pairs = ["label", "probability", "label:a", "probability:a", "label:b", "probability:b"]
    every = [f"p:{name}" for name in HEADS.classes]
    assert list(rows[0]) == ["image_id", *pairs, *every, "error"]
    own = logits(HEADS)
    powers = [np.exp(own[:, part].astype(np.float64)) for part in HEADS.slices]
    a, b = (power / power.sum(1, keepdims=True) for power in powers)
    assert [row["label:b"] for row in rows] == [f"c{index}" for index in b.argmax(1)]
    names = [f"c{i}|c{j}" for i, j in zip(a.argmax(1), b.argmax(1), strict=True)]
    assert [row["label"] for row in rows] == names
    given = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(given, a.max(1) * b.max(1), rtol=1e-5)
    table = [[float(row[name]) for name in every] for row in rows]
    np.testing.assert_allclose(table, np.concatenate([a, b], axis=1), rtol=1e-5)


def test_rows_of_labels(tagged: tuple[Path, Path], tmp_path: Path) -> None:
    rows = predicted(tagged, tmp_path / "pre.jsonl")
    assert list(rows[0]) == ["image_id", "label", "probability", "error"]
    probabilities = 1 / (1 + np.exp(-logits(LABELS).astype(np.float64)))
    assert LABELS.thresholds is not None
    given = probabilities >= np.array(LABELS.thresholds)
    names = ["|".join(np.array(LABELS.classes)[row]) for row in given]
    assert [row["label"] for row in rows] == names
    assert len(set(names)) > 3
    whole = np.where(given, probabilities, 1 - probabilities).prod(1)
    np.testing.assert_allclose([row["probability"] for row in rows], whole, rtol=1e-4)


def test_a_bad_image_is_an_empty_row(heads: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"text")
    (folder / "1.png").write_bytes((tmp_path / "001.png").read_bytes())
    rows = predicted((folder, heads[1]), tmp_path / "pre.csv", "--probabilities")
    assert {value for key, value in rows[0].items() if key not in ("image_id", "error")} == {None}
    assert rows[0]["error"]
    assert rows[1]["label"].count("|") == 1


@pytest.mark.parametrize("kind", ["heads", "tagged"])
def test_evaluate_is_what_predict_s_table_gives(
    kind: str,
    listed: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, model = pair = request.getfixturevalue(kind)
    out = tmp_path / "results"
    evaluate_main(["--model", str(model), "--data", str(data), "--out", str(out), "--json"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    rows = predicted(pair, tmp_path / "pre.csv")
    answers = [row["label"] or "" for row in rows]
    truth = truths(listed, *(("a", "b") if kind == "heads" else ("tags",)))
    assert found["exact"] == accuracy_score(truth, answers)
    assert 0.1 < found["exact"] < 1
    assert json.loads((out / "metrics.json").read_text()) == found
    with (out / "confusion.csv").open(newline="") as handle:
        table = list(csv.reader(handle))
    if kind == "heads":
        assert table[0] == ["truth", *HEADS.classes]
        counts = [[row["label:a"] for row in rows], [line.partition("|")[0] for line in truth]]
        hits = sum(a == b == "c2" for a, b in zip(*counts, strict=True))
        assert int(table[3][3]) == hits
        assert "top5" not in found  # heads of three and four classes
        recall = found["per_class"]["a:c2"]["recall"]
        assert recall == pytest.approx(hits / counts[1].count("c2"))
    else:
        assert table[0] == ["label", "true_no", "false_yes", "false_no", "true_yes"]
        assert [sum(map(int, row[1:])) for row in table[1:]] == [COUNT] * 5
        names = LABELS.classes
        wanted, got = (
            np.array([[name in text.split("|") for name in names] for text in texts])
            for texts in (truth, answers)
        )
        per_label = [found["per_class"][name]["f1"] for name in names]
        np.testing.assert_allclose(per_label, f1_score(wanted, got, average=None, zero_division=0))
        assert "top5" not in found
    assert "confusion.png is left out" in captured.err
    assert not (out / "confusion.png").exists()


def test_table_for_people_and_the_picture_of_one_alphabet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = multi_output.manifest(tmp_path / "source", 30)
    data = multi_output.dataset(path, tmp_path / "data", **multi_output.TEXT)
    word = Task.of_heads([Head(str(n), (*multi_output.TAGS, "")) for n in (1, 2)])
    model = tiny_onnx.write(tmp_path / "m.onnx", card(word))
    flags = ["--model", str(model), "--data", str(data), "--split", "train"]
    evaluate_main([*flags, "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "exact: images with all heads right; top-1: of the heads one by one\n" in text
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert {"images", "loss", "top-1", "top-5", "exact", "1:0", "2:"} <= set(lines)
    assert lines["weighted"][-1] == "40"  # twenty images of two heads
    picture = cv2.imread(str(tmp_path / "out" / "confusion.png"))
    assert picture is not None


def test_a_picture_of_predictions_compares_texts(
    listed: Path, heads: tuple[Path, Path], tmp_path: Path
) -> None:
    source = open_source(str(heads[0]))
    assert source.true_labels == truths(listed, "a", "b")
    predicted(heads, tmp_path / "pre.csv", "--show", "6")
    assert cv2.imread(str(tmp_path / "pre.png")) is not None


@pytest.mark.parametrize("kind", ["heads", "tagged"])
def test_more_than_the_first_is_refused(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pair = request.getfixturevalue(kind)
    with pytest.raises(UsageError, match=r"^top_k: 2 is for a single label per image, "):
        predicted(pair, tmp_path / "pre.csv", "--top-k", "2")
    assert not (tmp_path / "pre.csv").exists()


def test_other_kinds_are_refused(
    heads: tuple[Path, Path], tagged: tuple[Path, Path], tmp_path: Path
) -> None:
    plain = tiny_onnx.write(tmp_path / "plain.onnx")
    for data, model in ((heads[0], plain), (heads[0], tagged[1]), (tagged[0], heads[1])):
        with pytest.raises(UsageError, match=r"the model predicts .*has ") as caught:
            evaluate_main(["--model", str(model), "--data", str(data)])
        assert "\n" not in str(caught.value)
    split = Dataset.open(tagged[0]).split("test")
    assert split.task.thresholds is None
    assert match_classes(split, LABELS, "data").split.task == LABELS  # the model's own thresholds
    split = Dataset.open(heads[0]).split("test")
    other = Task.of_heads([HEADS.heads[0], dataclasses.replace(HEADS.heads[1], name="z")])
    with pytest.raises(UsageError, match="the model has a head 'z', which the data lacks"):
        match_classes(split, other, "data")
    with pytest.raises(UsageError, match="data has a head 'b', which the model lacks"):
        match_classes(split, Task.of_heads([HEADS.heads[0]]), "data")


class Altered(tiny_onnx.FakeModel):
    """A model whose answers are those of another but for one logit of each image."""

    def __init__(self, path: Path, place: int) -> None:
        self._model = OnnxModel(path)
        self._place = place
        self.card = self._model.card

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits = self._model.logits(images)
        logits[:, self._place] += 100
        return logits


@pytest.mark.parametrize("kind", ["heads", "tagged"])
def test_the_accuracy_certificate_counts_whole_predictions_and_each_head(
    kind: str, request: pytest.FixtureRequest
) -> None:
    data, model = request.getfixturevalue(kind)
    task = HEADS if kind == "heads" else LABELS
    split = Dataset.open(data).split("test")
    found = certify_accuracy(
        Altered(model, place=4),
        split,
        reference_outputs(OnnxModel(model), split),
        precision="int8",
        max_accuracy_drop=100,
        min_agreement=0,
        speeds=(2.0, 1.0),
    )
    wanted, truths = task.decide(logits(task)), split.labels
    given = wanted.copy()
    given[:, 1 if kind == "heads" else 4] = 1
    assert found.top1 == pytest.approx((given == truths).all(axis=1).mean())
    assert found.top1_reference == pytest.approx((wanted == truths).all(axis=1).mean())
    assert found.top1_agreement == pytest.approx((given == wanted).all(axis=1).mean())
    columns = [slice(0, 1), slice(1, 2)] if kind == "heads" else [slice(None)]
    assert [part.name for part in found.heads] == (["a", "b"] if kind == "heads" else ["labels"])
    for part, column in zip(found.heads, columns, strict=True):
        assert part.top1 == pytest.approx((given == truths)[:, column].mean())
        assert part.top1_reference == pytest.approx((wanted == truths)[:, column].mean())
        assert part.top1_agreement == pytest.approx((given == wanted)[:, column].mean())
    worst = found.worst
    assert worst is not None
    assert worst.name == ("b" if kind == "heads" else "labels")
    assert worst.drop > 0
    assert any(repr(worst.name) in line for line in found.lines())
    assert found.holds
    unhurt = dataclasses.replace(found, top1=found.top1_reference)
    assert unhurt.holds
    assert not dataclasses.replace(unhurt, max_accuracy_drop=worst.drop - 0.01).holds
    assert json.loads(json.dumps(found.to_json())) == found.to_json()


@pytest.mark.parametrize("kind", ["heads", "tagged"])
def test_parity_counts_images_whose_answers_are_all_the_same(
    kind: str, request: pytest.FixtureRequest
) -> None:
    _, model = request.getfixturevalue(kind)
    images = tiny_dataset.coloured(COUNT)[0]
    task = HEADS if kind == "heads" else LABELS
    right = OnnxModel(model)
    options = {"split": "val", "tolerance": 1e-3}
    assert certify(right, right, images, **options).holds
    found = certify(right, Altered(model, place=4), images, **options)
    assert not found.holds
    answers = task.decide(logits(task))
    same = (answers[:, 1] == 1) if kind == "heads" else (answers[:, 4] == 1)
    assert found.results[0].top1_agreement == pytest.approx(same.mean())
