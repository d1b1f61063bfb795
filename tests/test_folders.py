"""Class-per-folder trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from distcls.data.formats.detect import open_labelled
from distcls.data.source import LabelledImages, LabelOptions, read_class_names
from distcls.data.split import split_images
from distcls.errors import UsageError
from tests.sources import digits, put, tree


def splits_of(source: LabelledImages) -> set[str | None]:
    return {record.split for record in source.records}


def test_one_folder_a_class_at_any_depth(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", 30)
    deep = put(root / "3" / "deep" / "er" / "x.png", digits(1)[0][0])
    deep.rename(deep.with_name("X.PNG"))
    (root / "3" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    source = open_labelled(str(root))
    assert source.format == "folder"
    assert source.classes == tuple("0123456789")
    assert splits_of(source) == {None}
    assert len(source.records) == 31
    assert {record.image_id for record in source.records} == {
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix.lower() == ".png"
    }


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folders_of_splits_are_kept(tmp_path: Path, val: str) -> None:
    root = tmp_path / "root"
    for split, count in (("train", 60), (val, 30), ("test", 20)):
        tree(root, count, split=split)
    source = open_labelled(str(root))
    assignment = split_images(source, val_fraction=0.5, test_fraction=0.2, limit=None, seed=0)
    assert [assignment.splits.count(name) for name in ("train", "val", "test")] == [60, 30, 20]
    for record, split in zip(assignment.records, assignment.splits, strict=True):
        assert record.image_id.split("/")[0] == {"val": val}.get(split, split)


def test_val_is_cut_from_train_and_test_is_left_alone(tmp_path: Path) -> None:
    for split, count in (("train", 60), ("test", 20)):
        tree(tmp_path / "root", count, split=split)
    source = open_labelled(str(tmp_path / "root"))
    assignment = split_images(source, val_fraction=0.2, test_fraction=0.2, limit=None, seed=0)
    homes = {
        (record.split, split)
        for record, split in zip(assignment.records, assignment.splits, strict=True)
    }
    assert homes == {("train", "train"), ("train", "val"), ("test", "test")}
    assert assignment.splits.count("test") == 20


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "car", "bus"):
        put(tmp_path / "root" / name / "a.jpg", digits(1)[0][0])
    source = open_labelled(str(tmp_path / "root"))
    assert source.classes == ("bus", "car", "train")


def test_classes_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        put(tmp_path / "root" / str(number) / "a.png", digits(1)[0][0])
    assert open_labelled(str(tmp_path / "root")).classes == ("1", "2", "10")


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", 20)
    (root / "1" / "loop").symlink_to(root / "1")
    outside = put(tmp_path / "elsewhere" / "y.png", digits(1)[0][0])
    (root / "2" / "link").symlink_to(outside.parent)
    assert len(open_labelled(str(root)).records) == 21


def test_loose_images_are_said_to_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path / "root", 20)
    put(root / "loose.png", digits(1)[0][0])
    assert len(open_labelled(str(root)).records) == 20
    assert "1 image is not in a class folder and left out" in capsys.readouterr().err


def test_a_source_that_holds_no_classes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such file or folder"):
        open_labelled(str(tmp_path / "nowhere"))
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(UsageError, match=r"no images in this folder \(searched for .*\.jpg"):
        open_labelled(str(root))
    put(root / "a.png", digits(1)[0][0])
    with pytest.raises(UsageError, match="are not in class folders"):
        open_labelled(str(root))


def test_a_class_without_training_images(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", 60, split="train")
    put(root / "test" / "owl" / "a.png", digits(1)[0][0])
    source = open_labelled(str(root))
    with pytest.raises(
        UsageError, match="class 'owl' has no training images; its only image is in"
    ):
        split_images(source, val_fraction=0.1, test_fraction=0.2, limit=None, seed=0)


def test_an_empty_class(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", 60)
    (root / "owl").mkdir()
    with pytest.raises(UsageError, match="class 'owl' has no training images"):
        split_images(
            open_labelled(str(root)), val_fraction=0.1, test_fraction=0.2, limit=None, seed=0
        )


def test_given_classes_set_the_order_and_are_the_only_ones(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", 30)
    names = tmp_path / "classes.json"
    names.write_text('["9","8","7","6","5","4","3","2","1","0"]')
    source = open_labelled(str(root), options=LabelOptions(classes=read_class_names(names)))
    assert all(source.classes[r.label] == r.image_id.split("/")[0] for r in source.records)
    assert source.classes[0] == "9"
    names.write_text('["0","1"]')
    with pytest.raises(UsageError, match="'2' is not one of the 2 classes"):
        open_labelled(str(root), options=LabelOptions(classes=read_class_names(names)))
