"""Splits: by class, by group, by seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcls.data.source import ImageRecord
from distcls.data.split import assign_splits, draw_subset, split_sizes
from distcls.errors import UsageError
from tests.sources import labels, records

fractions = st.floats(0, 0.49)


@given(labels, fractions, fractions, st.integers(0, 9))
def test_every_class_keeps_a_training_image(
    found: list[int], val: float, test: float, seed: int
) -> None:
    splits = assign_splits(records(found), val_fraction=val, test_fraction=test, seed=seed)
    trained = {label for label, split in zip(found, splits, strict=True) if split == "train"}
    assert trained == set(found)
    for label, count in Counter(found).items():
        got = Counter(s for own, s in zip(found, splits, strict=True) if own == label)
        for split, fraction in (("val", val), ("test", test)):
            assert got[split] <= max(1, count * fraction + 0.5)
            if fraction and count >= 3:
                assert got[split] >= 1


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (10, (2, 1)), (15, (3, 2)), (100, (20, 10))],
)
def test_small_classes(count: int, expected: tuple[int, int]) -> None:
    found = split_sizes(count, {"test": 0.2, "val": 0.1})
    assert (found["test"], found["val"]) == expected


def test_two_images_and_no_test_split_split_sizes() -> None:
    splits = assign_splits(records([0, 0]), val_fraction=0.1, test_fraction=0.0, seed=0)
    assert sorted(splits) == ["train", "val"]


@given(labels.flatmap(lambda found: st.tuples(st.just(found), _groups(len(found)))))
def test_groups_stay_whole(drawn: tuple[list[int], list[int | None]]) -> None:
    found, groups = drawn
    splits = assign_splits(records(found, groups), val_fraction=0.2, test_fraction=0.2, seed=0)
    homes: dict[int, str] = {}
    for group, split in zip(groups, splits, strict=True):
        assert group is None or homes.setdefault(group, split) == split
    trained = {label for label, split in zip(found, splits, strict=True) if split == "train"}
    assert trained == set(found)


def _groups(count: int) -> st.SearchStrategy[list[int | None]]:
    return st.lists(st.none() | st.integers(0, 8), min_size=count, max_size=count)


def test_groups_come_near_the_fractions() -> None:
    found = [index % 4 for index in range(1000)]
    groups: list[int | None] = [index // 8 for index in range(1000)]
    splits = assign_splits(records(found, groups), val_fraction=0.1, test_fraction=0.2, seed=0)
    assert Counter(splits) == {"train": 704, "test": 200, "val": 96}


def test_a_split_of_few_large_groups_is_not_empty() -> None:
    groups: list[int | None] = [index // 10 for index in range(60)]
    splits = assign_splits(
        records([0] * 30 + [1] * 30, groups), val_fraction=0.1, test_fraction=0.2, seed=0
    )
    assert set(splits) == {"train", "val", "test"}


def test_a_group_with_the_last_images_of_a_class_is_trained_on() -> None:
    found = [0, 1, 1] + [1] * 17  # the one image of class 0 lies in a group the test split wants
    groups: list[int | None] = [0, 0, 0, *range(1, 18)]
    splits = assign_splits(records(found, groups), val_fraction=0.1, test_fraction=0.2, seed=0)
    assert splits[0] == "train"


def test_a_group_torn_by_the_source_is_an_error() -> None:
    torn = [
        ImageRecord(index=index, image_id=split, label=0, split=split, group="patient 7")
        for index, split in enumerate(("train", "test"))
    ]
    with pytest.raises(UsageError, match="group 'patient 7' is in train and in test"):
        assign_splits(torn, val_fraction=0.1, test_fraction=0.2, seed=0)


@given(labels, st.integers(1, 60), st.integers(0, 5))
def test_drawing_is_even_and_never_too_much(found: list[int], limit: int, seed: int) -> None:
    own = records(found)
    splits = assign_splits(own, val_fraction=0.2, test_fraction=0.2, seed=seed)
    if limit < len(set(found)):
        with pytest.raises(UsageError, match="too small"):
            draw_subset(own, splits, limit, seed)
        return
    chosen = draw_subset(own, splits, limit, seed)
    assert len(chosen) == len(set(chosen)) == min(limit, len(found))
    assert {found[i] for i in chosen if splits[i] == "train"} == set(found)
    whole = Counter(zip(splits, found, strict=True))
    cells = Counter((splits[i], found[i]) for i in chosen)
    short = [cells[cell] for cell in whole if cells[cell] < whole[cell]]
    assert not short or max(cells.values()) <= min(short) + 1
