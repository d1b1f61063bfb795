"""Opening dataset directories that prepare wrote, whole and damaged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distcls.commands.prepare import main
from distcls.data.dataset import (
    CLASSES,
    INFO,
    MANIFEST,
    PACK,
    DataFingerprint,
    Dataset,
    fingerprint_of,
)
from distcls.data.prepare import PrepareOptions, prepare
from distcls.data.source import Images, to_rgb
from distcls.data.writer import manifest_schema
from distcls.errors import BadImage, UsageError
from distcls.imaging import decode_file
from tests import tiny_dataset
from tests.sources import digits, put, tree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty grey digits, as files and packed."""
    source = tree(tmp_path / "source", 60)
    prepare(PrepareOptions(source=str(source), out=tmp_path / "data", quiet=True))
    return tmp_path / "data"


def test_counts_and_splits_agree(folder: Path) -> None:
    data = Dataset.open(folder)
    assert sum(data.counts().values()) == 60
    assert data.info["counts"] == data.counts()
    for name, count in data.counts().items():
        split = data.split(name)
        assert len(split) == len(split.labels) == len(split.image_ids) == count
        assert split.labels.dtype == np.int64
        for image_id, label in zip(split.image_ids, split.labels, strict=True):
            assert image_id.split("/")[0] == data.classes[label]
    assert data.packed
    assert data.has_files


def test_the_manifest_is_as_promised(folder: Path) -> None:
    assert pq.read_schema(folder / MANIFEST).equals(manifest_schema(), check_metadata=False)


def test_pack_and_files_hold_the_same_images(folder: Path, tmp_path: Path) -> None:
    data = Dataset.open(folder)
    packed, files = data.split("train"), data.split("train", use_pack=False)
    assert packed.uniform is not None
    assert files.uniform is None
    for index, image_id in enumerate(packed.image_ids):
        expected = decode_file(tmp_path / "source" / image_id)
        for found in (packed.image(index), files.image(index), to_rgb(packed.uniform[index])):
            np.testing.assert_array_equal(found, expected)


def test_images_of_several_sizes_are_not_uniform(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", 60)
    wide = np.random.default_rng(0).integers(0, 255, (5, 11, 3), np.uint8)
    for label in range(10):
        put(source / str(label) / "wide.png", wide)
    prepare(PrepareOptions(source=str(source), out=tmp_path / "data", val_fraction=0, quiet=True))
    split = Dataset.open(tmp_path / "data").split("train")
    assert split.uniform is None
    index = next(i for i, name in enumerate(split.image_ids) if name.endswith("wide.png"))
    np.testing.assert_array_equal(split.image(index), wide)


def test_images_turned_on_their_side_are_not_uniform(tmp_path: Path) -> None:
    wide = np.arange(24, dtype=np.uint8).reshape(4, 6)
    for index in range(4):
        put(tmp_path / "source" / "ab"[index % 2] / f"{index}.png", wide if index < 2 else wide.T)
    options = PrepareOptions(
        source=str(tmp_path / "source"), out=tmp_path / "data", val_fraction=0, test_fraction=0
    )
    prepare(options)
    split = Dataset.open(tmp_path / "data").split("train")
    assert split.uniform is None
    assert {split.image(index).shape for index in range(4)} == {(4, 6, 3), (6, 4, 3)}


def test_a_file_that_went_bad_is_named(folder: Path, tmp_path: Path) -> None:
    split = Dataset.open(folder).split("train", use_pack=False)
    path = tmp_path / "source" / split.image_ids[2]
    path.unlink()
    with pytest.raises(BadImage, match=f"{path}: cannot be read"):
        split.image(2)


def test_a_wrong_split_is_answered_with_the_choices(folder: Path) -> None:
    with pytest.raises(UsageError, match="no split 'tset'; did you mean 'test'"):
        Dataset.open(folder).split("tset")


def test_ways_of_reading_that_are_not_there(tmp_path: Path) -> None:
    prepare(PrepareOptions(source="digits", out=tmp_path / "packed", limit=30, quiet=True))
    with pytest.raises(UsageError, match="has its images only in the pack"):
        Dataset.open(tmp_path / "packed").split("train", use_pack=False)
    options = PrepareOptions(
        source=str(tree(tmp_path / "source", 60)), out=tmp_path / "files", pack="off", quiet=True
    )
    prepare(options)
    with pytest.raises(UsageError, match="has no pack"):
        Dataset.open(tmp_path / "files").split("train", use_pack=True)


def test_what_is_not_whole_is_refused(folder: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UsageError, match=message):
            Dataset.open(folder)

    pack = (folder / PACK).read_bytes()
    (folder / PACK).write_bytes(pack[:-1])
    refused("3839 bytes, expected 3840")
    (folder / PACK).unlink()
    refused("0 bytes, expected 3840")
    (folder / PACK).write_bytes(pack)
    manifest = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(manifest[:100])
    refused("manifest.parquet: wrong checksum")
    tiny_dataset.sign(folder)
    refused("manifest.parquet: cannot be read")
    (folder / MANIFEST).write_bytes(manifest)
    pq.write_table(pq.read_table(folder / MANIFEST).drop_columns("split"), folder / MANIFEST)
    tiny_dataset.sign(folder)
    refused("column 'split' is missing")
    (folder / CLASSES).unlink()
    refused("classes.json: No such file")
    info = json.loads((folder / INFO).read_text())
    (folder / INFO).write_text(json.dumps({**info, "format": 99}))
    refused("dataset format 99, expected 1")
    (folder / INFO).write_text("{")
    refused("is .* a dataset directory")


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such dataset directory; distcls prepare makes one"):
        Dataset.open(tmp_path / "nowhere")


def unpacked(root: Path, out: Path, **options: Any) -> Path:
    """A dataset directory without a pack."""
    prepare(PrepareOptions(source=str(root), out=out, pack="off", quiet=True, **options))
    return out


def first_image(folder: Path) -> Images:
    return Dataset.open(folder).split("train").image(0)


def test_images_near_a_dataset_move_with_it(tmp_path: Path) -> None:
    out = unpacked(tree(tmp_path / "one" / "photos", 60), tmp_path / "one" / "data" / "set")
    before = first_image(out)
    assert json.loads((out / INFO).read_text())["relative_root"] == "../../photos"
    (tmp_path / "one").rename(tmp_path / "two")
    np.testing.assert_array_equal(first_image(tmp_path / "two" / "data" / "set"), before)
    far = unpacked(tree(tmp_path / "photos", 60), tmp_path / "a" / "b" / "c" / "d")
    assert json.loads((far / INFO).read_text())["relative_root"] is None


def test_images_elsewhere_are_named_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = unpacked(tree(tmp_path / "photos", 60), tmp_path / "data")
    before, manifest = first_image(out), (out / MANIFEST).read_bytes()
    new = (tmp_path / "photos").rename(tmp_path / "moved")
    message = (
        rf"data: its images were in {tmp_path}/photos, which does not exist; if they have moved: "
        rf"distcls prepare {out} --root THEIR_FOLDER --out NEW_DATASET"
    )
    with pytest.raises(UsageError, match=message):
        Dataset.open(out).split("train")
    main([str(out), "--root", str(new), "--out", str(tmp_path / "again"), "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["counts"] == Dataset.open(out).counts()
    assert f"wrote {tmp_path}/again: {out} with its images in {new}" in printed.err
    np.testing.assert_array_equal(first_image(tmp_path / "again"), before)
    assert (tmp_path / "again" / MANIFEST).read_bytes() == manifest
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"root: none of 60 images exists, first .*empty/"):
        main([str(out), "--root", str(tmp_path / "empty"), "--out", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()
    with pytest.raises(UsageError, match="seed: 3 is not valid, expected nothing with root and"):
        main([str(out), "--root", str(new), "--out", str(tmp_path / "no"), "--seed", "3"])
    next(new.rglob("*.png")).unlink()
    main([str(out), "--root", str(new), "--out", str(tmp_path / "third"), "--quiet"])
    assert "warning: 1 of 60 images are not in" in capsys.readouterr().err


def test_a_packed_dataset_needs_its_images_for_nothing(folder: Path, tmp_path: Path) -> None:
    before = first_image(folder)
    new = (tmp_path / "source").rename(tmp_path / "moved")
    np.testing.assert_array_equal(first_image(folder), before)
    with pytest.raises(UsageError, match="its images were in"):
        Dataset.open(folder).split("train", use_pack=False)
    main([str(folder), "--root", str(new), "--out", str(tmp_path / "again"), "--quiet"])
    again = Dataset.open(tmp_path / "again").split("train", use_pack=False)
    np.testing.assert_array_equal(again.image(0), before)
    prepare(PrepareOptions(source="digits", out=tmp_path / "digits", limit=30, quiet=True))
    with pytest.raises(UsageError, match=r"root: .*digits has its images only in the pack"):
        main([str(tmp_path / "digits"), "--root", str(new), "--out", str(tmp_path / "no")])


def test_a_dataset_from_before_relative_roots(tmp_path: Path) -> None:
    out = unpacked(tree(tmp_path / "photos", 60), tmp_path / "data")
    info = json.loads((out / INFO).read_text())
    for name in ("relative_root", "left_out"):
        del info[name]
    (out / INFO).write_text(json.dumps(info))
    tiny_dataset.sign(out)
    before = first_image(out)
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="its images were in"):
        first_image(out)
    main([str(out), "--root", str(tmp_path / "moved"), "--out", str(tmp_path / "new"), "--quiet"])
    np.testing.assert_array_equal(first_image(tmp_path / "new"), before)


OLD = Path(__file__).parent / "fixtures" / "v076daf9"


def test_datasets_of_earlier_versions_are_read() -> None:
    images, labels = digits(1797)
    data = Dataset.open(OLD / "digits")
    assert data.counts() == {"train": 40, "val": 40, "test": 40}
    for name in data.counts():
        split = data.split(name)
        rows = [int(image_id.removeprefix("digits/")) for image_id in split.image_ids]
        assert split.uniform is not None
        np.testing.assert_array_equal(split.uniform[..., 0], images[rows])
        np.testing.assert_array_equal(split.labels, labels[rows])
        assert split.true_labels == [str(label) for label in split.labels]


@pytest.mark.parametrize(
    ("name", "kind", "first", "texts"),
    [
        ("heads", "multi_head", [0, 1], ["even|small", "even|large", "odd|large"]),
        ("labels", "multi_label", [0, 1], ["round", "big", "big|round"]),
    ],
)
def test_tasks_of_earlier_versions_are_read(
    name: str, kind: str, first: list[int], texts: list[str]
) -> None:
    data = Dataset.open(OLD / name)
    split = data.split("test")
    assert data.task.kind == kind
    assert split.labels[0].tolist() == first
    assert split.true_labels[:3] == texts
    assert split.image(0).shape == (8, 8, 3)


def fingerprint(folder: Path) -> DataFingerprint:
    data = Dataset.open(folder)
    return fingerprint_of(data, data.split("train"), data.split("val"))


def rewritten(folder: Path, column: str, values: list[object], kind: pa.DataType) -> None:
    table = pq.read_table(folder / MANIFEST)
    if column in table.column_names:
        table = table.drop_columns([column])
    pq.write_table(table.append_column(column, pa.array(values, kind)), folder / MANIFEST)
    tiny_dataset.sign(folder)


def test_a_fingerprint_does_not_depend_on_the_place_or_the_time(
    folder: Path, tmp_path: Path
) -> None:
    first = fingerprint(folder)
    assert DataFingerprint.from_plain(dataclasses.asdict(first)) == first
    assert (first.train.images, first.val.images) == tuple(
        Dataset.open(folder).counts()[name] for name in ("train", "val")
    )
    assert first.pack is not None
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / MANIFEST).touch()
    source = str(tmp_path / "source")
    prepare(PrepareOptions(source=source, out=tmp_path / "again", quiet=True))
    assert fingerprint(copy) == fingerprint(tmp_path / "again") == first
    prepare(PrepareOptions(source=source, out=tmp_path / "files", pack="off", quiet=True))
    assert fingerprint(tmp_path / "files") != first
    assert not first.differences(fingerprint(tmp_path / "files"))


def test_a_fingerprint_says_what_differs(folder: Path, tmp_path: Path) -> None:
    first, table = fingerprint(folder), pq.read_table(folder / MANIFEST)
    labels, splits = (table.column(name).to_pylist() for name in ("label", "split"))

    def after(column: str, values: list[object], kind: pa.DataType) -> list[str]:
        copy = tmp_path / column
        shutil.copytree(folder, copy)
        rewritten(copy, column, values, kind)
        return first.differences(fingerprint(copy))

    place = splits.index("val")
    changed = [*labels[:place], (labels[place] + 1) % 10, *labels[place + 1 :]]
    assert after("label", changed, pa.int32()) == ["images of val have other labels"]
    assert after("weight", [1.0] * 60, pa.float64()) == [
        "train has other weights",
        "val has other weights",
    ]
    fewer = [*splits[:place], "test", *splits[place + 1 :]]
    count = splits.count("val")
    assert after("split", fewer, pa.string()) == [f"val has {count - 1} images, then {count}"]
    ids = ["other", *table.column("image_id").to_pylist()[1:]]
    [line] = after("image_id", ids, pa.string())
    count = splits.count("train")
    assert line == f"train has {count} images as then, but other ones, or in another order"


@pytest.mark.parametrize("digest", [None, 7, "abc", {"pack.bin": 7}, {"pack.bin": "abc"}])
def test_a_recorded_digest_that_is_none_is_refused(folder: Path, digest: object) -> None:
    info = json.loads((folder / INFO).read_text())
    (folder / INFO).write_text(json.dumps(info | {"sha256": digest}))
    with pytest.raises(UsageError, match=r"dataset\.json: sha256[^\n]* expected"):
        fingerprint(folder)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (["a", "b", "x"], "its classes have other names: 'x' was 'c'"),
        (["b", "a", "c"], "its classes are in another order: 'b' is where 'a' was"),
        (["a", "b"], "its 2 classes are the previous 3 without 'c'"),
        (["a", "b", "c", "d"], "its 4 classes are the previous 3 with 'd'"),
        (["a", "b", "x" * 99], f"its classes have other names: '{'x' * 40}...' was 'c'"),
        (["b", "c", "d"], "its 3 classes are the previous 3 without 'a' and with 'd'"),
    ],
)
def test_which_class_names_differ(folder: Path, now: list[str], said: str) -> None:
    before = dataclasses.replace(fingerprint(folder), classes=("a", "b", "c"))
    assert before.differences(dataclasses.replace(before, classes=tuple(now))) == [said]


def test_many_class_names_are_not_all_listed(folder: Path) -> None:
    before = fingerprint(folder)
    now = dataclasses.replace(before, classes=tuple(f"class {i}" for i in range(1000)))
    [said] = before.differences(now)
    assert said.endswith("'class 4' and 995 more")
    assert len(said) < 250
