"""Folds and bootstrap samples: disjoint, whole, by class, by group, by seed."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distcls.commands.prepare import main
from distcls.data.dataset import MANIFEST, Dataset
from distcls.data.prepare import PrepareOptions, prepare
from distcls.data.source import ImageRecord
from distcls.data.split import Resampling, assign_folds, draw_bootstrap, resample
from distcls.errors import UsageError
from tests.sources import digits, idx_folder, labels, records, tree

grouped = labels.flatmap(
    lambda found: st.tuples(
        st.just(found),
        st.lists(st.none() | st.integers(0, 8), min_size=len(found), max_size=len(found)),
    )
)


def run(source: Path | str, out: Path, **options: Any) -> Dataset:
    prepare(PrepareOptions(source=str(source), out=out, quiet=True, **options))
    return Dataset.open(out)


@given(labels, st.integers(2, 6), st.integers(0, 9))
def test_folds_are_of_one_size_and_one_mixture(found: list[int], folds: int, seed: int) -> None:
    assume(len(found) >= folds)
    free = list(range(len(found)))
    fold_of = assign_folds(records(found), free, folds, seed)
    assert sorted(fold_of) == free
    sizes = Counter(fold_of.values())
    assert set(sizes) == set(range(1, folds + 1))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    for label in set(found):
        mixture = Counter(fold for index, fold in fold_of.items() if found[index] == label)
        counts = [mixture[fold] for fold in range(1, folds + 1)]
        assert max(counts) - min(counts) <= 1


@given(grouped, st.integers(2, 6), st.integers(0, 9))
def test_folds_keep_groups_whole(
    drawn: tuple[list[int], list[int | None]], folds: int, seed: int
) -> None:
    found, groups = drawn
    own, free = records(found, groups), list(range(len(found)))
    units = len({group for group in groups if group is not None}) + groups.count(None)
    if units < folds:
        with pytest.raises(UsageError, match=f"folds: {folds}, but there are only {units} "):
            assign_folds(own, free, folds, seed)
        return
    fold_of = assign_folds(own, free, folds, seed)
    assert sorted(fold_of) == free
    assert set(fold_of.values()) == set(range(1, folds + 1))
    homes: dict[int, int] = {}
    for group, index in zip(groups, free, strict=True):
        assert group is None or homes.setdefault(group, fold_of[index]) == fold_of[index]


def test_folds_of_many_groups_are_nearly_even() -> None:
    found = [index % 4 for index in range(1000)]
    groups: list[int | None] = [index // 8 for index in range(1000)]
    fold_of = assign_folds(records(found, groups), range(1000), 5, 0)
    cells = Counter((fold, found[index]) for index, fold in fold_of.items())
    assert len(cells) == 20
    assert set(cells.values()) == {50}


def test_the_seed_gives_other_folds() -> None:
    found = [0, 1] * 30
    one, same, other = (assign_folds(records(found), range(60), 3, seed) for seed in (0, 0, 1))
    assert one == same != other


@given(grouped, st.integers(1, 5), st.integers(0, 9))
def test_a_bootstrap_sample_is_as_large_as_what_it_is_of(
    drawn: tuple[list[int], list[int | None]], number: int, seed: int
) -> None:
    found, groups = drawn
    plain = draw_bootstrap(records(found), range(len(found)), number, seed)
    times: Counter[int] = Counter()
    for index, count in plain.items():
        times[found[index]] += count
    assert times == Counter(found)  # each class as often as before, so none is without an image
    counts = draw_bootstrap(records(found, groups), range(len(found)), number, seed)
    assert sorted(counts) == list(range(len(found)))
    homes: dict[int, int] = {}
    for index, group in enumerate(groups):
        assert group is None or homes.setdefault(group, counts[index]) == counts[index]


def test_the_times_drawn_are_those_of_a_bootstrap() -> None:
    count = 20_000
    counts = list(draw_bootstrap(records([0] * count), range(count), 1, 0).values())
    # binomial(n, 1/n), whose limit is a Poisson distribution of mean 1
    for times, share in ((0, 0.3679), (1, 0.3679), (2, 0.1839), (3, 0.0613)):
        assert counts.count(times) / count == pytest.approx(share, abs=0.01)
    other = list(draw_bootstrap(records([0] * count), range(count), 2, 0).values())
    both = sum(one == 0 and two == 0 for one, two in zip(counts, other, strict=True))
    assert both / count == pytest.approx(0.3679**2, abs=0.01)  # another number, another sample


def test_weights_of_the_source_are_kept_and_multiplied() -> None:
    own = [
        ImageRecord(index=index, image_id=str(index), label=0, weight=0.5) for index in range(50)
    ]
    how, splits = Resampling(bootstrap=1), ["train"] * 40 + ["test"] * 10
    sample, divided = resample(own, splits, how, seed=0, classes=("a",))
    counts = draw_bootstrap(own, range(40), 1, 0)
    for index in range(40):
        assert divided[index] == ("train" if counts[index] else "val")
        assert sample[index].weight == 0.5 * max(1, counts[index])
    assert divided[40:] == ["test"] * 10
    assert [record.weight for record in sample[40:]] == [0.5] * 10


@pytest.mark.parametrize("fold", [1, 2])
def test_a_class_that_one_fold_would_take_is_refused_in_all(fold: int) -> None:
    how = Resampling(folds=2, fold=fold)
    with pytest.raises(UsageError, match=r"folds: class 'bee' is in fold \d only"):
        resample(records([0] * 9 + [1]), ["train"] * 10, how, seed=0, classes=("ape", "bee"))
    groups: list[int | None] = [1, 2, 3, 4, 5, 5]
    own = records([0, 0, 0, 0, 1, 1], groups)
    with pytest.raises(UsageError, match="two training images, in two groups"):
        resample(own, ["train"] * 6, how, seed=0, classes=("ape", "bee"))


def test_multi_label_images_are_assigned_by_their_first_label() -> None:
    own = [
        ImageRecord(
            index=index, image_id=str(index), label=labels[0] if labels else -1, labels=labels
        )
        for index, labels in enumerate([(0, 1), (1,), ()] * 6 + [(2,)])
    ]
    how = Resampling(folds=3, fold=1)
    _, divided = resample(own, ["train"] * 19, how, seed=0, classes=("ape", "bee", "cow"))
    held = Counter(own[index].label for index, split in enumerate(divided) if split == "val")
    assert all(held[label] == 2 for label in (-1, 0, 1))


def test_validation_of_all_folds_is_the_training_part(tmp_path: Path) -> None:
    folds = [run("digits", tmp_path / str(fold), folds=3, fold=fold) for fold in (1, 2, 3)]
    whole = run("digits", tmp_path / "whole", val_fraction=0)
    validated: list[str] = []
    for data in folds:
        # the test images are the same, whatever validates
        assert data.split("test").image_ids == whole.split("test").image_ids
        train, val = (set(data.split(name).image_ids) for name in ("train", "val"))
        assert train.isdisjoint(val)
        assert train | val == set(whole.split("train").image_ids)
        validated += data.split("val").image_ids
        part = np.bincount(data.split("val").labels) / np.bincount(whole.split("train").labels)
        np.testing.assert_allclose(part, 1 / 3, atol=0.01)
    assert sorted(validated) == sorted(whole.split("train").image_ids)


def test_folds_of_a_limited_dataset_are_all_of_it(tmp_path: Path) -> None:
    validated: list[str] = []
    for fold in (1, 2):
        data = run("digits", tmp_path / str(fold), folds=2, fold=fold, limit=80, pack="on")
        assert data.counts() == {"train": 20, "val": 20, "test": 40}
        validated += data.split("val").image_ids
    assert len(set(validated)) == 40


def test_a_bootstrap_sample_is_prepared_with_weights(tmp_path: Path) -> None:
    data = run("digits", tmp_path / "one", bootstrap=1)
    whole = run("digits", tmp_path / "whole", val_fraction=0)
    train, val = data.split("train"), data.split("val")
    assert {*train.image_ids, *val.image_ids} == set(whole.split("train").image_ids)
    assert len(train) + len(val) == len(whole.split("train"))
    assert len(val) / len(whole.split("train")) == pytest.approx(0.368, abs=0.04)
    assert train.weights is not None
    assert train.weights.sum() == len(whole.split("train"))
    assert (train.weights == np.rint(train.weights)).all()
    assert train.weights.min() == 1
    for name in ("val", "test"):
        weights = data.split(name).weights
        assert weights is not None
        assert (weights == 1).all()
    # pixels still belong to their names
    images, targets = digits(1797)
    for split in (train, val):
        rows = [int(name.removeprefix("digits/")) for name in split.image_ids]
        assert split.uniform is not None
        np.testing.assert_array_equal(split.uniform[..., 0], images[rows])
        np.testing.assert_array_equal(split.labels, targets[rows])
    other = run("digits", tmp_path / "two", bootstrap=2)
    assert other.split("test").image_ids == data.split("test").image_ids
    assert other.split("val").image_ids != val.image_ids


def test_the_first_bootstrap_sample_needs_no_number(tmp_path: Path) -> None:
    calls = {
        "before": ["--bootstrap", "digits"],
        "number": ["digits", "--bootstrap", "1"],
        "end": ["digits", "--bootstrap"],
    }
    for name, words in calls.items():
        main(["--out", str(tmp_path / name), "--quiet", "--limit", "60", *words])
    found = {(tmp_path / name / MANIFEST).read_bytes() for name in calls}
    assert len(found) == 1


def test_groups_of_a_manifest_stay_whole(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", 60)
    rows = [
        (path.relative_to(source).as_posix(), path.parent.name, f"p{index % 12}")
        for index, path in enumerate(sorted(source.rglob("*.png")))
    ]
    with (source / "list.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([("path", "label", "group"), *rows])
    for name, options in (("f", {"folds": 3, "fold": 2}), ("b", {"bootstrap": 1})):
        data = run(source / "list.csv", tmp_path / name, test_fraction=0, **options)
        homes: dict[str, str] = {}
        for row in pq.read_table(data.folder / MANIFEST).to_pylist():
            assert homes.setdefault(row["group"], row["split"]) == row["split"]
        assert set(homes.values()) == {"train", "val"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--folds", "1", "--fold", "1"], "folds: 1 is not valid, expected at least 2"),
        (["--folds", "5"], r"fold: None is not valid, expected 1 to 5 \(folds\)"),
        (["--folds", "5", "--fold", "6"], r"fold: 6 is not valid, expected 1 to 5 \(folds\)"),
        (["--folds", "5", "--fold", "0"], "fold: 0 is not valid, expected 1 to 5"),
        (["--fold", "1"], "fold: 1 is not valid, expected null without folds"),
        (["--bootstrap", "0"], "bootstrap: 0 is not valid, expected at least 1"),
        (
            ["--folds", "5", "--fold", "1", "--bootstrap", "1"],
            "bootstrap: 1 is not valid, expected nothing with folds",
        ),
        (
            ["--folds", "5", "--fold", "1", "--val-fraction", "0.1"],
            r"val_fraction: 0\.1 is not valid, expected nothing with folds",
        ),
        (
            ["--bootstrap", "1", "--val-fraction", "0"],
            r"val_fraction: 0\.0 is not valid, expected nothing with bootstrap",
        ),
        (
            ["--folds", "500", "--fold", "1", "--limit", "40"],
            "folds: 500, but there are only 20 training images",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main(["digits", "--out", str(tmp_path / "out"), *flags])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--folds", "2", "--fold", "1"], ["--bootstrap", "1"]])
def test_a_source_that_validates_on_its_own_images(tmp_path: Path, flags: list[str]) -> None:
    source = tree(tmp_path / "source", 60, split="train")
    tree(source, 40, split="val")
    with pytest.raises(UsageError, match=f"{flags[0][2:]}: .*has a validation split of its own"):
        main([str(source), "--out", str(tmp_path / "out"), *flags])
    # its own test split is no hindrance
    own = run(idx_folder(tmp_path / "idx", 200, 40), tmp_path / "idx_out", folds=2, fold=2)
    assert own.counts() == {"train": 100, "val": 100, "test": 40}
