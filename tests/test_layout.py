"""Which folders are taken for splits, which for classes, and what is said about it."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from distcls.commands.prepare import main
from distcls.data.formats.detect import open_labelled
from distcls.data.source import LabelledImages, LabelOptions
from distcls.errors import UsageError
from tests.sources import digits, put

IMAGE = digits(1)[0][0]


def folders(root: Path, *places: str, each: int = 2) -> Path:
    """Images in each of these folders."""
    for place in places:
        for number in range(each):
            put(root / place / f"{number}.png", IMAGE)
    return root


def read(root: Path, *splits: str) -> LabelledImages:
    return open_labelled(str(root), options=LabelOptions(splits=splits))


def counts(source: LabelledImages) -> dict[str | None, int]:
    return dict(Counter(record.split for record in source.records))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("dev", "val"), ("eval", "val"), ("valid_images", "val"), ("val2017", "val")),
        *(("images_valid", "val"), ("ValidationSet", "val"), ("testset", "test")),
        *(("test1", "test"), ("holdout", "test"), ("hold-out", "test"), ("seg_test", "test")),
        *(("Test Images", "test"), ("TEST", "test")),
    ],
)
def test_a_folder_beside_train_is_the_split_that_its_name_says(
    tmp_path: Path, name: str, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folders(tmp_path / "r", "train/a", "train/b", f"{name}/a", f"{name}/b")
    source = read(root)
    assert source.classes == ("a", "b")
    assert counts(source) == {"train": 4, split: 4}
    said = capsys.readouterr().err
    assert f"{root}: splits by folder: " in said
    assert f"{split} is {name}" in said
    assert "train is train" in said


@pytest.mark.parametrize("name", ["unlabeled", "Unlabelled_images", "pred", "predict", "seg_pred"])
def test_folders_without_labels_are_left_out_and_counted(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folders(tmp_path / "r", "train/a", "train/b", "test/a", "test/b", name, each=3)
    source = read(root)
    assert source.classes == ("a", "b")
    assert counts(source) == {"train": 6, "test": 6}
    assert f"left out 3 images in {name}, which is no split" in capsys.readouterr().err
    assert [row.image_id for row in source.rejected] == [f"{name}/{n}.png" for n in range(3)]


@pytest.mark.parametrize("wrapping", ["", "archive/", "download/archive/"])
def test_a_download_with_each_folder_in_itself(
    tmp_path: Path, wrapping: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [
        f"{wrapping}seg_{s}/seg_{s}/{c}" for s in ("train", "test") for c in ("sea", "street")
    ]
    root = folders(tmp_path / "r", *places)
    folders(root, f"{wrapping}seg_pred/seg_pred", each=5)
    out = tmp_path / "out"
    main([str(root), "--out", str(out), "--val-fraction", "0"])
    said = capsys.readouterr().err
    assert f"train is {wrapping}seg_train/seg_train" in said
    assert f"left out 5 images in {wrapping}seg_pred, which is no split" in said
    assert "\nclasses: sea, street\n" in said
    with (out / "rejected.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 5
    assert rows[0]["reason"] == f"in {wrapping}seg_pred, which is no split"
    assert counts(read(root)) == {"train": 4, "test": 4}


@pytest.mark.parametrize(
    ("places", "classes"),
    [
        (("dataset/train/a", "dataset/train/b", "dataset/val/a"), ("a", "b")),
        (("images/train/a", "images/train/b", "images/val/a", "labels"), ("a", "b")),
        (("PetImages/Cat", "PetImages/Dog"), ("Cat", "Dog")),
        (("train/images/a", "train/images/b", "test/images/a"), ("a", "b")),
        (("asl_alphabet_train/asl_alphabet_train/A", "asl_alphabet_train/asl_alphabet_train/B",
          "asl_alphabet_test/asl_alphabet_test/A"), ("A", "B")),
        (("flowers_train/a", "flowers_train/b", "flowers_test/a"), ("a", "b")),
        (("train/a", "train/b"), ("a", "b")),
    ],
)  # fmt: skip
def test_folders_around_the_classes(
    tmp_path: Path, places: tuple[str, ...], classes: tuple[str, ...]
) -> None:
    root = tmp_path / "r"
    for place in places:
        if place == "labels":
            (root / "labels").mkdir(parents=True)
            (root / "labels" / "a.txt").write_text("0")
        else:
            folders(root, place)
    source = read(root)
    assert source.classes == classes
    assert len(source.records) == 2 * sum(place != "labels" for place in places)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "car", "bus"),
        ("test", "control"),
        ("train", "test", "car"),
        ("valid", "invalid"),
        ("bullet_train", "steam_train", "bus"),
        ("train_station", "test_tube"),
        ("test 1", "test 2"),
        ("cat", "dog", "unlabeled"),
        ("Test A/deep", "Test B/deep"),
        ("Test 1/deep", "Test 2/deep"),
        ("bullet train/night", "steam train/night"),
        ("benign/40X", "malignant/40X"),
    ],
)
def test_classes_may_have_such_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    source = read(folders(tmp_path / "r", *names))
    assert source.classes == tuple(sorted(name.partition("/")[0] for name in names))
    assert counts(source) == {None: 2 * len(names)}


@pytest.mark.parametrize(
    ("places", "asked"),
    [
        (("train/a", "train/b", "extra/a"), "is the folder extra a split"),
        (("train/a", "train/b", "extra", "more"), "are the folders extra, more splits"),
        (("train/a", "train/b", "val/a", "eval/a"), "the folders eval, val all look like val"),
        (
            ("train_v1/a", "train_v1/b", "test_final/a"),
            "are the folders test_final, train_v1 splits",
        ),
        (("train/a", "train/b", "test_final/a"), "is the folder test_final a split"),
    ],
)
def test_where_two_readings_are_possible_the_user_is_asked(
    tmp_path: Path, places: tuple[str, ...], asked: str
) -> None:
    root = folders(tmp_path / "r", *places)
    with pytest.raises(UsageError, match=r"--splits train=.*; --splits none") as caught:
        main([str(root), "--out", str(tmp_path / "out")])
    assert str(caught.value).startswith(f"{root}: ")
    assert asked in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_folders_beside_two_splits_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folders(tmp_path / "r", "train/a", "train/b", "test/a", "extra/a")
    assert counts(read(root)) == {"train": 4, "test": 2}
    assert "warning: " in (said := capsys.readouterr().err)
    assert "left out 2 images in extra, which is no split" in said


def test_splits_without_training_images_are_no_classes(tmp_path: Path) -> None:
    root = folders(tmp_path / "r", "val/a", "val/b", "test/a", "test/b")
    assert counts(read(root)) == {"val": 4, "test": 4}
    flat = folders(tmp_path / "flat", "train", "test1")
    with pytest.raises(UsageError, match="its images are not in class folders"):
        read(flat)
    twice = folders(tmp_path / "twice", "train/train", "test1/test1")
    with pytest.raises(UsageError, match="its images are not in class folders"):
        read(twice)


def test_the_option_names_the_folders(tmp_path: Path) -> None:
    root = folders(tmp_path / "r", "one/x/a", "one/x/b", "two/a", "three/b", "four/a")
    out = tmp_path / "out"
    main([str(root), "--out", str(out), "--splits", "train=one/x,test=two,Dev=three", "--quiet"])
    found = read(root, "train=one/x", "test=two", "Dev=three")
    assert found.classes == ("a", "b")
    assert counts(found) == {"train": 4, "test": 2, "val": 2}
    assert {row.reason for row in found.rejected} == {"in four, which is no split"}
    both = read(root, "train=one/x", "test=two", "test=four/")
    assert counts(both) == {"train": 4, "test": 4}
    plain = read(folders(tmp_path / "p", "train/a", "test/b"), "none")
    assert plain.classes == ("test", "train")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ("train", "splits: 'train' is not valid, expected none, or folders as in train=seg_train"),
        ("learn=one", "splits: 'learn=one' is not valid"),
        ("train=", "splits: 'train=' is not valid"),
        ("train=onne", "splits: .* has no folder 'onne' with images; did you mean 'one'"),
        ("train=../r/one", "has no folder '../r/one' with images"),
        ("train=one,test=one/a", "splits: 'one/a' and 'one' are inside each other"),
        ("train=one,test=one", "splits: 'one' and 'one' are inside each other"),
    ],
)
def test_wrong_splits(tmp_path: Path, splits: str, message: str) -> None:
    root = folders(tmp_path / "r", "one/a", "one/b", "two/a")
    with pytest.raises(UsageError, match=message) as caught:
        main([str(root), "--out", str(tmp_path / "out"), "--splits", splits])
    assert "\n" not in str(caught.value)


def test_splits_are_of_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"splits: .* names folders, but digits is not a folder"):
        main(["digits", "--out", str(tmp_path / "out"), "--splits", "train=a"])
