"""CSV and Parquet manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcls.data.formats.detect import open_labelled
from distcls.data.source import LabelledImages, LabelOptions
from distcls.errors import UsageError
from tests.sources import write_manifest

Row = tuple[str, ...] | None


def manifest(folder: Path, rows: list[tuple[Any, ...]], suffix: str = ".csv") -> Path:
    """The first row is the header."""
    return write_manifest(folder / f"list{suffix}", rows)


def read_manifest(path: Path, classes: Row = None, weight: str | None = None) -> LabelledImages:
    options = LabelOptions(classes=classes, weight_column=weight)
    return open_labelled(str(path), "manifest", options)


def brief(source: LabelledImages) -> list[tuple[Any, ...]]:
    return [(r.image_id, r.path, source.classes[r.label], r.split) for r in source.records]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_all_columns(tmp_path: Path, suffix: str) -> None:
    rows = [
        ("Filename", "category", "split", "weight", "group", "note"),
        ("a.jpg", "cat", "train", 1.5, "g1", "x"),
        ("/abs/b.jpg", "dog", "Validation", 0.0, "g2", "y"),
        ("c d.jpg", "cat", "test", 2.0, "g3", "z"),
    ]
    source = read_manifest(manifest(tmp_path, rows, suffix), None)
    assert source.root == tmp_path
    assert source.classes == ("cat", "dog")
    assert brief(source) == [
        ("a.jpg", "a.jpg", "cat", "train"),
        ("/abs/b.jpg", "/abs/b.jpg", "dog", "val"),
        ("c d.jpg", "c d.jpg", "cat", "test"),
    ]
    assert [(r.weight, r.group) for r in source.records] == [(1.5, "g1"), (0.0, "g2"), (2.0, "g3")]


@pytest.mark.parametrize("image", ["image_id", "path", "file", "filename", "image"])
@pytest.mark.parametrize("label", ["label", "class", "category", "target"])
def test_names_of_the_columns(tmp_path: Path, image: str, label: str) -> None:
    source = read_manifest(
        manifest(tmp_path, [(label, image), ("x", "a.png"), ("y", "b.png")]), None
    )
    assert brief(source) == [("a.png", "a.png", "x", None), ("b.png", "b.png", "y", None)]


def test_an_image_id_beside_a_path(tmp_path: Path) -> None:
    rows = [("image_id", "path", "label"), ("one", "x/a.png", "p"), ("two", "x/b.png", "q")]
    assert brief(read_manifest(manifest(tmp_path, rows), None))[0][:2] == ("one", "x/a.png")


def test_integer_labels_of_parquet_are_in_their_order(tmp_path: Path) -> None:
    rows = [("path", "label"), *((f"{n}.png", n) for n in (10, 9, 2))]
    assert read_manifest(manifest(tmp_path, rows, ".parquet"), None).classes == ("2", "9", "10")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_weights_from_a_column_by_name(tmp_path: Path, suffix: str) -> None:
    rows = [
        ("path", "label", "Trust", "weight"),
        ("a.png", "cat", 0.25, 7.0),
        ("b.png", "dog", 2.0, 8.0),
    ]
    path = manifest(tmp_path, rows, suffix)
    for column, expected in (("trust", [0.25, 2]), ("weight", [7, 8]), (None, [7, 8])):
        records = read_manifest(path, None, column).records
        assert [record.weight for record in records] == expected
    with pytest.raises(UsageError, match=r"weight_column: .* no column 'Trusts'; did you mean"):
        read_manifest(path, None, "Trusts")


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(st.lists(names.map(str.strip).filter(bool), min_size=2, max_size=5, unique=True))
def test_any_name_survives(tmp_path_factory: pytest.TempPathFactory, found: list[str]) -> None:
    folder = tmp_path_factory.mktemp("names")
    rows = [("path", "label"), *((name, str(i)) for i, name in enumerate(found))]
    for suffix in (".csv", ".parquet"):
        source = read_manifest(manifest(folder, rows, suffix), None)
        assert [record.path for record in source.records] == found


HEAD = ("path", "label", "split", "weight")
GOOD = ("a.png", "cat", "train", "1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("b.png", "", "train", "1"), "row 2: label is empty"),
        (("", "cat", "train", "1"), "row 2: path is empty"),
        (("b.png", "cat", "dev1", "1"), "row 2: split 'dev1' is not one of train, val, test"),
        (("b.png", "cat", "", "1"), "row 2: split '' is not one of"),
        (("b.png", "cat", "train", "heavy"), "row 2: weight 'heavy' is not a number"),
        (("b.png", "cat", "train", "-1"), "row 2: weight '-1' is not a number"),
        (("b.png", "cat", "train", "nan"), "row 2: weight 'nan' is not a number"),
        (("b.png", "cat"), "row 2: 2 values, but the header has 4"),
        (("a.png", "dog", "train", "1"), "row 2: 'a.png' stands in row 1 already"),
        (("b\0.png", "cat", "train", "1"), "row 2: path .* holds a zero byte"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_manifest(manifest(tmp_path, [HEAD, GOOD, row]), None)
    assert "\n" not in str(caught.value)


def test_a_label_outside_the_given_classes_is_named(tmp_path: Path) -> None:
    path = manifest(tmp_path, [("path", "label"), ("a.png", "cat"), ("b.png", "dgo")])
    with pytest.raises(UsageError, match=r"row 2: label 'dgo' is not one .*did you mean 'dog'"):
        read_manifest(path, ("dog", "cat"))


def test_null_label_of_parquet(tmp_path: Path) -> None:
    path = manifest(tmp_path, [("path", "label"), ("a.png", "x"), ("b.png", None)], ".parquet")
    with pytest.raises(UsageError, match="row 2: label is empty"):
        read_manifest(path, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the manifest is empty \(0 bytes\)"),
        (b"\n\n", "the manifest is empty"),
        (b"path,label\n", "has a header but no rows"),
        (b"photo,label\na,b\n", "no column for the image; expected one of path, file"),
        (b"path,kind\na,b\n", "no column for the label; expected one of label, class"),
        (b"path,label,label\na,b,c\n", "column 'label' stands there more than once"),
        (b"path,label\na.png,\xff\n", "not UTF-8"),
        (b'path,label\na.png,"x"y\n', "row 1: not valid CSV"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_manifest(path, None)


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        read_manifest(path, None)
    manifest(tmp_path, [("path", "label"), ("a.png", 0.5)], ".parquet")
    with pytest.raises(UsageError, match="column 'label' holds double"):
        read_manifest(path, None)


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(b"\xef\xbb\xbfpath,label\na.png,x\n")
    assert len(read_manifest(path, None).records) == 1
