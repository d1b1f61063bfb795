"""CSV and Parquet manifests."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcls.commands.prepare import main
from distcls.data.dataset import Dataset
from distcls.data.formats.detect import open_labelled
from distcls.data.prepare import PrepareOptions, prepare
from distcls.data.source import LabelledImages, LabelOptions, OpenOptions
from distcls.errors import UsageError
from distcls.imaging import decode_file
from tests.sources import digits, put, tree, write_manifest

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
        (("", "cat", "train", "1"), "row 2: path is empty"),
        (("b.png", "cat", "dev1", "1"), "row 2: split 'dev1' is not one of train, val, test"),
        (("b.png", "cat", "", "1"), "row 2: split '' is not one of"),
        (("b.png", "cat", "train", "heavy"), "row 2: weight 'heavy' is not a number"),
        (("b.png", "cat", "train", "-1"), "row 2: weight '-1' is not a number"),
        (("b.png", "cat", "train", "nan"), "row 2: weight 'nan' is not a number"),
        (("b.png", "cat"), "row 2: 2 values, but the header has 4"),
        (("a.png", "dog", "train", "1"), "row 2: 'a.png' is already in row 1"),
        (("b\0.png", "cat", "train", "1"), "row 2: path .* contains a null byte"),
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


@pytest.mark.parametrize("text", ["", " ", "nan", "NaN", "None", "NA", "<NA>", "NULL", None])
def test_rows_without_a_label_are_left_out_and_counted(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("path", "label"), ("a.png", "x"), ("b.png", text), ("c.png", "y")]
    for suffix in (".csv", ".parquet"):
        source = read_manifest(manifest(tmp_path, rows, suffix), None)
        assert source.classes == ("x", "y")
        assert [(r.index, r.path) for r in source.records] == [(0, "a.png"), (2, "c.png")]
        (row,) = source.rejected
        assert row[:2] == ("b.png", "b.png")
        assert row.reason.startswith("no label")
        said = capsys.readouterr().err
        assert "warning: " in said
        assert "1 of 3 rows have no label and are left out, first row 2: no label" in said
        assert list(source.source.true_labels or []) == ["x", None, "y"]
    with pytest.raises(UsageError, match=r"list\.csv: no row has a label"):
        read_manifest(manifest(tmp_path, [*rows[:1], *rows[2:3]]), None)


def test_given_classes_and_words_for_nothing_are_labels(tmp_path: Path) -> None:
    rows = [("path", "label"), ("a.png", "NA"), ("b.png", "SA"), ("c.png", "none")]
    assert read_manifest(manifest(tmp_path, rows), None).classes == ("SA", "none")
    source = read_manifest(manifest(tmp_path, rows), ("NA", "SA", "none"))
    assert [record.label for record in source.records] == [0, 1, 2]


def test_missing_labels_reach_the_table_of_rejected_rows(tmp_path: Path) -> None:
    root = tree(tmp_path / "source", 40)
    paths = [path.relative_to(root) for path in sorted(root.rglob("*.png"))]
    rows = [("path", "label"), *((p, "nan" if n < 3 else p.parent) for n, p in enumerate(paths))]
    options = {"source": str(manifest(root, rows)), "out": tmp_path / "out", "quiet": True}
    done = prepare(PrepareOptions(**options))
    assert sum(done.counts.values()) == 37
    assert (done.rejected, done.left_out) == (0, {"no label (nan)": 3})
    with (tmp_path / "out" / "rejected.csv").open(newline="") as handle:
        found = list(csv.DictReader(handle))
    assert [row["image_id"] for row in found] == list(map(str, paths[:3]))
    assert {row["reason"] for row in found} == {"no label (nan)"}
    assert found[0]["path"] == str(root / paths[0])
    trained = Dataset.open(tmp_path / "out").split("train")
    for place, name in enumerate(trained.image_ids):
        np.testing.assert_array_equal(trained.image(place), decode_file(root / name))


def test_numbers_written_as_decimals_are_whole_and_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("path", "label"), ("a.png", "10.0"), ("b.png", "2.0"), ("c.png", "1"), ("d.png", "")]
    source = read_manifest(manifest(tmp_path, rows), None)
    assert source.classes == ("1", "2", "10")
    assert [record.label for record in source.records] == [2, 1, 0]
    assert "labels are whole numbers: 2.0 is the class 2" in capsys.readouterr().err
    source = read_manifest(manifest(tmp_path, rows), ("10", "2", "1"))
    assert [record.label for record in source.records] == [0, 1, 2]
    named = read_manifest(manifest(tmp_path, rows), ("10.0", "2.0", "1"))
    assert named.classes == ("10.0", "2.0", "1")
    halves = [("path", "label"), ("a.png", "10.5"), ("b.png", "2.0"), ("c.png", "-1")]
    assert read_manifest(manifest(tmp_path, halves), None).classes == ("-1", "2.0", "10.5")
    long = [("path", "label"), ("a.png", "9007199254740993"), ("b.png", "9007199254740992")]
    assert read_manifest(manifest(tmp_path, long), None).classes == (long[2][1], long[1][1])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("header", "named"),
    [
        (("id_code", "diagnosis"), {"path_column": "id_code", "label_column": "diagnosis"}),
        (("image_id", "dx"), {"label_column": "DX"}),
        (("file_name", "label"), {}),
        (("label", "path"), {"path_column": "label", "label_column": "path"}),
    ],
)
def test_columns_of_any_name(
    tmp_path: Path, header: tuple[str, str], named: dict[str, str], suffix: str
) -> None:
    path = manifest(tmp_path, [header, ("a.png", "x"), ("b.png", "y")], suffix)
    source = open_labelled(str(path), opening=OpenOptions(**named))
    assert brief(source) == [("a.png", "a.png", "x", None), ("b.png", "b.png", "y", None)]
    assert list(source.source.true_labels or []) == ["x", "y"]


def test_the_columns_that_are_there_are_listed(tmp_path: Path) -> None:
    path = manifest(tmp_path, [("id_code", "diagnosis"), ("a", "1")])
    message = r"found id_code, diagnosis; choose one with --path-column"
    with pytest.raises(UsageError, match=message):
        open_labelled(str(path))
    with pytest.raises(
        UsageError, match=r"found id_code, diagnosis; choose one with --label-column"
    ):
        open_labelled(str(path), opening=OpenOptions(path_column="id_code"))
    message = r"path_column: .* has no column 'idcode'; did you mean 'id_code'"
    with pytest.raises(UsageError, match=message):
        open_labelled(str(path), opening=OpenOptions(path_column="idcode"))
    for options in (OpenOptions(path_column="id"), OpenOptions(root=tmp_path)):
        with pytest.raises(UsageError, match="is for a manifest, but digits is not one"):
            open_labelled("digits", opening=options)
    with pytest.raises(UsageError, match=r"root: .*gone is not a folder"):
        open_labelled(str(path), opening=OpenOptions(root=tmp_path / "gone"))
    with pytest.raises(UsageError, match="label_column: 'x' is not valid, expected null with"):
        main([str(path), "--out", "o", "--label-column", "x", "--labels-column", "y"])


def test_a_table_beside_its_folder_of_images(tmp_path: Path) -> None:
    root = tree(tmp_path / "train_images", 20)
    paths = sorted(root.rglob("*.png"))
    rows = [("id_code", "diagnosis")]
    rows += [(p.relative_to(root).with_suffix("").as_posix(), p.parent.name) for p in paths]
    path = manifest(tmp_path, rows)
    flags = ["--path-column", "id_code", "--label-column", "diagnosis", "--quiet"]
    with pytest.raises(UsageError, match=r"none of 20 images .*--root names another folder"):
        main([str(path), "--out", str(tmp_path / "out"), *flags])
    main([str(path), "--out", str(tmp_path / "out"), *flags, "--root", str(root)])
    split = Dataset.open(tmp_path / "out").split("train", use_pack=False)
    assert set(split.image_ids) <= {row[0] for row in rows[1:]}
    np.testing.assert_array_equal(split.image(0), decode_file(root / f"{split.image_ids[0]}.png"))


def test_paths_without_ending_and_with_backslashes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "a/1.jpg",
        "a/2.png",
        "two.jpg",
        "two.png",
        "b/3.5.jpg",
        "exact",
        "back\\slash.png",
    ):
        put(tmp_path / "x.png", digits(1)[0][0])
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / "x.png").rename(tmp_path / name)
    (tmp_path / "a" / "1.txt").write_text("no image")
    names = ["a/1", "a\\2.png", "a\\1", "two", "b/3.5", "exact", "back\\slash.png", "gone\\4", "5"]
    rows = [("path", "label"), *((name, "xy"[n % 2]) for n, name in enumerate(names))]
    source = read_manifest(manifest(tmp_path, rows), None)
    assert [record.path for record in source.records] == [
        *("a/1.jpg", "a/2.png", "a/1.jpg", "two", "b/3.5.jpg", "exact", "back\\slash.png"),
        *("gone\\4", "5"),
    ]
    assert [record.image_id for record in source.records] == names
    said = capsys.readouterr().err
    assert "4 paths are completed, first 'a/1' is a/1.jpg" in said
    assert "1 paths without an ending match several files, first 'two'" in said
    assert source.source.image(2).shape == (8, 8, 3)
    absolute = [
        ("path", "label"),
        (f"{tmp_path}/a/2", "x"),
        (f"{tmp_path}\\a\\1".replace("/", "\\"), "y"),
    ]
    source = read_manifest(manifest(tmp_path, absolute), None)
    assert [r.path for r in source.records] == [f"{tmp_path}/a/2.png", f"{tmp_path}/a/1.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the manifest is empty \(0 bytes\)"),
        (b"\n\n", "the manifest is empty"),
        (b"path,label\n", "has a header but no rows"),
        (b"photo,label\na,b\n", "no column for the image; expected one of path, file"),
        (b"path,kind\na,b\n", "no column for the label; expected one of label, class"),
        (b"path,label,label\na,b,c\n", "column 'label' occurs more than once"),
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
