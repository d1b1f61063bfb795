"""The column `labels` of a manifest: an image's class in each head, or the labels it is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distcls.errors import UsageError
from distcls.targets import Targets

LABELS = "labels"
FIELD = pa.field(LABELS, pa.list_(pa.int32()), nullable=False)


def read_labels(table: pa.Table, targets: Targets, where: Path) -> NDArray[np.int64]:
    """Class in each head, int64 [N, heads]; or 0 and 1 for each label, int64 [N, labels].

    Raises UsageError, naming `where` and the image, for numbers that are no class and for rows of
    the wrong length.
    """
    column = table.column(LABELS)
    if not pa.types.is_list(column.type) or column.null_count:
        raise UsageError(f"{where}: column {LABELS!r} holds {column.type}, expected lists, no null")
    lengths = np.asarray(pc.list_value_length(column).to_numpy(), np.int64)
    flat = np.asarray(pc.list_flatten(column).to_numpy(), np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    heads = len(targets.heads)
    if heads and (lengths != heads).any():
        row = int(np.flatnonzero(lengths != heads)[0])
        raise UsageError(f"{_name(table, row, where)} {lengths[row]} labels for {heads} heads")
    places = np.arange(len(flat)) % heads if heads else np.zeros(len(flat), np.int64)
    limits = np.array([part.stop - part.start for part in targets.slices])[places]
    bad = np.flatnonzero((flat < 0) | (flat >= limits))
    if len(bad):
        row, label = int(rows[bad[0]]), int(flat[bad[0]])
        raise UsageError(f"{_name(table, row, where)} label {label}, which is no class")
    if heads:
        return flat.reshape(-1, heads)
    given = np.zeros((len(lengths), len(targets.classes)), np.int64)
    given[rows, flat] = 1
    return given


def first_label(labels: Sequence[int]) -> int:
    """What stands for an image of several answers where one is wanted: the first, or -1."""
    return labels[0] if labels else -1


def _name(table: pa.Table, row: int, where: Path) -> str:
    return f"{where}: {table.column('image_id')[row].as_py()!r} has"
