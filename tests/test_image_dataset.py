"""`open_dataset` and `prepare_dataset`: what `prepare` and training read, as objects."""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import distcls
from distcls.data.dataset import Dataset
from distcls.errors import BadImage, UsageError
from distcls.imaging import decode_file
from tests import multi_output, tiny_dataset
from tests.sources import idx_folder, put, tree, write_manifest

RGB = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)


def read_rows(data: distcls.ImageDataset) -> list[tuple[str, str, str | None]]:
    return [(example.image_id, example.label, example.split) for example in data]


def test_a_folder_is_opened_as_it_is(tmp_path: Path) -> None:
    tree(tmp_path / "photos", 40)
    put(tmp_path / "photos" / "of_no_class.png", RGB)
    data = distcls.open_dataset(tmp_path / "photos")
    assert (data.classes, len(data), data.splits) == (tuple("0123456789"), 40, {})
    assert data.left_out == 1
    assert repr(data) == f"ImageDataset('{tmp_path}/photos', 40 images, 10 classes)"
    for example in data:
        assert example.path == tmp_path / "photos" / example.image_id
        assert example.label == data.classes[example.target] == example.image_id[0]
        assert example.labels == (example.label,)
        np.testing.assert_array_equal(example.image(), decode_file(example.path))
    assert repr(data[0]) == "Example('0/0000.png', label='0')"


def test_it_is_a_sequence(tmp_path: Path) -> None:
    data = distcls.open_dataset(tree(tmp_path / "photos", 30))
    rows = read_rows(data)
    assert data[-1].image_id == data[np.int64(29)].image_id == rows[-1][0]
    assert read_rows(data[3:9:2]) == rows[3:9:2]
    assert isinstance(data[:2], distcls.ImageDataset)
    assert data[-30].image_id == rows[0][0]
    for far in (30, -31, np.int64(30)):
        with pytest.raises(IndexError, match=f"index {far} of 30 images"):
            data[far]
    wrong: Any
    for wrong in ("3", [1, 2], np.array([1, 2]), np.array([True]), 1.0, None):
        with pytest.raises(
            UsageError, match=r"is no index of images.*\[data\[i\] for i in"
        ) as told:
            data[wrong]
        assert "\n" not in str(told.value)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda example: example.image().sum(), data))
    assert found == [example.image().sum() for example in data]


def test_it_is_pickled_without_its_images(tmp_path: Path) -> None:
    """As for the workers of a DataLoader that are spawned."""
    source = tree(tmp_path / "photos", 40)
    rows = [[example.image_id, example.label] for example in distcls.open_dataset(source)]
    manifest = write_manifest(source / "rows.csv", [["path", "label"], *rows])
    prepared = distcls.prepare_dataset(source, tmp_path / "data", quiet=True)
    for data in (*map(distcls.open_dataset, (source, manifest)), prepared, prepared.split("val")):
        before = len(pickle.dumps(data))
        pixels = data[1].image()  # a pack is open
        written = pickle.dumps(data)
        assert len(written) < before + 100
        again = pickle.loads(written)
        assert read_rows(again) == read_rows(data)
        np.testing.assert_array_equal(again[1].image(), pixels)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(data[1])).image(), pixels)


@pytest.mark.parametrize("options", [{}, {"pack": "off"}])
def test_a_dataset_directory_is_what_training_reads(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tree(tmp_path / "photos", 80)
    data = distcls.prepare_dataset(source, tmp_path / "data", quiet=True, **options)
    assert read_rows(data) == read_rows(distcls.open_dataset(str(tmp_path / "data")))
    dataset = Dataset.open(tmp_path / "data")
    assert data.splits == dataset.counts()
    for name in data.splits:
        split, examples = dataset.split(name), data.split(name)
        assert [example.image_id for example in examples] == list(split.image_ids)
        assert [example.target for example in examples] == split.labels.tolist()
        assert {example.split for example in examples} == {name}
        for index in (0, len(split) - 1):
            np.testing.assert_array_equal(examples[index].image(), split.image(index))
            assert examples[index].path == source / split.image_ids[index]
    assert f"train {data.splits['train']}, val {data.splits['val']}" in repr(data)
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match=r"no split 'tset'; did you mean 'test'"):
        data.split("tset")
    with pytest.raises(UsageError, match="no split 'test'; its images are not divided"):
        distcls.open_dataset(source).split("test")


def test_the_pack_alone_is_read_where_the_files_are_gone(tmp_path: Path) -> None:
    source = tree(tmp_path / "photos", 40)
    data = distcls.prepare_dataset(source, tmp_path / "data", quiet=True)
    images = [example.image() for example in data]
    source.rename(tmp_path / "elsewhere")
    again = distcls.open_dataset(tmp_path / "data")
    assert all(example.path is None for example in again)
    for example, image in zip(again, images, strict=True):
        np.testing.assert_array_equal(example.image(), image)


def test_other_formats(tmp_path: Path) -> None:
    put(tmp_path / "a.png", RGB)
    rows = [["file", "animal", "weight", "split"], ["a.png", "cat", 2, "train"]]
    rows += [["gone.png", "dog", 1, "val"], ["b.png", "", 1, "val"]]
    path = write_manifest(tmp_path / "list.csv", rows)
    data = distcls.open_dataset(path, label_column="animal")
    assert (data.classes, data.splits, data.left_out) == (("cat", "dog"), {"train": 1, "val": 1}, 1)
    assert (data[0].weight, data[0].group) == (2.0, None)
    np.testing.assert_array_equal(data[0].image(), RGB)
    with pytest.raises(BadImage, match=r"gone\.png: cannot be read: No such file"):
        data[1].image()
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    named = distcls.open_dataset(path, label_column="animal", classes=tmp_path / "names.txt")
    assert (named.classes, named[0].target) == (("dog", "cat"), 1)

    idx = distcls.open_dataset(idx_folder(tmp_path / "idx", 30, 10), format="idx")
    assert (idx.splits, idx[0].path) == ({"train": 30, "test": 10}, None)
    assert distcls.open_dataset("digits")[0].image().shape == (8, 8, 3)


def test_transparent_pixels_are_blended_as_prepare_does(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "icons" / name).mkdir(parents=True)
        Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "icons" / name / "1.png")
    data = distcls.open_dataset(tmp_path / "icons")
    assert np.unique(data[0].image()).tolist() == [255]
    black = distcls.open_dataset(tmp_path / "icons", background=(0, 0, 0))
    assert np.unique(black[0].image()).tolist() == [0]


@pytest.mark.parametrize("prepared", [False, True])
def test_several_outputs_per_image(prepared: bool, tmp_path: Path) -> None:
    def opened(**options: Any) -> distcls.ImageDataset:
        if not prepared:
            return distcls.open_dataset(path, **options)
        return distcls.prepare_dataset(path, tmp_path / str(len(options)), quiet=True, **options)

    path = multi_output.manifest(tmp_path, 90)
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    by_id = {Path(name).name: row for name, *row in rows}
    data = opened(label_columns=["left", "right"])
    for example in data:
        left, right = by_id[Path(example.image_id).name][1:3]
        assert (example.labels, example.label) == ((left, right), f"{left}|{right}")
        assert isinstance(example.target, tuple)
        heads = zip(data.task.heads, example.target, strict=True)
        assert tuple(head.classes[index] for head, index in heads) == (left, right)
    frame = data.to_dataframe()
    assert frame["label:left"].tolist() == [example.labels[0] for example in data]

    data = opened(labels_column="tags", separator="|")
    assert any(not example.labels for example in data)
    for example in data:
        tags = by_id[Path(example.image_id).name][3]
        assert "|".join(example.labels) == example.label == tags
        assert isinstance(example.target, tuple)
        assert [data.classes[i] for i, there in enumerate(example.target) if there] == [
            *example.labels
        ]


def test_the_manifest_as_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = tiny_dataset.coloured(6)
    folder = tiny_dataset.write(tmp_path / "d", list(images), labels, ("r", "g", "b"))
    data = distcls.open_dataset(folder)
    frame = data.to_dataframe()
    assert frame.columns.tolist() == ["image_id", "path", "label", "split"]
    assert frame["label"].tolist() == [example.label for example in data]
    assert frame["path"].isna().all()
    source = tree(tmp_path / "photos", 30)
    frame = distcls.open_dataset(source)[:3].to_dataframe()
    assert frame["path"].tolist() == [f"{source}/{name}" for name in frame["image_id"]]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match=r"to_dataframe needs pandas, .* pip install pandas"):
        data.to_dataframe()


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (None, {}, "data: None is not a path"),
    (3, {}, "data: 3 is not a path"),
    ("", {}, "data: '' is not a path"),
    ("nowhere", {}, "nowhere: no such file or folder"),
    ("photos", {"clases": "x"}, "options: unknown key 'clases'; did you mean 'classes'"),
    ("photos", {"val_fraction": 0.1}, "options: unknown key 'val_fraction'"),
    ("photos", {"format": "jpg"}, "options: format: 'jpg' is not valid, expected one of auto"),
    ("photos", {"classes": "gone.txt"}, r"classes: gone\.txt cannot be read: No such file"),
    ("photos", {"label_column": "x"}, "label_column: 'x' is for a manifest, but photos is not one"),
    ("photos", {"separator": ["|"]}, r"separator: \['\|'\] is not valid, expected text or null"),
    ("flat", {}, "flat: "),
    ("data", {"format": "folder"}, "format: 'folder' is for images, data is a dataset directory"),
]


@pytest.mark.parametrize(("path", "options", "told"), WRONG)
def test_what_cannot_be_opened(
    path: Any, options: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree(Path("photos"), 30)
    put(Path("flat/a.png"), RGB)
    images, labels = tiny_dataset.coloured(6)
    tiny_dataset.write(Path("data"), list(images), labels, ("r", "g", "b"))
    with pytest.raises(UsageError, match=told):
        distcls.open_dataset(path, **options)


def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    source = tree(tmp_path / "photos", 30)
    for given, told in (
        ({"out": None}, "out: None is not a path"),
        ({"out": source}, "photos exists already"),
        ({"out": tmp_path / "d", "val_fraction": 2}, "options: val_fraction: 2.0 is not valid"),
        ({"out": tmp_path / "d", "valfraction": 2}, "unknown key 'valfraction'; did you mean 'val"),
    ):
        with pytest.raises(UsageError, match=told):
            distcls.prepare_dataset(source, **given)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_labels_that_are_no_class_are_refused(tmp_path: Path) -> None:
    images, _ = tiny_dataset.coloured(3)
    folder = tiny_dataset.write(tmp_path / "d", list(images), [0, 1, 2], ("a", "b"))
    with pytest.raises(UsageError, match="label is 2, expected a class from 0 to 1"):
        distcls.open_dataset(folder)
