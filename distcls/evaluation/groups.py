"""Figures of groups of images: those of each value of a column of the manifest."""

from __future__ import annotations

import dataclasses

import numpy as np

from distcls.data.dataset import LABELS, Split
from distcls.errors import UsageError
from distcls.evaluation.intervals import resampled_means, wilson
from distcls.evaluation.outputs import Outputs

MOST_GROUPS = 1000
NO_COLUMNS = ("image_id", "path", "offset", "split", LABELS)
"""Columns whose values make no groups."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The images with one value of a column."""

    value: str
    """The value; empty where there is none."""
    count: int
    """Images."""
    top1: float
    """Fraction of the decisions that are right."""
    low: float
    """Of the 95 % interval of `top1`."""
    high: float
    loss: float
    """Mean cross-entropy in nats."""


def require_column(split: Split, name: str) -> None:
    """Raise UsageError unless the manifest has this column, with few values."""
    columns = [column for column in split.table.column_names if column not in NO_COLUMNS]
    filled = [c for c in columns if split.table.column(c).null_count < len(split)]
    if name not in filled:
        raise UsageError(f"by: the manifest has no column {name!r}; it has {', '.join(filled)}")
    values = len(split.table.column(name).unique())
    if values > MOST_GROUPS:
        raise UsageError(f"by: {name!r} has {values:,} values, at most {MOST_GROUPS:,} make groups")


def groups_of(outputs: Outputs, split: Split, name: str | None) -> tuple[Group, ...]:
    """The groups of a column, the least accurate first; none without a column."""
    if name is None:
        return ()
    values = split.table.column(name).to_pylist()
    if name == "label" and split.task.single:
        values = [split.task.classes[label] for label in values]
    texts = np.array(["" if value is None else str(value) for value in values], object)
    found = [_group(outputs, value, np.flatnonzero(texts == value)) for value in sorted(set(texts))]
    return tuple(sorted(found, key=lambda group: group.top1))


def _group(outputs: Outputs, value: str, places: np.typing.NDArray[np.int64]) -> Group:
    hits = outputs.hits[places].mean(axis=1)
    if outputs.task.single:
        low, high = wilson(float(hits.sum()), len(hits))
    else:
        ends = np.quantile(resampled_means(hits[:, None])[:, 0], [0.025, 0.975])
        low, high = ends.tolist()
    return Group(
        value=value,
        count=len(places),
        top1=float(hits.mean()),
        low=low,
        high=high,
        loss=float(outputs.loss[places].mean()),
    )
