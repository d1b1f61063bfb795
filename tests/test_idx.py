"""IDX folders: names, sizes, checksums."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from distcls.data.formats import idx
from distcls.data.formats.detect import open_labelled
from distcls.data.formats.idx import IdxSource
from distcls.data.source import LabelOptions, read_class_names
from distcls.errors import UsageError
from tests.sources import digits, idx_bytes, idx_folder


def named(path: Path) -> LabelOptions:
    return LabelOptions(classes=read_class_names(path))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dot", [True, False])
def test_every_way_to_name_the_files(tmp_path: Path, packed: bool, dot: bool) -> None:
    source = open_labelled(str(idx_folder(tmp_path / "idx", dot=dot, packed=packed)))
    images, labels = digits(140)
    assert source.format == "idx"
    assert [record.split for record in source.records] == ["train"] * 100 + ["test"] * 40
    assert [record.label for record in source.records] == labels.tolist()
    for record, image in zip(source.records, images, strict=True):
        found = source.source.image(record.index)
        np.testing.assert_array_equal(found, np.repeat(image[..., None], 3, axis=-1))
    assert source.records[0].image_id == "train/00000"
    assert source.records[-1].image_id == "test/00039"


def test_test_images_of_another_size(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path / "idx")
    images = digits(140)[0]
    small = images[100:, 1:, 2:].copy()
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(small)))
    source = IdxSource(folder)
    assert source.uniform is None
    np.testing.assert_array_equal(source.image(99)[..., 1], images[99])
    for index in (100, 139):
        np.testing.assert_array_equal(source.image(index)[..., 1], small[index - 100])


def test_a_set_without_test_files_has_no_test_split(tmp_path: Path) -> None:
    source = open_labelled(str(idx_folder(tmp_path / "idx", test=0)))
    assert {record.split for record in source.records} == {"train"}


def publish(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make the content of a folder the published fashion-mnist."""
    table = {
        role: hashlib.md5(gzip.decompress(path.read_bytes())).hexdigest()
        for role, path in idx.find_idx(folder).items()
    }
    monkeypatch.setitem(idx.CONTENT_MD5, "fashion-mnist", table)


def test_known_data_is_recognised_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = idx_folder(tmp_path / "idx")
    publish(monkeypatch, folder)
    for path in folder.iterdir():  # packed anew, as distributors do
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1, mtime=7))
    for form in ("auto", "fashion-mnist"):
        source = open_labelled(str(folder), form)  # type: ignore[arg-type]
        assert source.format == "fashion-mnist"
        assert source.classes[0] == "T-shirt/top"
    assert open_labelled(str(folder), "idx").classes == tuple("0123456789")


@pytest.mark.parametrize("form", ["auto", "fashion-mnist"])
def test_one_flipped_bit_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    folder = idx_folder(tmp_path / "idx")
    publish(monkeypatch, folder)
    path = folder / "t10k-images-idx3-ubyte.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[500] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))
    found = hashlib.md5(content).hexdigest()
    expected = idx.CONTENT_MD5["fashion-mnist"]["t10k-images"]
    message = f"{path}.*{found}.*{expected}.*--format idx accepts"
    with pytest.raises(UsageError, match=message):
        open_labelled(str(folder), form)  # type: ignore[arg-type]
    assert open_labelled(str(folder), "idx").format == "idx"


def test_other_data_is_not_mnist(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path / "idx")
    with pytest.raises(UsageError, match=r"expected 6bbc9ace898e44ae57da46a324031adb \(mnist\)"):
        open_labelled(str(folder), "mnist")


def test_known_data_must_be_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = idx_folder(tmp_path / "idx")
    publish(monkeypatch, folder)
    for path in folder.glob("t10k*"):
        path.unlink()
    with pytest.raises(UsageError, match=r"t10k-.* of fashion-mnist is missing"):
        open_labelled(str(folder))


def damage(folder: Path, how: str) -> None:
    images, labels = digits(100)
    path = folder / "train-images-idx3-ubyte.gz"
    content = idx_bytes(images)
    if how == "truncated gz":
        path.write_bytes(path.read_bytes()[:-200])
        return
    if how == "damaged gz":
        packed = bytearray(path.read_bytes())
        packed[len(packed) // 2] ^= 0xFF
        path.write_bytes(bytes(packed))
        return
    if how == "labels":
        path = folder / "train-labels-idx1-ubyte.gz"
        content = idx_bytes(labels[:-1].astype(np.uint8))
    if how == "magic":
        content = idx_bytes(labels.astype(np.uint8))
    if how == "short":
        content = content[:-1]
    if how == "long":
        content += b"\0"
    if how == "bomb":
        content = b"\0\0\x08\x03" + b"\xff" * 12
    path.write_bytes(gzip.compress(content))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated gz", "train-images-idx3-ubyte.gz: truncated or damaged gzip file"),
        ("damaged gz", "train-images-idx3-ubyte.gz: truncated or damaged gzip file"),
        ("labels", "holds 100 images, but train-labels-idx1-ubyte.gz 99 labels"),
        ("magic", "starts with 00000801, an IDX file of images starts with 00000803"),
        ("short", "truncated after 6,399 of 6,400 values"),
        ("long", "longer than the 6,400 values"),
        ("bomb", "its header says 79,228,162,458,924,105,385,300,197,375 values"),
    ],
)
def test_damaged_files(tmp_path: Path, how: str, message: str) -> None:
    folder = idx_folder(tmp_path / "idx")
    damage(folder, how)
    with pytest.raises(UsageError, match=message) as caught:
        open_labelled(str(folder))
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path / "idx")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UsageError, match="t10k images and labels belong together"):
        open_labelled(str(folder))
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UsageError, match=r"no IDX file train-labels-idx1-ubyte\[.gz\]"):
        open_labelled(str(folder))


def test_class_names_from_a_file(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path / "idx")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"digit {n}" for n in range(10)))
    assert open_labelled(str(folder), options=named(names)).classes[3] == "digit 3"
    names.write_text("zero\none\n")
    with pytest.raises(UsageError, match="row 2: label 2 is outside the 2 classes"):
        open_labelled(str(folder), options=named(names))


def test_labels_that_start_at_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = idx_folder(tmp_path / "idx", test=0)
    labels = digits(100)[1].astype(np.uint8)
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(labels + 1)))
    assert open_labelled(str(folder)).classes == tuple(str(n) for n in range(1, 11))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"digit {n}" for n in range(10)))
    found = open_labelled(str(folder), options=named(names))
    assert [record.label for record in found.records] == labels.tolist()
    assert "labels start at 1: 1 is 'digit 0'" in capsys.readouterr().err
    names.write_text("none\n" + names.read_text())  # a name for 0: the labels are indices
    found = open_labelled(str(folder), options=named(names))
    assert [record.label for record in found.records] == (labels + 1).tolist()
    path.write_bytes(gzip.compress(idx_bytes(labels + 3)))
    with pytest.raises(UsageError, match="label 11 is outside the 11 classes"):
        open_labelled(str(folder), options=named(names))
