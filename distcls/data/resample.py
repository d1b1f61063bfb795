"""Folds and bootstrap samples of the training images: by class, by group, by seed."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from distcls.data.sources.source import Record
from distcls.errors import UsageError, require

FOLDS_STREAM, BOOTSTRAP_STREAM = 2, 3
"""Which random numbers of the seed; 0 and 1 are those of `distcls.data.split`."""

Units = list[list[int]]
"""Positions of images that stay together: those of a group, or one without a group alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resampling:
    """Which images of the training part train, and which validate."""

    folds: int = 1
    """The part is cut into so many; `fold`, counted from 1, validates."""
    fold: int = 1
    bootstrap: int | None = None
    """Or: the number of a bootstrap sample; the images that it leaves out validate."""


def require_one_rule(
    folds: int | None, fold: int | None, bootstrap: int | None, val_fraction: float | None
) -> None:
    """Raise BadValue unless these options say in one way which images validate."""
    require(folds is None or folds >= 2, "folds", folds, "at least 2")
    if folds is None:
        require(fold is None, "fold", fold, "nothing without folds, which says of how many")
    else:
        inside = fold is not None and 1 <= fold <= folds
        require(inside, "fold", fold, f"1 to {folds} (folds), the one that is for validation")
        alone = "nothing with folds: either those or the images never drawn are for validation"
        require(bootstrap is None, "bootstrap", bootstrap, alone)
    require(bootstrap is None or bootstrap >= 1, "bootstrap", bootstrap, "at least 1")
    if folds is not None or bootstrap is not None:
        what = "the fold is" if folds is not None else "the images never drawn are"
        taken = f"nothing with {'folds' if folds is not None else 'bootstrap'}: {what} validation"
        require(val_fraction is None, "val_fraction", val_fraction, taken)


def resample(
    records: Sequence[Record],
    splits: Sequence[str],
    how: Resampling,
    *,
    seed: int,
    classes: Sequence[str],
) -> tuple[list[Record], list[str]]:
    """Divide the images of `train` into train and val; in a bootstrap sample they get weights.

    Raises UsageError for more folds than there are images, or groups, to fill them, and for a class
    that one fold would take as a whole, whichever fold is asked for.
    """
    free = [index for index, split in enumerate(splits) if split == "train"]
    divided = list(splits)
    if how.bootstrap is None:
        fold_of = deal_folds(records, free, how.folds, seed)
        _check_classes(records, fold_of, classes)
        for index, fold in fold_of.items():
            divided[index] = "val" if fold == how.fold else "train"
        return list(records), divided
    counts = draw_bootstrap(records, free, how.bootstrap, seed)
    weighed = []
    for index, record in enumerate(records):
        # a number for all: a column of weights has no gaps
        weight = (1.0 if record.weight is None else record.weight) * (counts.get(index) or 1)
        weighed.append(dataclasses.replace(record, weight=weight))
        if index in counts:
            divided[index] = "train" if counts[index] else "val"
    return weighed, divided


def deal_folds(
    records: Sequence[Record], free: Sequence[int], folds: int, seed: int
) -> dict[int, int]:
    """The fold, counted from 1, of each of the images `free` (positions in `records`).

    Without groups two folds differ by at most one image, and by at most one of each class. Groups
    stay whole, and the folds are then as even as they allow. Raises UsageError if there are too few
    images, or groups, for a fold to have any.
    """
    units = _units(records, free)
    if len(units) < folds:
        what = "images" if len(units) == len(free) else "groups (an image without one is its own)"
        raise UsageError(f"folds: {folds}, but there are only {len(units)} training {what}")
    order = np.random.default_rng([seed, FOLDS_STREAM]).permutation(len(units)).tolist()
    units = [units[place] for place in order]
    if len(units) == len(free):
        units.sort(key=lambda unit: records[unit[0]].label)
        dealt = [place % folds for place in range(len(units))]
    else:
        units.sort(key=len, reverse=True)
        dealt = _deal_groups(records, units, folds)
    return {index: fold + 1 for unit, fold in zip(units, dealt, strict=True) for index in unit}


def draw_bootstrap(
    records: Sequence[Record], free: Sequence[int], number: int, seed: int
) -> dict[int, int]:
    """How often each of the images `free` is drawn: as many with replacement as there are.

    A class is drawn from by itself, so it keeps its share and at least one image; of n images about
    n / e, 36.8 %, are drawn never. Groups are drawn whole, with those that are mostly of the same
    class. (Efron: Bootstrap Methods, 1979; the stratified one.)
    """
    strata: dict[int, Units] = defaultdict(list)
    for unit in _units(records, free):
        labels = Counter(records[index].label for index in unit)
        strata[min(labels, key=lambda label: (-labels[label], label))].append(unit)
    rng = np.random.default_rng([seed, BOOTSTRAP_STREAM, number])
    counts: dict[int, int] = {}
    for label in sorted(strata):
        units = strata[label]
        drawn = np.bincount(rng.integers(len(units), size=len(units)), minlength=len(units))
        for unit, count in zip(units, drawn.tolist(), strict=True):
            counts.update(dict.fromkeys(unit, count))
    return counts


def _check_classes(
    records: Sequence[Record], fold_of: dict[int, int], classes: Sequence[str]
) -> None:
    """Raise UsageError if a class lies in one fold: while that validates, no other has any."""
    homes: dict[int, set[int]] = defaultdict(set)
    for index, fold in fold_of.items():
        if records[index].labels is None:  # of several answers, one is not the image's class
            homes[records[index].label].add(fold)
    for label in sorted(homes):
        if len(homes[label]) == 1:
            [fold] = homes[label]
            raise UsageError(
                f"folds: class {classes[label]!r} lies in fold {fold} alone, which could not be "
                "validated: a class needs two training images, in two groups where there are some"
            )


def _units(records: Sequence[Record], free: Sequence[int]) -> Units:
    units: dict[object, list[int]] = defaultdict(list)
    for index in free:  # a position is no text, so it cannot be taken for a group
        group = records[index].group
        units[index if group is None else group].append(index)
    return list(units.values())


def _deal_groups(records: Sequence[Record], units: Units, folds: int) -> list[int]:
    """The fold of each unit, greedily: where it fills most of what its classes lack."""
    total = Counter(records[index].label for unit in units for index in unit)
    # all in images times `folds`, so that a class's goal in each fold is a whole number: its total
    filled: list[Counter[int]] = [Counter() for _ in range(folds)]
    sizes = [0] * folds
    dealt = []
    for unit in units:
        labels = Counter(records[index].label for index in unit)
        gains = [_gain(total, filled[fold], labels, folds) for fold in range(folds)]
        # of equal ones the smallest: an empty fold is never passed over for a fuller one
        best = max(range(folds), key=lambda fold: (gains[fold], -sizes[fold]))
        for label, count in labels.items():
            filled[best][label] += count * folds
        sizes[best] += len(unit)
        dealt.append(best)
    return dealt


def _gain(goal: Counter[int], filled: Counter[int], labels: Counter[int], folds: int) -> int:
    """How much nearer these images would bring a fold to its goal."""
    gain = 0
    for label, count in labels.items():
        lack = goal[label] - filled[label]
        gain += abs(lack) - abs(lack - count * folds)
    return gain
