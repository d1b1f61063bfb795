"""What `distcls prepare` says to bad sources, bad images and strange names."""

from __future__ import annotations

import csv
import gzip
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distcls.data.dataset import Dataset
from tests.faults.preparing import call, parts, refused, run
from tests.sources import digits, idx_folder, put, tree


def missing(source: Path) -> None:
    pass


def empty(source: Path) -> None:
    source.mkdir()


def one_class(source: Path) -> None:
    tree(source, 30, classes=1)


def untrained_class(source: Path) -> None:
    tree(source, 30, split="train")
    tree(source, 10, split="test")
    for path in (source / "train" / "3").iterdir():
        path.unlink()


def truncated_gz(source: Path) -> None:
    path = idx_folder(source) / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:1000])


def too_few_labels(source: Path) -> None:
    path = idx_folder(source) / "train-labels-idx1-ubyte.gz"
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(data[:4] + struct.pack(">I", 98) + data[8:-2]))


def nothing_readable(source: Path) -> None:
    for path in tree(source, 30).rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])


def bad_training_images(source: Path) -> None:
    tree(source, 30, split="train")
    tree(source, 10, split="test")
    for path in (source / "train" / "3").iterdir():
        path.write_bytes(b"damaged")


@pytest.mark.row(16, 34)
@pytest.mark.parametrize(
    ("make", "flags", "message"),
    [
        (missing, "", "no such file or folder"),
        (empty, "", "no images in this folder (searched for .avif, .bmp"),
        (one_class, "", "one class only ('0'); a classifier needs at least two"),
        (untrained_class, "", "class '3' has no training images; its only image is in val or test"),
        (truncated_gz, "", "truncated or damaged gzip file"),
        (too_few_labels, "", "holds 100 images, but train-labels-idx1-ubyte.gz 98 labels"),
        (idx_folder, "--format=mnist", "expected 6bbc9ace898e44ae57da46a324031adb (mnist)"),
        (idx_folder, "--pack=off", "are not files; add --write-images"),
        (nothing_readable, "", "none of 30 images is readable; first '0/0000.png': corrupt"),
        (bad_training_images, "", "class '3' has no training images"),
    ],
)
def test_bad_sources(
    tmp_path: Path, make: Callable[[Path], None], flags: str, message: str
) -> None:
    make(tmp_path / "source")
    before = set(tmp_path.rglob("*"))
    line = refused(call(tmp_path / "source", "--out", tmp_path / "data", *flags.split()))
    assert message in line
    assert str(tmp_path / "source") in line or flags
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.row(34)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the manifest is empty (0 bytes)"),
        ("path,label\na.png,cat\nb.png,\n", "class 'dog' has no training images"),
        ("path,label\na.png,cat\nb.png,dgo\n", "row 2: label 'dgo' is not one of the classes"),
        ("path,label\na.png,cat\na.png,dog\n", "row 2: 'a.png' is already in row 1"),
        ("path,kind\na.png,cat\n", "no column for the label"),
        ("path,label\na.png,cat\nb.png,cat\n", "class 'dog' has no training images"),
        (
            "path,label\na.png,cat\nb.png,dog\n",
            "none of 2 images is readable; first 'a.png': c",
        ),
    ],
)
def test_bad_manifests(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(content)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    flags = ("--out", tmp_path / "data", "--classes", tmp_path / "names.txt")
    assert message in refused(call(tmp_path / "list.csv", *flags))
    assert not (tmp_path / "data").exists()
    assert not parts(tmp_path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


@pytest.mark.row(16, 17, 18)
def test_bad_images_are_rows_of_rejected_csv(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", 60)
    jpeg = put(source / "0" / "cut.jpg", np.tile(digits(1)[0][0], (20, 20)))
    jpeg.write_bytes(jpeg.read_bytes()[:-900])
    bad = {
        "0/cut.jpg": "corrupt",
        "1/text.jpg": "not an image of a known format",
        "2/post.jpg": "not an image of a known format",
        "3/bomb.png": "too large",
        "4/empty.png": "empty file",
        "5/gone.png": "cannot be read: No such file",
        "6/folder.png": "cannot be read: Is a directory",
    }
    (source / "1" / "text.jpg").write_text("just words")
    (source / "2" / "post.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (source / "3" / "bomb.png").write_bytes(bomb())
    (source / "4" / "empty.png").write_bytes(b"")
    rows = [(path.relative_to(source).as_posix(), path.parent.name) for path in source.rglob("*.*")]
    (source / "6" / "folder.png").mkdir()
    rows += [("5/gone.png", "5"), ("6/folder.png", "6")]
    with (source / "list.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([("path", "label"), *rows])
    done = run(source / "list.csv", "--out", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert "warning: 7 of 67 images cannot be read" in done.stderr
    with (tmp_path / "data" / "rejected.csv").open(newline="") as handle:
        found = {row["image_id"]: row for row in csv.DictReader(handle)}
    assert set(found) == set(bad)
    for name, reason in bad.items():
        assert found[name]["reason"].startswith(reason)
        assert found[name]["path"] == str(source / name)
    assert sum(Dataset.open(tmp_path / "data").counts().values()) == 60


NAMES = (
    "two words",
    "quo\"te's",
    "com,ma",
    "new\nline",
    "re\rturn",
    "naïve 鸟 🐦",
    "a..b",
    "x" * 200,
)


@pytest.mark.row(35)
def test_any_file_name_survives(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", 60)
    expected = set()
    for index, name in enumerate(NAMES):
        put(source / 'cl,ass\n"é"' / f"{name}.png", digits(index + 1)[0][index])
        (source / "0" / f"bad {name[:50]}.png").write_bytes(b"damaged")
        expected.add(f'cl,ass\n"é"/{name}.png')
    done = run(source, "--out", tmp_path / "data", "--write-images")
    assert done.returncode == 0, done.stderr
    data = Dataset.open(tmp_path / "data")
    found = {}
    for split in data.counts():
        rows = data.split(split)
        for index, image_id in enumerate(rows.image_ids):
            found[image_id] = rows.image(index)
    assert expected <= set(found)
    for index, name in enumerate(NAMES):
        image = found[f'cl,ass\n"é"/{name}.png']
        np.testing.assert_array_equal(image[..., 0], digits(index + 1)[0][index])
    assert len(list((tmp_path / "data" / "images").rglob("*.png"))) == 60 + len(NAMES)
    with (tmp_path / "data" / "rejected.csv").open(newline="", encoding="utf-8") as handle:
        rejected = {row["image_id"] for row in csv.DictReader(handle)}
    assert rejected == {f"0/bad {name[:50]}.png" for name in NAMES}


@pytest.mark.row(35)
def test_a_name_that_is_not_utf_8_is_rejected_not_fatal(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", 60)
    put(source / "0" / "a.png", digits(1)[0][0]).rename(source / "0" / os.fsdecode(b"\xff.png"))
    done = run(source, "--out", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "data" / "rejected.csv").open(newline="", encoding="utf-8") as handle:
        (row,) = csv.DictReader(handle)
    assert (row["image_id"], row["reason"]) == (r"0/\udcff.png", "its name is not UTF-8")
