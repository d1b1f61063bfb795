"""Which image goes to train, val or test: by class, by group, by seed, nothing else."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from distcls.data.sources.source import Record
from distcls.errors import UsageError

SPLITS = ("train", "val", "test")


def assign_splits(
    records: Sequence[Record], *, val_fraction: float, test_fraction: float, seed: int
) -> list[str]:
    """The split of each record.

    The source's own splits stay as they are. Those it lacks are cut from its training images, the
    same fraction of each class (rounded to the nearest, at least one image where the class has
    enough); a class always keeps a training image. Raises UsageError if the source's splits tear
    a group apart.
    """
    given = {record.split for record in records} - {None}
    fractions = {
        split: fraction
        for split, fraction in (("test", test_fraction), ("val", val_fraction))
        if split not in given and fraction > 0
    }
    splits = [record.split or "train" for record in records]
    _check_groups(records, splits)
    free = [index for index, split in enumerate(splits) if split == "train"]
    if any(records[index].group is not None for index in free):
        chosen = _cut_groups(records, free, fractions, seed)
    else:
        chosen = _cut(records, free, fractions, seed)
    for index, split in chosen.items():
        splits[index] = split
    return splits


def draw(records: Sequence[Record], splits: Sequence[str], limit: int, seed: int) -> list[int]:
    """At most `limit` positions, in order, drawn evenly over splits and classes.

    One image of each class and split in turn, training first, until there are enough or none is
    left. Raises UsageError if not every class would have a training image.
    """
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (record, split) in enumerate(zip(records, splits, strict=True)):
        cells[SPLITS.index(split), record.label].append(index)
    classes = len({record.label for record in records})
    if limit < classes:
        raise UsageError(f"limit {limit} is too small: there are {classes} classes to train")
    rng = np.random.default_rng([seed, 1])
    shuffled = [rng.permutation(cells[key]).tolist() for key in sorted(cells)]
    chosen: list[int] = []
    for turn in range(max(map(len, shuffled))):
        chosen += [cell[turn] for cell in shuffled if turn < len(cell)]
        if len(chosen) >= limit:
            break
    return sorted(chosen[:limit])


def wanted(count: int, fractions: dict[str, float]) -> dict[str, int]:
    """How many of a class's `count` images each split gets; training keeps at least one.

    >>> wanted(2, {"test": 0.2, "val": 0.1})
    {'test': 1, 'val': 0}
    """
    left = count - 1
    counts = {}
    for split, fraction in fractions.items():
        counts[split] = min(left, max(1, math.floor(count * fraction + 0.5)))
        left -= counts[split]
    if left == 0 and counts.get("test", 0) > 1 and counts.get("val") == 0:
        counts["test"] -= 1  # large fractions of few images: each split gets one first
        counts["val"] = 1
    return counts


def _cut(
    records: Sequence[Record], free: list[int], fractions: dict[str, float], seed: int
) -> dict[int, str]:
    by_class: dict[int, list[int]] = defaultdict(list)
    for index in free:
        by_class[records[index].label].append(index)
    rng = np.random.default_rng([seed, 0])
    chosen: dict[int, str] = {}
    for label in sorted(by_class):
        shuffled = rng.permutation(by_class[label]).tolist()
        start = 0
        for split, count in wanted(len(shuffled), fractions).items():
            chosen.update(dict.fromkeys(shuffled[start : start + count], split))
            start += count
    return chosen


def _cut_groups(
    records: Sequence[Record], free: list[int], fractions: dict[str, float], seed: int
) -> dict[int, str]:
    """Whole groups, greedily: large ones first, each to the split that comes nearer its goal."""
    groups: dict[object, list[int]] = defaultdict(list)
    for index in free:  # an image without a group is one of its own
        group = records[index].group
        groups[index if group is None else group].append(index)
    units = list(groups.values())
    order = np.random.default_rng([seed, 0]).permutation(len(units)).tolist()
    units = sorted((units[i] for i in order), key=len, reverse=True)
    left = Counter(records[index].label for index in free)
    missing: dict[str, Counter[int]] = {split: Counter() for split in fractions}
    for label, count in left.items():
        for split, number in wanted(count, fractions).items():
            missing[split][label] = number
    chosen: dict[int, str] = {}

    def give(unit: list[int], split: str) -> None:
        labels = Counter(records[index].label for index in unit)
        left.subtract(labels)
        missing[split].subtract(labels)
        chosen.update(dict.fromkeys(unit, split))

    for unit in units:
        labels = Counter(records[index].label for index in unit)
        if any(left[label] <= count for label, count in labels.items()):
            continue  # the last training images of a class
        gains = {split: _gain(missing[split], labels) for split in fractions}
        best = max(gains, key=lambda split: gains[split], default=None)
        if best is not None and gains[best] > 0:
            give(unit, best)
    for split in [name for name in fractions if name not in set(chosen.values())]:
        # every group was too large for this small split: it gets the smallest that can be spared
        for unit in reversed(units):
            labels = Counter(records[index].label for index in unit)
            spare = all(left[label] > count for label, count in labels.items())
            if unit[0] not in chosen and spare:
                give(unit, split)
                break
    return chosen


def _gain(missing: Counter[int], labels: Counter[int]) -> int:
    """How much nearer a split comes to its goal with these images."""
    return sum(abs(missing[label]) - abs(missing[label] - count) for label, count in labels.items())


def _check_groups(records: Sequence[Record], splits: Sequence[str]) -> None:
    home: dict[str, str] = {}
    for record, split in zip(records, splits, strict=True):
        if record.group is not None and home.setdefault(record.group, split) != split:
            raise UsageError(
                f"group {record.group!r} lies in {home[record.group]} and in {split} "
                f"({record.image_id!r}); a group belongs to one split, or drop one of the columns"
            )
