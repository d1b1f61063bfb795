"""Which image goes to train, val or test: hold-out, folds and bootstrap samples.

Not scikit-learn's splitters: `StratifiedGroupKFold` has no hold-out by fractions, none of them
keeps a training image of every class, and their draws are not promised to stay the same between
versions, where a dataset prepared again has to come out the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from distcls.data.hash_split import content_of, cut_by_hash
from distcls.data.source import SPLITS, ImageRecord, LabelledImages
from distcls.errors import UsageError, require, shown


def assign_splits(
    records: Sequence[ImageRecord],
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    content: Sequence[bytes] | None = None,
) -> list[str]:
    """The split of each record.

    The source's own splits stay as they are. Those it lacks are cut from its training images, the
    same fraction of each class (rounded to the nearest, at least one image where the class has
    enough); a class always keeps a training image, unless `test_fraction` is 1: then all images
    without a split of their own are for testing. With the `content` of each image, a digest, that
    alone decides (see `cut_by_hash`). Raises UsageError if the source's splits divide a group.
    """
    given = {record.split for record in records} - {None}
    fractions = {
        split: fraction
        for split, fraction in (("test", test_fraction), ("val", val_fraction))
        if split not in given and 0 < fraction < 1
    }
    splits = [record.split or ("test" if test_fraction == 1 else "train") for record in records]
    _check_groups(records, splits)
    training = [index for index, split in enumerate(splits) if split == "train"]
    if content is not None:
        chosen = cut_by_hash(records, training, fractions, seed=seed, content=content)
    elif any(records[index].group is not None for index in training):
        chosen = _cut_groups(records, training, fractions, seed)
    else:
        chosen = _cut(records, training, fractions, seed)
    for index, split in chosen.items():
        splits[index] = split
    return splits


def draw_subset(
    records: Sequence[ImageRecord], splits: Sequence[str], limit: int, seed: int
) -> list[int]:
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


def split_sizes(count: int, fractions: dict[str, float]) -> dict[str, int]:
    """How many of a class's `count` images each split gets; training keeps at least one.

    Of two images one validates: without it the best epoch would be chosen without the class.

    >>> split_sizes(2, {"test": 0.2, "val": 0.1})
    {'test': 0, 'val': 1}
    """
    left = count - 1
    if left == 1 and "val" in fractions:
        return {**dict.fromkeys(fractions, 0), "val": 1}
    counts = {}
    for split, fraction in fractions.items():
        counts[split] = min(left, max(1, math.floor(count * fraction + 0.5)))
        left -= counts[split]
    if left == 0 and counts.get("test", 0) > 1 and counts.get("val") == 0:
        counts["test"] -= 1  # large fractions of few images: each split gets one first
        counts["val"] = 1
    return counts


def _cut(
    records: Sequence[ImageRecord], training: list[int], fractions: dict[str, float], seed: int
) -> dict[int, str]:
    by_class: dict[int, list[int]] = defaultdict(list)
    for index in training:
        by_class[records[index].label].append(index)
    rng = np.random.default_rng([seed, 0])
    chosen: dict[int, str] = {}
    for label in sorted(by_class):
        shuffled = rng.permutation(by_class[label]).tolist()
        start = 0
        for split, count in split_sizes(len(shuffled), fractions).items():
            chosen.update(dict.fromkeys(shuffled[start : start + count], split))
            start += count
    return chosen


def _cut_groups(
    records: Sequence[ImageRecord], training: list[int], fractions: dict[str, float], seed: int
) -> dict[int, str]:
    """Whole groups, greedily: large ones first, each to the split that comes nearer its goal."""
    groups: dict[object, list[int]] = defaultdict(list)
    for index in training:  # an image without a group forms its own
        group = records[index].group
        groups[index if group is None else group].append(index)
    units = list(groups.values())
    order = np.random.default_rng([seed, 0]).permutation(len(units)).tolist()
    units = sorted((units[i] for i in order), key=len, reverse=True)
    left = Counter(records[index].label for index in training)
    missing: dict[str, Counter[int]] = {split: Counter() for split in fractions}
    for label, count in left.items():
        for split, number in split_sizes(count, fractions).items():
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


def _check_groups(records: Sequence[ImageRecord], splits: Sequence[str]) -> None:
    home: dict[str, str] = {}
    for record, split in zip(records, splits, strict=True):
        if record.group is not None and home.setdefault(record.group, split) != split:
            raise UsageError(
                f"group {shown(record.group, 60)} is in {home[record.group]} and in {split} "
                f"({shown(record.image_id, 60)}); a group must be in one split, or drop one of the "
                "columns"
            )


FOLDS_STREAM, BOOTSTRAP_STREAM = 2, 3
"""Which random numbers of the seed; 0 and 1 are those of `distcls.data.split`."""

Units = list[list[int]]
"""Indices of images that stay in one split: those of a group, or a single one without a group."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resampling:
    """Which of the training images train, and which validate."""

    folds: int = 1
    """Number of folds; `fold`, counted from 1, validates."""
    fold: int = 1
    bootstrap: int | None = None
    """Or: the number of a bootstrap sample; the images not in it validate."""


def require_one_way(
    folds: int | None, fold: int | None, bootstrap: int | None, val_fraction: float | None
) -> None:
    """Raise BadValue unless exactly one of these options chooses the validation images."""
    require(folds is None or folds >= 2, "folds", folds, "at least 2")
    if folds is None:
        require(fold is None, "fold", fold, "null without folds")
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
    records: Sequence[ImageRecord],
    splits: Sequence[str],
    how: Resampling,
    *,
    seed: int,
    classes: Sequence[str],
) -> tuple[list[ImageRecord], list[str]]:
    """Divide the images of `train` into train and val; in a bootstrap sample they get weights.

    Raises UsageError for more folds than there are images, or groups, to fill them, and for a class
    that one fold would take as a whole, whichever fold validates.
    """
    training = [index for index, split in enumerate(splits) if split == "train"]
    divided = list(splits)
    if how.bootstrap is None:
        fold_of = assign_folds(records, training, how.folds, seed)
        _check_classes(records, fold_of, classes)
        for index, fold in fold_of.items():
            divided[index] = "val" if fold == how.fold else "train"
        return list(records), divided
    counts = draw_bootstrap(records, training, how.bootstrap, seed)
    weighed = []
    for index, record in enumerate(records):
        # a number for all: a column of weights has no gaps
        weight = (1.0 if record.weight is None else record.weight) * (counts.get(index) or 1)
        weighed.append(dataclasses.replace(record, weight=weight))
        if index in counts:
            divided[index] = "train" if counts[index] else "val"
    return weighed, divided


def assign_folds(
    records: Sequence[ImageRecord], training: Sequence[int], folds: int, seed: int
) -> dict[int, int]:
    """The fold, counted from 1, of each of the images `training` (positions in `records`).

    Without groups two folds differ by at most one image, and by at most one of each class. Groups
    stay whole, and the folds are then as even as they allow. Raises UsageError if there are too few
    images, or groups, for a fold to have any.
    """
    units = _units(records, training)
    if len(units) < folds:
        what = (
            "images" if len(units) == len(training) else "groups (an image without one is its own)"
        )
        raise UsageError(f"folds: {folds}, but there are only {len(units)} training {what}")
    order = np.random.default_rng([seed, FOLDS_STREAM]).permutation(len(units)).tolist()
    units = [units[place] for place in order]
    if len(units) == len(training):
        units.sort(key=lambda unit: records[unit[0]].label)
        folds_of_units = [place % folds for place in range(len(units))]
    else:
        units.sort(key=len, reverse=True)
        folds_of_units = _assign_groups(records, units, folds)
    return {
        index: fold + 1 for unit, fold in zip(units, folds_of_units, strict=True) for index in unit
    }


def draw_bootstrap(
    records: Sequence[ImageRecord], training: Sequence[int], number: int, seed: int
) -> dict[int, int]:
    """How often each of the images `training` is drawn: as many with replacement as there are.

    Each class is sampled separately, so it keeps its size and at least one image; of n images about
    n / e, 36.8 %, are never drawn. Groups are drawn whole, with those that are mostly of the same
    class. (Efron: Bootstrap Methods, 1979; the stratified one.)
    """
    strata: dict[int, Units] = defaultdict(list)
    for unit in _units(records, training):
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
    records: Sequence[ImageRecord], fold_of: dict[int, int], classes: Sequence[str]
) -> None:
    """Raise UsageError if a class lies in one fold: while that validates, no other has any."""
    homes: dict[int, set[int]] = defaultdict(set)
    for index, fold in fold_of.items():
        if records[index].labels is None:  # multi-output: `label` is not the image's class
            homes[records[index].label].add(fold)
    for label in sorted(homes):
        if len(homes[label]) == 1:
            [fold] = homes[label]
            raise UsageError(
                f"folds: class {classes[label]!r} is in fold {fold} only and cannot be "
                "cross-validated: a class needs two training images, in two groups if any"
            )


def _units(records: Sequence[ImageRecord], training: Sequence[int]) -> Units:
    units: dict[object, list[int]] = defaultdict(list)
    for index in training:  # a position is no text, so it cannot be taken for a group
        group = records[index].group
        units[index if group is None else group].append(index)
    return list(units.values())


def _assign_groups(records: Sequence[ImageRecord], units: Units, folds: int) -> list[int]:
    """The fold of each unit, greedily: where it fills most of what its classes lack."""
    total = Counter(records[index].label for unit in units for index in unit)
    # all in images times `folds`, so that a class's goal in each fold is a whole number: its total
    filled: list[Counter[int]] = [Counter() for _ in range(folds)]
    sizes = [0] * folds
    folds_of_units = []
    for unit in units:
        labels = Counter(records[index].label for index in unit)
        gains = [_fold_gain(total, filled[fold], labels, folds) for fold in range(folds)]
        # of equal ones the smallest: an empty fold always precedes a fuller one
        best = max(range(folds), key=lambda fold: (gains[fold], -sizes[fold]))
        for label, count in labels.items():
            filled[best][label] += count * folds
        sizes[best] += len(unit)
        folds_of_units.append(best)
    return folds_of_units


def _fold_gain(goal: Counter[int], filled: Counter[int], labels: Counter[int], folds: int) -> int:
    """How much nearer these images would bring a fold to its goal."""
    gain = 0
    for label, count in labels.items():
        lack = goal[label] - filled[label]
        gain += abs(lack) - abs(lack - count * folds)
    return gain


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitAssignment:
    """Images and the split of each, the splits one after the other: train, val, test."""

    records: list[ImageRecord]
    splits: list[str]

    def __len__(self) -> int:
        return len(self.records)

    def take(self, positions: Sequence[int]) -> SplitAssignment:
        """The assignment for some of its images."""
        return SplitAssignment(
            records=[self.records[i] for i in positions],
            splits=[self.splits[i] for i in positions],
        )


def repeated_in_training(
    assignment: SplitAssignment, digests: Mapping[str, bytes]
) -> dict[str, list[tuple[str, str]]]:
    """Images of the other splits that are also in training: their ids, and those there.

    `digests` are of the images' pixels, by id.
    """
    rows = [
        (split, record.image_id, digests[record.image_id])
        for split, record in zip(assignment.splits, assignment.records, strict=True)
    ]
    trained = {digest: name for split, name, digest in reversed(rows) if split == "train"}
    found: dict[str, list[tuple[str, str]]] = {}
    for split, name, digest in rows:
        if split != "train" and digest in trained:
            found.setdefault(split, []).append((name, trained[digest]))
    return found


def conflicts(labels: Mapping[str, object], digests: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Pairs of image ids with the same pixels and different labels: a later one and the first."""
    first: dict[bytes, str] = {}
    found = []
    for name, digest in digests.items():
        other = first.setdefault(digest, name)
        if labels[name] != labels[other]:
            found.append((name, other))
    return found


def split_images(
    source: LabelledImages,
    *,
    val_fraction: float,
    test_fraction: float,
    limit: int | None,
    seed: int,
    resampling: Resampling | None = None,
    by_hash: bool = False,
) -> SplitAssignment:
    """Put each image into a split and take at most `limit`.

    `by_hash` reads all images that are to be divided, and lets their content decide.
    With `resampling`, which divides the images taken for training, `val_fraction` has to be 0.
    Raises UsageError if a class cannot be trained on, or if the source chose its validation images.
    """
    records = source.records
    if resampling is not None:
        _check_no_validation(source, resampling)
    dividing = 0 < val_fraction < 1 or 0 < test_fraction < 1
    splits = assign_splits(
        records,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        content=content_of(source.source, records) if by_hash and dividing else None,
    )
    assignment = SplitAssignment(records=records, splits=splits)
    check_training_images(assignment, source)
    chosen = list(range(len(records)))
    if limit is not None and limit < len(records):
        chosen = draw_subset(records, splits, limit, seed)
    assignment = assignment.take(chosen)
    if resampling is not None:
        # after the limit: the folds of a limited dataset are all of it, too
        divided = resample(
            assignment.records, assignment.splits, resampling, seed=seed, classes=source.classes
        )
        assignment = SplitAssignment(records=divided[0], splits=divided[1])
        check_training_images(assignment, source)
    # a stable sort: within a split the source's order stays
    return assignment.take(
        sorted(range(len(assignment)), key=lambda index: SPLITS.index(assignment.splits[index]))
    )


def _check_no_validation(source: LabelledImages, resampling: Resampling) -> None:
    if any(record.split == "val" for record in source.records):
        key = "folds" if resampling.bootstrap is None else "bootstrap"
        raise UsageError(
            f"{key}: {source.location} has a validation split of its own; make its images training "
            "images, or leave the option out"
        )


def check_training_images(assignment: SplitAssignment, source: LabelledImages) -> None:
    """Raise UsageError, naming the class, unless every class has a training image.

    A dataset for evaluation alone has none at all, as its source says (see `for_evaluation`).

    Multi-head and multi-label: not every class can have one, such as a rare letter at each position
    of a text; there it is enough that some image trains (see `untrained_classes`).
    """
    if for_evaluation(assignment):
        return
    if not source.task.single:
        if "train" not in assignment.splits:
            raise UsageError(f"{source.location}: there are no training images")
        return
    pairs = zip(assignment.records, assignment.splits, strict=True)
    trained = {record.label for record, split in pairs if split == "train"}
    found = Counter(record.label for record in assignment.records)
    for label, name in enumerate(source.classes):
        if label not in trained:
            count = found[label]
            those = "only image is" if count == 1 else f"{count:,} images are"
            others = f"; its {those} in val or test" if count else ""
            raise UsageError(f"{source.location}: class {name!r} has no training images{others}")


def for_evaluation(assignment: SplitAssignment) -> bool:
    """Whether all images are for testing: a later test set, which trains nothing."""
    return set(assignment.splits) == {"test"}


def untrained_classes(assignment: SplitAssignment, source: LabelledImages) -> list[str]:
    """Names of the classes without a training image: nothing can be learnt of them."""
    seen: set[int] = set()
    for record, split in zip(assignment.records, assignment.splits, strict=True):
        if split == "train":
            seen.update(source.positions(record))
    return [name for place, name in enumerate(source.classes) if place not in seen]


def restore_training_images(assignment: SplitAssignment) -> SplitAssignment:
    """Give a class whose training images all proved bad one back from the splits cut here.

    Its whole group moves with it. Images that the source itself put into val or test stay there.
    """
    splits = list(assignment.splits)
    trained = {
        r.label for r, split in zip(assignment.records, splits, strict=True) if split == "train"
    }
    for index, record in enumerate(assignment.records):
        if record.label in trained or record.split == splits[index]:
            continue
        for other, mate in enumerate(assignment.records):
            if other == index or (record.group is not None and mate.group == record.group):
                splits[other] = "train"
                trained.add(mate.label)
    return SplitAssignment(records=assignment.records, splits=splits)
