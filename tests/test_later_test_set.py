"""`distcls evaluate` on data that was gathered later: classes are matched by their names."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from distcls.commands.evaluate import main
from distcls.data.dataset import Dataset
from distcls.data.prepare import PrepareOptions, prepare
from distcls.errors import UsageError
from distcls.evaluation.evaluate import match_classes
from distcls.model_card import ModelCard
from distcls.task import Head, Task
from tests import multi_output, tiny_dataset, tiny_onnx

COUNT = 60
IMAGES, BRIGHTEST = tiny_dataset.coloured(COUNT)
TRUTH = [(label + (index % 5 == 0)) % 3 for index, label in enumerate(BRIGHTEST)]
"""True colours, a fifth of them unlike the images."""
ANSWERS = tiny_onnx.expected_logits(IMAGES).argmax(axis=1)


def write(folder: Path, names: Sequence[str], classes: Sequence[str]) -> Path:
    """The first images with the classes of these names, some of which may be None: left out."""
    chosen = [(image, name) for image, name in zip(IMAGES, names, strict=True) if name]
    labels = [classes.index(name) for _, name in chosen]
    return tiny_dataset.write(folder, [image for image, _ in chosen], labels, classes)


def evaluated(
    capsys: pytest.CaptureFixture[str], model: Path, data: Path, *more: str
) -> dict[str, Any]:
    main(["--model", str(model), "--data", str(data), "--json", *more])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_onnx.write(tmp_path / "m.onnx")


@pytest.fixture
def colours() -> list[str]:
    return [tiny_onnx.COLOURS[label] for label in TRUTH]


def test_another_order_is_mapped(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, colours: list[str]
) -> None:
    own = evaluated(capsys, model, write(tmp_path / "own", colours, tiny_onnx.COLOURS))
    other = write(tmp_path / "other", colours, ("blue", "red", "green"))
    assert {**evaluated(capsys, model, other), "data": own["data"]} == own
    assert own["absent_classes"] == own["warnings"] == []
    assert (own["unknown_images"], own["unknown_classes"]) == (0, {})
    assert own["top1"] == accuracy_score(TRUTH, ANSWERS)


def test_an_absent_class_has_support_0_and_is_in_no_macro_mean(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, colours: list[str]
) -> None:
    kept = [name if name != "green" else "" for name in colours]
    data = write(tmp_path / "d", kept, ("blue", "red"))
    found = evaluated(capsys, model, data)
    rows = [index for index, name in enumerate(kept) if name]
    truth, answers = np.array(TRUTH)[rows], ANSWERS[rows]
    assert (answers == 1).any()  # some are predicted as the absent one
    assert found["count"] == len(rows)
    assert found["top1"] == accuracy_score(truth, answers)
    macro = f1_score(truth, answers, average="macro", labels=[0, 2])
    assert found["macro_f1"] == pytest.approx(macro)
    assert found["absent_classes"] == ["green"]
    assert found["per_class"]["green"]["support"] == 0
    main(["--model", str(model), "--data", str(data)])
    captured = capsys.readouterr()
    assert "1 of 3 classes have no image and are in no macro mean: green" in captured.out
    assert "matched by name" in captured.err


def test_images_of_unknown_classes_are_counted_apart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, colours: list[str]
) -> None:
    mixed = [("owl", "yak")[index % 2] if index % 7 < 2 else n for index, n in enumerate(colours)]
    known = [name if name in tiny_onnx.COLOURS else "" for name in mixed]
    classes = ("blue", "owl", "green", "red", "yak", "zebu")
    data = write(tmp_path / "mixed", mixed, classes)
    found = evaluated(capsys, model, data, "--out", str(tmp_path / "out"))
    alone = evaluated(capsys, model, write(tmp_path / "alone", known, tiny_onnx.COLOURS))
    strangers = {name: mixed.count(name) for name in ("owl", "yak")}
    assert found["unknown_classes"] == strangers
    assert found["unknown_images"] == sum(strangers.values()) > 10
    assert found["count"] == COUNT - found["unknown_images"]
    for key in alone.keys() - {"data", "unknown_classes", "unknown_images"}:
        assert found[key] == alone[key], key
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found
    limited = evaluated(capsys, model, data, "--limit", "20")
    assert limited["count"] + limited["unknown_images"] == 20
    main(["--model", str(model), "--data", str(data)])
    captured = capsys.readouterr()
    assert f"{found['unknown_images']} images of classes that the model does not" in captured.out
    assert f"owl ({strangers['owl']}), yak ({strangers['yak']})" in captured.out
    assert f"{found['unknown_images']} images of other classes are left out" in captured.err


def test_no_class_in_common_is_refused(tmp_path: Path, model: Path) -> None:
    data = write(tmp_path / "d", ["owl", "yak"] * (COUNT // 2), ("owl", "yak"))
    with pytest.raises(
        UsageError, match="predicts red, green, blue, the data has owl, yak"
    ) as told:
        main(["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")])
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("label", [-1, 3, 7])
def test_labels_that_are_no_class_are_refused(tmp_path: Path, model: Path, label: int) -> None:
    labels = [label, *TRUTH[1:]]
    data = tiny_dataset.write(tmp_path / "d", list(IMAGES), labels, ("red", "green", "owl"))
    with pytest.raises(UsageError, match=f"label is {label}, expected a class from 0 to 2"):
        main(["--model", str(model), "--data", str(data)])


def photos(folder: Path, colours: Sequence[str]) -> Path:
    """A tree CLASS/*.png."""
    for index, (image, name) in enumerate(zip(IMAGES, colours, strict=True)):
        path = folder / name / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image[..., ::-1])
    return folder


@pytest.mark.parametrize("below", ["", "test"])
def test_a_dataset_with_a_test_split_alone(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    colours: list[str],
    below: str,
) -> None:
    photos(tmp_path / "photos" / below, colours)
    more = {} if below else {"test_fraction": 1.0}
    made = prepare(PrepareOptions(source=str(tmp_path / "photos"), out=tmp_path / "d", **more))
    assert made.counts == {"test": COUNT}
    said = capsys.readouterr().err
    assert "all images are in the test split" in said
    assert "warning" not in said
    found = evaluated(capsys, model, tmp_path / "d")
    assert found["count"] == COUNT
    assert found["top1"] == accuracy_score(TRUTH, ANSWERS)


def test_one_class_is_enough_to_test(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    photos(tmp_path / "photos", ["red"] * COUNT)
    prepare(PrepareOptions(source=str(tmp_path / "photos"), out=tmp_path / "d", test_fraction=1.0))
    found = evaluated(capsys, model, tmp_path / "d")
    assert found["top1"] == found["macro_recall"] == (ANSWERS == 0).mean()
    with pytest.raises(UsageError, match="a classifier needs at least two"):
        prepare(PrepareOptions(source=str(tmp_path / "photos"), out=tmp_path / "e"))


def test_a_folder_of_images_is_evaluated_as_it_is(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    colours: list[str],
) -> None:
    """Also one that lacks a class, has one more, or is divided; figures are those of a dataset."""
    monkeypatch.chdir(tmp_path)
    names = [{"red": "violet", "green": "green", "blue": "blue"}[name] for name in colours]
    photos(tmp_path / "my photos", names)
    photos(tmp_path / "divided" / "test", names)
    photos(tmp_path / "divided" / "train", names)
    prepare(PrepareOptions(source="my photos", out=tmp_path / "d", test_fraction=1, quiet=True))
    expected = evaluated(capsys, model, Path("d"))
    assert expected["unknown_classes"] == {"violet": names.count("violet")}
    assert expected["absent_classes"] == ["red"]
    for folder in ("my photos", "divided"):
        found = evaluated(capsys, model, Path(folder))
        assert {**found, "data": ""} == {**expected, "data": ""}
    with pytest.raises(UsageError, match="my photos: no split 'val'"):
        main(["--model", str(model), "--data", "my photos", "--split", "val"])
    with pytest.raises(UsageError, match=r"divided: no split 'val' \(choices: test, train"):
        main(["--model", str(model), "--data", "divided", "--split", "val"])


def test_the_folder_that_a_model_was_trained_on_is_refused(
    tmp_path: Path, model: Path, colours: list[str]
) -> None:
    photos(tmp_path / "photos", colours)
    own = tmp_path / "dataset"
    prepare(PrepareOptions(source=str(tmp_path / "photos"), out=own, quiet=True))
    told = r"photos is what the model was trained on; its test split is in --data .*dataset"
    with pytest.raises(UsageError, match=told):
        main(["--model", str(model), "--data", str(tmp_path / "photos")])
    photos(tmp_path / "later", colours)
    main(["--model", str(model), "--data", str(tmp_path / "later")])


def card(task: Task) -> ModelCard:
    return dataclasses.replace(tiny_onnx.card(classes=task.classes), task=task)


def prepared(folder: Path, columns: dict[str, Sequence[str]], **options: object) -> Path:
    """The dataset directory, all for testing, of a manifest with these columns of labels."""
    folder.mkdir()
    count = len(next(iter(columns.values())))
    with (folder / "list.csv").open("w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["path", *columns])
        for index in range(count):
            assert cv2.imwrite(str(folder / f"{index:03d}.png"), IMAGES[index][..., ::-1])
            rows.writerow([f"{index:03d}.png", *(values[index] for values in columns.values())])
    return multi_output.dataset(
        folder / "list.csv", folder / "data", **{"test_fraction": 1.0, **options}
    )


HEADS = Task.of_heads([Head("a", ("x", "y", "z")), Head("b", ("p", "q"))])
HEAD_ANSWERS = HEADS.decide(tiny_onnx.expected_logits(IMAGES, 5))


def test_heads_and_their_classes_are_matched_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tiny_onnx.write(tmp_path / "m.onnx", card(HEADS))
    a = ["zy"[index % 2] for index in range(COUNT)]  # x is absent
    b = ["owl" if index < 8 else "qp"[index % 3 == 0] for index in range(COUNT)]
    data = prepared(tmp_path / "d", {"b": b, "a": a}, label_columns=("b", "a"))
    assert [head.name for head in Dataset.open(data).task.heads] == ["b", "a"]
    found = evaluated(capsys, model, data)
    truth = np.array([["xyz".index(i), "pq".index(j)] for i, j in zip(a[8:], b[8:], strict=True)])
    right = HEAD_ANSWERS[8:] == truth
    assert found["exact"] == right.all(axis=1).mean()
    assert found["top1"] == pytest.approx(right.mean())
    assert found["absent_classes"] == ["a:x"]
    assert (found["unknown_images"], found["unknown_classes"]) == (8, {"b:owl": 8})


def test_shorter_and_longer_texts(tmp_path: Path) -> None:
    words = ["ab", "b", "a", "ba"]
    split = Dataset.open(prepared(tmp_path / "d", {"text": words}, text_column="text")).split(
        "test"
    )
    longer = Task.of_heads([Head(str(n), ("", "b", "a")) for n in (1, 2, 3)])
    matched = match_classes(split, longer, "data").split
    assert longer.texts(matched.labels) == words
    assert matched.labels.shape == (4, 3)
    shorter = Task.of_heads([Head("1", ("b", "a", ""))])
    found = match_classes(split, shorter, "data")
    assert shorter.texts(found.split.labels) == ["b", "a"]
    assert found.split.image_ids == split.image_ids[1:3]
    assert (found.unknown_images, found.unknown_classes) == (2, {"2:a": 1, "2:b": 1})


def test_labels_are_matched_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    task = Task(kind="multi_label", classes=("k", "l", "m"), thresholds=(0.99, 0.9, 0.9))
    model = tiny_onnx.write(tmp_path / "m.onnx", card(task))
    tags = [("m|k", "m", "", "owl|k")[index % 4] for index in range(COUNT)]
    data = prepared(tmp_path / "d", {"tags": tags}, labels_column="tags")
    found = evaluated(capsys, model, data)
    known = [index for index in range(COUNT) if index % 4 != 3]
    truth = np.array([[name in tags[index].split("|") for name in "klm"] for index in known])
    right = task.decide(tiny_onnx.expected_logits(IMAGES))[known] == truth
    assert found["exact"] == right.all(axis=1).mean()
    assert found["top1"] == pytest.approx(right.mean())
    assert found["absent_classes"] == ["l"]
    assert (found["unknown_images"], found["unknown_classes"]) == (15, {"owl": 15})
