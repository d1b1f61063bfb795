"""What is going to be written: the chosen images of a source in their splits, and the checks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from distcls.data.resample import Resampling, resample
from distcls.data.sources.source import Record, Source
from distcls.data.split import SPLITS, assign_splits, draw
from distcls.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Images and the split of each, the splits one after the other: train, val, test."""

    records: list[Record]
    splits: list[str]

    def __len__(self) -> int:
        return len(self.records)

    def take(self, positions: Sequence[int]) -> Plan:
        """The plan for some of its images."""
        return Plan(
            records=[self.records[i] for i in positions],
            splits=[self.splits[i] for i in positions],
        )


def plan_splits(
    source: Source,
    *,
    val_fraction: float,
    test_fraction: float,
    limit: int | None,
    seed: int,
    resampling: Resampling | None = None,
) -> Plan:
    """Put each image into a split and take at most `limit`.

    With `resampling`, which divides the images taken for training, `val_fraction` has to be 0.
    Raises UsageError if a class cannot be trained on, or if the source chose its validation images.
    """
    records = source.records
    if resampling is not None:
        _check_no_validation(source, resampling)
    splits = assign_splits(
        records, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed
    )
    plan = Plan(records=records, splits=splits)
    check_training_images(plan, source)
    chosen = list(range(len(records)))
    if limit is not None and limit < len(records):
        chosen = draw(records, splits, limit, seed)
    plan = plan.take(chosen)
    if resampling is not None:
        # after the limit: the folds of a limited dataset are all of it, too
        divided = resample(plan.records, plan.splits, resampling, seed=seed, classes=source.classes)
        plan = Plan(records=divided[0], splits=divided[1])
        check_training_images(plan, source)
    # a stable sort: within a split the source's order stays
    return plan.take(sorted(range(len(plan)), key=lambda index: SPLITS.index(plan.splits[index])))


def _check_no_validation(source: Source, resampling: Resampling) -> None:
    if any(record.split == "val" for record in source.records):
        key = "folds" if resampling.bootstrap is None else "bootstrap"
        raise UsageError(
            f"{key}: {source.location} has a validation split of its own; make its images training "
            "images, or leave the option out"
        )


def check_training_images(plan: Plan, source: Source) -> None:
    """Raise UsageError, naming the class, unless every class has a training image.

    Of several answers not each can have one, such as a rare letter at each place of a text: there
    it is enough that some image trains (see `unlearnt`).
    """
    if source.targets is not None:
        if "train" not in plan.splits:
            raise UsageError(f"{source.location}: there are no training images")
        return
    pairs = zip(plan.records, plan.splits, strict=True)
    trained = {record.label for record, split in pairs if split == "train"}
    found = Counter(record.label for record in plan.records)
    for label, name in enumerate(source.classes):
        if label not in trained:
            others = f"; its {found[label]} lie in val or test" if found[label] else ""
            raise UsageError(f"{source.location}: class {name!r} has no training images{others}")


def unlearnt(plan: Plan, source: Source) -> list[str]:
    """Names of the classes without a training image: nothing can be learnt of them."""
    seen: set[int] = set()
    for record, split in zip(plan.records, plan.splits, strict=True):
        if split == "train":
            seen.update(source.positions(record))
    return [name for place, name in enumerate(source.classes) if place not in seen]


def repair(plan: Plan) -> Plan:
    """Give a class whose training images all proved bad one back from the splits cut here.

    Its whole group comes along. What the source itself put into val or test stays there.
    """
    splits = list(plan.splits)
    trained = {r.label for r, split in zip(plan.records, splits, strict=True) if split == "train"}
    for index, record in enumerate(plan.records):
        if record.label in trained or record.split == splits[index]:
            continue
        for other, mate in enumerate(plan.records):
            if other == index or (record.group is not None and mate.group == record.group):
                splits[other] = "train"
                trained.add(mate.label)
    return Plan(records=plan.records, splits=splits)
