"""Every kind of input becomes the same ordered source."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distcls.data.dataset import Dataset
from distcls.data.formats.detect import open_source
from distcls.data.source import Names, NamesBuilder, TextColumn
from distcls.errors import BadImage, UsageError
from tests import tiny_dataset


def image(path: Path, value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    done, data = cv2.imencode(".png", np.full((4, 4, 3), value, np.uint8))
    assert done
    path.write_bytes(data.tobytes())
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for value, name in enumerate(["b/2.png", "b/10.PNG", "a/x y.jpg", "z.webp", "a/ü,\n.bmp"]):
        image(tmp_path / "in" / name, value)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def test_folder_is_searched_in_order(tree: Path) -> None:
    source = open_source(str(tree))
    assert source.image_ids == ["a/x y.jpg", "a/ü,\n.bmp", "b/10.PNG", "b/2.png", "z.webp"]
    assert [int(source.image(index)[0, 0, 0]) for index in range(5)] == [2, 4, 1, 0, 3]
    assert source.true_labels is None


def test_links_are_followed_and_circles_end(tree: Path, tmp_path: Path) -> None:
    image(tmp_path / "elsewhere" / "far.png")
    (tree / "c").symlink_to(tmp_path / "elsewhere")
    (tree / "b" / "up").symlink_to(tree)
    assert "c/far.png" in open_source(str(tree)).image_ids
    assert len(open_source(str(tree)).image_ids) == 6


def test_a_name_that_is_not_utf8_is_made_printable(tmp_path: Path) -> None:
    image(tmp_path / os.fsdecode(b"caf\xe9.png"), 7)
    source = open_source(str(tmp_path))
    assert source.image_ids == ["caf\\xe9.png"]
    assert source.image(0)[0, 0, 0] == 7


def test_glob(tree: Path) -> None:
    assert open_source(f"{tree}/b/*").image_ids == ["10.PNG", "2.png"]
    assert open_source(f"{tree}/*/2.png").image_ids == ["b/2.png"]
    assert open_source(f"{tree}/**/*.png").image_ids == ["b/2.png"]


def test_glob_below_the_working_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    source = open_source("*/*.jpg")
    assert source.image_ids == ["a/x y.jpg"]
    assert source.image(0)[0, 0, 0] == 2
    assert open_source(".").image_ids[-1] == "z.webp"


def test_one_image_even_with_wildcards_in_its_name(tmp_path: Path) -> None:
    path = image(tmp_path / "a[1].png", 9)
    source = open_source(str(path))
    assert source.image_ids == ["a[1].png"]
    assert source.image(0)[0, 0, 0] == 9


@pytest.mark.parametrize("column", ["path", "file", "filename", "image", "image_id"])
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_manifest(tree: Path, column: str, ending: str) -> None:
    names = ["z.webp", "b/2.png", "a/ü,\n.bmp", "missing.png"]
    path = tree / f"list{ending}"
    columns = {column: names, "label": ["007", None, "ü", "x"]}
    if ending == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        text = f'\ufeff{column},label\nz.webp,007\nb/2.png,\n"a/ü,\n.bmp",ü\nmissing.png,x\n'
        path.write_text(text, encoding="utf-8", newline="")
    source = open_source(str(path))
    assert source.image_ids == names
    assert list(source.true_labels or []) == ["007", None, "ü", "x"]
    assert [int(source.image(index)[0, 0, 0]) for index in range(3)] == [3, 0, 4]
    with pytest.raises(BadImage, match="cannot be read"):
        source.image(3)


def test_manifest_with_ids_of_its_own_and_absolute_paths(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text(f"image_id,path\n1,{tree}/z.webp\n2,in/b/2.png\n")
    source = open_source(str(path))
    assert source.image_ids == ["1", "2"]
    assert [int(source.image(index)[0, 0, 0]) for index in range(2)] == [3, 0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"),
        ("path\n", "has a header but no rows"),
        ("url,label\na,b\n", "no column for the image; expected one of path, file"),
        ("path,label\na.png,1\n,2\n", "row 2: path is empty"),
        ("path,label\na.png\n", "row 1: 1 values, but the header has 2"),
        ('path\n"open\n', "row 1: not valid CSV"),
    ],
)
def test_bad_csv_manifests(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(content)
    with pytest.raises(UsageError, match=told):
        open_source(str(path))


def test_bad_parquet_manifest(tmp_path: Path) -> None:
    for content, told in ((b"", "is empty"), (b"no parquet", "cannot be read as Parquet")):
        (tmp_path / "list.parquet").write_bytes(content)
        with pytest.raises(UsageError, match=told):
            open_source(str(tmp_path / "list.parquet"))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        open_source(str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="no images in this folder"):
        open_source(str(tmp_path))
    with pytest.raises(UsageError, match="no file matches"):
        open_source(str(tmp_path / "*.png"))


def test_dataset_directory(tmp_path: Path) -> None:
    images, labels = tiny_dataset.coloured(6)
    splits = ["train", "test", "train", "test", "val", "test"]
    names = ("red", "green", "blue")
    folder = tiny_dataset.write(tmp_path / "d", list(images), labels, names, splits=splits)
    source = open_source(str(folder))
    assert source.image_ids == ["image 0001", "image 0003", "image 0005"]
    assert source.true_labels == [names[labels[index]] for index in (1, 3, 5)]
    np.testing.assert_array_equal(source.image(1), images[3])
    assert open_source(str(folder), "val").image_ids == ["image 0004"]
    with pytest.raises(UsageError, match="no split 'dev'"):
        open_source(str(folder), "dev")
    assert len(Dataset.open(folder).split("train")) == 2


def test_split_of_a_plain_folder_is_refused(tree: Path) -> None:
    with pytest.raises(UsageError, match="not a dataset directory"):
        open_source(str(tree), "test")


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """What is on standard input."""
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
    return content


def test_a_list_on_standard_input(
    tree: Path, typed: io.BytesIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / os.fsdecode(b"caf\xe9.png")).write_bytes((tree / "b" / "2.png").read_bytes())
    lines = [b"z.webp", b"", f"{tree}/b/10.PNG".encode(), b"missing.png\r", b"caf\xe9.png"]
    typed.write(b"\n".join(lines))
    typed.seek(0)
    monkeypatch.chdir(tree)
    source = open_source("-")
    assert source.image_ids == ["z.webp", f"{tree}/b/10.PNG", "missing.png", "caf\\xe9.png"]
    assert [int(source.image(index)[0, 0, 0]) for index in (0, 1, 3)] == [3, 1, 0]
    with pytest.raises(BadImage, match="cannot be read"):
        source.image(2)


def test_nothing_on_standard_input(typed: io.BytesIO) -> None:
    typed.write(b"\n\n")
    typed.seek(0)
    with pytest.raises(UsageError, match="lists no images"):
        open_source("-")


def test_the_fingerprint_follows_names_sizes_and_times(tree: Path) -> None:
    def fingerprint() -> str:
        return open_source(str(tree)).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    seen = {first}
    path = tree / "b" / "2.png"
    data, status = path.read_bytes(), path.stat()
    os.utime(path, ns=(0, status.st_mtime_ns + 1))
    seen.add(fingerprint())
    path.write_bytes(data + b"0")
    os.utime(path, ns=(0, status.st_mtime_ns))
    seen.add(fingerprint())
    path.write_bytes(data)
    os.utime(path, ns=(0, status.st_mtime_ns))
    assert fingerprint() == first
    path.rename(path.with_name("3.png"))
    seen.add(fingerprint())
    assert len(seen) == 4


def test_names_are_a_sequence() -> None:
    given = ["", "a", "ü/漢.png", os.fsdecode(b"\xff.png"), "z"]
    names = Names.of(given)
    assert names == given
    assert names[-2] == given[-2]
    assert names[1:4] == given[1:4]
    assert names.printable()[3] == "\\xff.png"
    assert names != given[:-1]
    assert names != [*given[:-1], "y"]
    assert "a" in names
    assert names.mentions("漢")
    assert not names.mentions("://")
    assert names.digest() != Names.of(["", "a", "ü/漢.png", given[3] + "z"]).digest()
    assert Names.of(["ab", "c"]).digest() != Names.of(["a", "bc"]).digest()
    with pytest.raises(IndexError):
        names[5]
    builder = NamesBuilder()
    for name in given:
        builder.extend([name])
    assert builder.names() == given


def test_a_text_column_is_a_sequence() -> None:
    labels = TextColumn()
    labels.extend(["a", None, "b", "a"])
    assert list(labels) == ["a", None, "b", "a"]
    assert labels[1:3] == [None, "b"]
    assert labels[-1] == "a"


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_long_manifest_is_open_soon(tmp_path: Path, ending: str) -> None:
    count = 200_000
    names = [f"folder/{index % 1000:06d}.png" for index in range(count)]
    path = tmp_path / f"list{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"path": names}), path)
    else:
        path.write_text("path\n" + "\n".join(names) + "\n")
    began = time.process_time()
    source = open_source(str(path))
    assert time.process_time() - began < 2
    assert len(source) == count
    assert source.image_ids[count - 1] == names[-1]
