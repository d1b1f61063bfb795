"""Splits by content: images that join or leave move no other."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from distcls.data.prepare import PrepareOptions, prepare
from distcls.data.source import ImageRecord
from distcls.data.split import assign_splits
from tests.sources import labels, records, tree


def contents(count: int, salt: int = 0) -> list[bytes]:
    return [hashlib.md5(f"{salt} {number}".encode()).digest() for number in range(count)]


def divide(
    found: list[ImageRecord], content: list[bytes], val: float = 0.1, test: float = 0.2
) -> list[str]:
    return assign_splits(found, val_fraction=val, test_fraction=test, seed=0, content=content)


@given(labels, st.floats(0, 0.49), st.floats(0, 0.49), st.integers(0, 99))
def test_every_class_trains_and_validates(
    found: list[int], val: float, test: float, salt: int
) -> None:
    splits = divide(records(found), contents(len(found), salt), val, test)
    for label, count in Counter(found).items():
        got = {split for own, split in zip(found, splits, strict=True) if own == label}
        assert "train" in got
        assert not val or count < 2 or "val" in got
        assert not test or count < 3 or "test" in got


def test_added_images_move_none_and_fractions_are_near() -> None:
    found, content = [number % 4 for number in range(4000)], contents(4000)
    before = divide(records(found[:3900]), content[:3900])
    after = divide(records(found), content)
    assert after[:3900] == before
    assert 0.18 < before.count("test") / 3900 < 0.22
    assert 0.085 < before.count("val") / 3900 < 0.115
    larger = divide(records(found), content, test=0.3)
    assert {at for at, split in enumerate(after) if split == "test"} < {
        at for at, split in enumerate(larger) if split == "test"
    }


def test_copies_and_groups_are_in_one_split() -> None:
    found = [number % 3 for number in range(600)]
    content = contents(600)
    content[300:] = content[:300]
    splits = divide(records(found), content)
    assert splits[:300] == splits[300:]
    groups: list[int | None] = [number // 10 for number in range(600)]
    splits = divide(records(found, groups), contents(600))
    assert all(len(set(splits[at : at + 10])) == 1 for at in range(0, 600, 10))
    assert set(splits) == {"train", "val", "test"}


def splits_of(folder: Path) -> dict[str, str]:
    table = pq.read_table(folder / "manifest.parquet").to_pydict()
    return dict(zip(table["image_id"], table["split"], strict=True))


def test_a_folder_that_grows(tmp_path: Path) -> None:
    """No image changes its split when 100 are added, whatever their names are."""
    source = tree(tmp_path / "digits", 500, classes=4)
    prepare(PrepareOptions(source=str(source), out=tmp_path / "a", split_by="hash", quiet=True))
    before = splits_of(tmp_path / "a")
    tree(tmp_path / "more", 760, classes=4)
    for label in range(4):
        for path in sorted((tmp_path / "more" / str(label)).iterdir())[-25:]:
            path.rename(source / str(label) / f"0-{path.name}")
    prepare(PrepareOptions(source=str(source), out=tmp_path / "b", split_by="hash", quiet=True))
    after = splits_of(tmp_path / "b")
    assert len(after) == len(before) + 100
    assert {name: after[name] for name in before} == before
    assert json.loads((tmp_path / "b/dataset.json").read_text())["options"]["split_by"] == "hash"


def test_the_seed_draws_another_split(tmp_path: Path) -> None:
    source = tree(tmp_path / "digits", 200, classes=2)
    found = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(found)}"
        prepare(PrepareOptions(source=str(source), out=out, split_by="hash", seed=seed, quiet=True))
        found.append(splits_of(out))
    assert found[0] == found[1] != found[2]
