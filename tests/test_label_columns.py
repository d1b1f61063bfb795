"""Heads, texts and labels from a manifest's columns, into a dataset directory and out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distcls.data.dataset import CLASSES, INFO, MANIFEST, Dataset
from distcls.data.prepare import PrepareOptions, prepare
from distcls.errors import UsageError
from tests import multi_output, tiny_dataset
from tests.sources import digits, put, write_manifest


def listed(folder: Path, header: str, *rows: str, suffix: str = ".csv") -> Path:
    """A manifest of real images in all splits: 00.png, 01.png, ...; `rows` are what follows."""
    cells = [row.split(";") for row in rows]
    names = [f"{number:02d}.png" for number in range(len(rows))]
    for name, image in zip(names, digits(len(rows))[0], strict=True):
        put(folder / name, image)
    found = ([name, *row] for name, row in zip(names, cells, strict=True))
    return write_manifest(folder / f"list{suffix}", [["path", *header.split(";")], *found])


def opened(path: Path, **options: Any) -> Dataset:
    """Prepared with all images for training."""
    fractions = {"val_fraction": 0.0, "test_fraction": 0.0}
    return Dataset.open(multi_output.dataset(path, path.parent / "out", **fractions, **options))


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        opened(path, **options)
    assert "\n" not in str(caught.value)
    assert not (path.parent / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_one_head_per_column(tmp_path: Path, suffix: str) -> None:
    rows = ("red;10;x", "blue;9;y", "red;9;z", "green;10;x")
    path = listed(tmp_path, "Colour;size;note", *rows, suffix=suffix)
    data = opened(path, label_columns=("colour", "size"))
    heads = data.task.heads
    assert [head.name for head in heads] == ["colour", "size"]
    assert [head.classes for head in heads] == [("blue", "green", "red"), ("9", "10")]
    split = data.split("train")
    assert split.labels.dtype == np.int64
    by_id = dict(zip(split.image_ids, split.labels.tolist(), strict=True))
    assert by_id == {"00.png": [2, 1], "01.png": [0, 0], "02.png": [2, 0], "03.png": [1, 1]}
    assert data.task.texts(split.labels)[0] == "red|10"
    counts = json.loads((data.folder / INFO).read_text())["class_counts"]
    assert counts["colour:red"] == counts["size:9"] == {"train": 2}
    kinds = json.loads((data.folder / CLASSES).read_text())
    assert kinds["kind"] == "heads"
    assert kinds["heads"][1] == {"name": "size", "classes": ["9", "10"]}


def test_a_text_has_one_head_per_character_and_short_ones_end_in_blanks(tmp_path: Path) -> None:
    data = opened(listed(tmp_path, "text", "b1", "a", "1ab", " ab "), text_column="text")
    assert data.task.alphabet == ("1", "a", "b", "")
    assert [head.name for head in data.task.heads] == ["1", "2", "3"]
    assert data.classes[:5] == ("1:1", "1:a", "1:b", "1:", "2:1")
    split = data.split("train")
    by_id = dict(zip(split.image_ids, data.task.texts(split.labels), strict=True))
    assert by_id == {"00.png": "b1", "01.png": "a", "02.png": "1ab", "03.png": "ab"}
    assert split.labels[split.image_ids.index("01.png")].tolist() == [1, 3, 3]


def test_texts_of_one_length_have_no_blank(tmp_path: Path) -> None:
    data = opened(listed(tmp_path, "text", "12", "21", "11"), text_column="text")
    assert data.task.alphabet == ("1", "2")


@pytest.mark.parametrize(("separator", "given"), [(None, "|"), (",", ","), (" and ", " and ")])
def test_labels_and_images_without_any(tmp_path: Path, separator: str | None, given: str) -> None:
    rows = (f"sky{given}sea", "", f"sea {given} sea{given}", "dog")
    path = listed(tmp_path, "tags;n", *(f"{row};{n}" for n, row in enumerate(rows)))
    data = opened(path, labels_column="tags", separator=separator)
    assert data.task.kind == "multi_label"
    assert data.classes == ("dog", "sea", "sky")
    split = data.split("train")
    by_id = dict(zip(split.image_ids, split.labels.tolist(), strict=True))
    assert by_id == {
        "00.png": [0, 1, 1],
        "01.png": [0, 0, 0],
        "02.png": [0, 1, 0],
        "03.png": [1, 0, 0],
    }
    assert pq.read_table(data.folder / MANIFEST).column("label").to_pylist() == [1, -1, 1, 0]


def test_missing_values_are_no_labels_and_decimals_are_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = listed(tmp_path, "tags;size", "sea|sky;10.0", "nan;2.0", "sky;2.0", ";10")
    data = opened(path, labels_column="tags")
    assert data.classes == ("sea", "sky")
    assert data.split("train").labels.sum() == 3
    path = listed(tmp_path / "heads", "tags;size", "a;10.0", "b;2.0", "a;2.0", "b;10")
    assert opened(path, label_columns=("tags", "size")).task.heads[1].classes == ("2", "10")
    names = tmp_path / "names.txt"
    names.write_text("nan\nsea\nsky\n")
    path = listed(tmp_path / "named", "tags;n", "sea|sky;1", "nan;2", "sky;3")
    data = opened(path, labels_column="tags", classes=names)
    assert data.split("train").labels.sum(axis=0).tolist() == [1, 1, 2]


def test_the_first_head_decides_the_splits(tmp_path: Path) -> None:
    rows = [f"{'ab'[n % 2]};{n % 5}" for n in range(60)]
    path = listed(tmp_path, "one;two", *rows)
    data = Dataset.open(
        multi_output.dataset(
            *(path, tmp_path / "out"),
            label_columns=("one", "two"),
            val_fraction=0.2,
            split_by="draw",
        )
    )
    for name, each in (("val", 6), ("test", 6), ("train", 18)):
        assert np.bincount(data.split(name).labels[:, 0]).tolist() == [each, each]
    limited = Dataset.open(
        multi_output.dataset(path, tmp_path / "few", label_columns=("one", "two"), limit=9)
    )
    assert sum(limited.counts().values()) == 9


def test_given_names_are_the_order(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("b\na\nc\n")
    path = listed(tmp_path, "text;tags", "ab;c|a", "ba;", "bb;a")
    tagged = multi_output.dataset(path, tmp_path / "one", labels_column="tags", classes=names)
    assert Dataset.open(tagged).classes == ("b", "a", "c")
    text = multi_output.dataset(path, tmp_path / "two", text_column="text", classes=names)
    assert Dataset.open(text).task.alphabet == ("b", "a", "c")
    names.write_text("a\nd\n")
    assert "row 1: label 'c' is not one of the classes" in refused(
        path, labels_column="tags", classes=names
    )
    assert "row 1: character 'b' is not one of" in refused(path, text_column="text", classes=names)
    names.write_text("ab\n")
    assert "'ab' is not a single character" in refused(path, text_column="text", classes=names)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"label_columns": ("txt", "two")}, "label_columns: * has no column 'txt'; did you mean"),
        ({"text_column": "words"}, "text_column: * has no column 'words'"),
        ({"labels_column": "tag"}, "labels_column: * has no column 'tag'; did you mean 'tags'?"),
        ({"label_columns": ("text", "gap")}, "row 2: gap is empty; every image needs a class"),
        ({"text_column": "gap"}, "row 2: gap is empty"),
        ({"label_columns": ("text", "nan")}, "row 2: nan is 'NaN', a missing value; every image"),
        ({"label_columns": ("text", "same")}, "head 'same' has one class only ('x')"),
        ({"text_column": "same"}, "head '1' has one class only ('x')"),
        ({"labels_column": "none"}, "no label"),
        ({"label_columns": ("text", "Text")}, "label_columns: "),
        ({"text_column": "text", "labels_column": "tags"}, "labels_column: 'tags' is not valid"),
        ({"label_columns": ("text",), "text_column": "text"}, "null with label_columns"),
        ({"text_column": "text", "separator": ","}, "separator: ',' is not valid, expected null"),
        ({"labels_column": "tags", "separator": ""}, "separator: '' is not valid"),
        ({"text_column": "text", "write_images": True}, "write_images: True is not valid"),
        ({"text_column": "long"}, "row 1: long has 70 characters, at most 64"),
        ({"label_columns": ("text", "tags"), "classes": Path("x.txt")}, "x.txt"),
    ],
)
def test_bad_columns_are_told(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    long = "ab" * 35
    header = "text;two;tags;gap;same;none;long;nan"
    path = listed(tmp_path, header, f"ab;1;x|y;g;x;;{long};k", f"c;2;z;;x;;{long};NaN")
    message = refused(path, **options)
    place, _, rest = told.partition("*")
    assert place in message
    assert rest in message


def test_names_for_several_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\nb\n")
    path = listed(tmp_path, "one;two", "a;b", "b;a")
    options = {"label_columns": ("one", "two"), "classes": tmp_path / "names.txt"}
    assert "classes: one list of names" in refused(path, **options)


def test_columns_belong_to_manifests(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="text_column: 'text' is a column of a manifest"):
        prepare(PrepareOptions(source="digits", out=tmp_path / "out", text_column="text"))


def test_what_cannot_be_learnt_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = listed(tmp_path, "tags;split", "a;train", "b;train", "c;val", "c;test")
    multi_output.dataset(path, tmp_path / "first", labels_column="tags")
    assert "1 of 3 classes have no training images" in capsys.readouterr().err
    (tmp_path / "list.csv").write_text("path,tags,split\n00.png,a,val\n01.png,b,test\n")
    assert "there are no training images" in refused(path, labels_column="tags")


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([[0, 1], [1]], "'01.png' has 1 labels for 2 heads"),
        ([[0, 1], [1, 2]], "'01.png' has label 2, which is not a class"),
        ([[0, 1], [-1, 0]], "'01.png' has label -1, which is not a class"),
        ([[0, 1], None], "expected lists of whole numbers, no null"),
    ],
)
def test_labels_that_are_none_are_named(tmp_path: Path, labels: Any, told: str) -> None:
    data = opened(listed(tmp_path, "one;two", "a;x", "b;y"), label_columns=("one", "two"))
    table = pq.read_table(data.folder / MANIFEST)
    spoilt = pa.array(labels, pa.list_(pa.int32()))
    place = table.column_names.index("labels")
    changed = table.set_column(place, "labels", spoilt)
    pq.write_table(changed, data.folder / MANIFEST)
    tiny_dataset.sign(data.folder)
    with pytest.raises(UsageError) as caught:
        _ = Dataset.open(data.folder).split("train").labels
    assert told in str(caught.value)
    pq.write_table(table.drop_columns("labels"), data.folder / MANIFEST)
    tiny_dataset.sign(data.folder)
    with pytest.raises(UsageError, match="column 'labels' is missing"):
        Dataset.open(data.folder)


@pytest.mark.parametrize("content", ['{"kind": "heads"}', '{"kind": "x", "classes": []}', "3"])
def test_a_damaged_kind_is_told(tmp_path: Path, content: str) -> None:
    data = opened(listed(tmp_path, "one;two", "a;x", "b;y"), label_columns=("one", "two"))
    (data.folder / CLASSES).write_text(content)
    tiny_dataset.sign(data.folder)
    with pytest.raises(UsageError, match=r"classes.json: neither names of classes nor heads"):
        Dataset.open(data.folder)
