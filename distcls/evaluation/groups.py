"""Figures of groups of images: those of each value of a column of the manifest.

A column of many different numbers is divided at its quantiles.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from distcls import log
from distcls.data.columns import LABELS, RESERVED
from distcls.data.dataset import Split
from distcls.data.source import is_missing
from distcls.errors import UsageError, did_you_mean, plain
from distcls.evaluation.intervals import resampled_means, wilson
from distcls.evaluation.outputs import Outputs
from distcls.task import BLANK_SHOWN, Integers

if TYPE_CHECKING:
    import pyarrow as pa

Floats = np.typing.NDArray[np.float64]

MOST_GROUPS = 1000
MOST_NUMBERS, BINS = 30, 10
"""More different numbers than the first are divided into so many groups."""
NO_COLUMNS = ("image_id", "path", "offset", "split", LABELS)
"""Columns whose values make no groups."""
NAMES = ("label", "group")
"""Columns whose numbers are names."""
NO_VALUE = "(no value)"
"""The group of the images without a value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The images with one value of a column, or with the values of one range."""

    value: str
    """The value, or `LEAST to GREATEST`; `(no value)` of images without one."""
    count: int
    """Images."""
    top1: float
    """Fraction of the decisions that are right."""
    low: float
    """Of the 95 % interval of `top1`."""
    high: float
    loss: float
    """Mean cross-entropy in nats."""


def find_column(split: Split, name: str, bins: int | None) -> str:
    """The column of the manifest that `name` means, in whatever case.

    Raises UsageError unless there is one with few values, or with numbers if there are `bins`.
    """
    columns = [column for column in split.table.column_names if column not in NO_COLUMNS]
    filled = [c for c in columns if split.table.column(c).null_count < len(split)]
    if not split.task.single:
        filled = [*(head.name for head in split.task.heads), *(c for c in filled if c != "label")]
    lowered = {column.lower(): column for column in filled}
    found = name if name in filled else lowered.get(name.strip().lower())
    if found is None and name.strip().lower() in RESERVED.difference(NO_COLUMNS) | {LABELS}:
        raise UsageError(
            f"by: {plain(name)!r} is a name that distcls uses, and distcls prepare leaves such a "
            "column out; rename it in the manifest"
        )
    if found is None:
        raise UsageError(
            f"by: the manifest has no column {plain(name)!r} that makes groups"
            f"{did_you_mean(name, [plain(column) for column in filled])}; distcls prepare says "
            "which columns it keeps"
        )
    column = _column(split, found)
    numbers = None if found in NAMES else _numbers(column)
    if numbers is None and bins:
        raise UsageError(f"bins: {bins} is for numbers, and {found!r} has none")
    values = len(column.unique())
    if values > MOST_GROUPS and (numbers is None or bins == 0):
        raise UsageError(
            f"by: {found!r} has {values:,} values, at most {MOST_GROUPS:,} make groups"
        )
    return found


def groups_of(
    outputs: Outputs, split: Split, name: str | None, bins: int | None
) -> tuple[Group, ...]:
    """The groups of a column that `find_column` found, the least accurate first, ranges of numbers,
    and with 0 `bins` numbers, in their order; none without a column."""
    if name is None:
        return ()
    column = _column(split, name)
    numbers = None if name in NAMES else _numbers(column)
    codes, names = _by_value(column) if numbers is None else _by_number(column, numbers)
    if name == "label" and split.task.single:
        names = [split.task.classes[int(value)] for value in names]
    many = numbers is not None and len(names) > MOST_NUMBERS
    ranges = numbers is not None and (many if bins is None else bins > 0)
    if ranges:
        assert numbers is not None
        codes, names = _by_range(numbers, bins or BINS)
        if bins is None:
            log.say(
                f"by: {name!r} has many different numbers, which are divided into "
                f"{log.counted(len(names), 'range')} of about as many images each; --bins sets "
                "their number, 0 none"
            )
    names = [*names, NO_VALUE]
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(-1, len(names)))
    found = [
        _group(outputs, names[code], order[starts[code + 1] : starts[code + 2]])
        for code in (*range(len(names) - 1), -1)
        if starts[code + 2] > starts[code + 1]
    ]
    in_order = ranges or (numbers is not None and bins == 0)
    return tuple(found if in_order else sorted(found, key=lambda group: group.top1))


def _column(split: Split, name: str) -> pa.ChunkedArray:
    """A column of the manifest, or the classes of a head."""
    import pyarrow as pa

    for place, head in enumerate(split.task.heads):
        if head.name == name:
            classes = pa.array([each or BLANK_SHOWN for each in head.classes])
            codes = pa.array(split.labels[:, place].astype(np.int32))
            return pa.chunked_array([pa.DictionaryArray.from_arrays(codes, classes)])
    return split.table.column(name)


def _by_value(column: pa.ChunkedArray) -> tuple[Integers, list[Any]]:
    """The place of each image's value among the different ones, -1 without one, which a blank text
    is; and these, as texts in order."""
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    coded = column.unify_dictionaries().combine_chunks()
    coded = coded if isinstance(coded, pa.DictionaryArray) else pa.concat_arrays(coded.chunks)
    values = coded.dictionary.to_pylist()
    codes = np.asarray(coded.indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
    known = [place for place, value in enumerate(values) if str(value).strip()]
    order = sorted(known, key=lambda place: values[place])
    ranks = np.full(len(values) + 1, -1)
    ranks[order] = np.arange(len(order))
    return ranks[codes], [str(values[place]) for place in order]


def _by_number(column: pa.ChunkedArray, numbers: Floats) -> tuple[Integers, list[Any]]:
    """The same of a column of numbers, in their order; texts of one number, 1 and 1.0, are one."""
    codes, texts = _by_value(column)
    known = ~np.isnan(numbers)
    _, first, places = np.unique(numbers[known], return_index=True, return_inverse=True)
    found = np.full(len(numbers), -1)
    found[known] = places
    return found, [texts[code].strip() for code in codes[known][first].tolist()]


def _numbers(column: pa.ChunkedArray) -> Floats | None:
    """The numbers of a column, NaN where there is none; None of a column of anything else. Texts
    that are numbers all count as such."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_boolean(kind):
        return None
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), np.float64)
    codes, texts = _by_value(column)
    numbers = [_number(text) for text in texts]
    if not numbers or None in numbers:
        return None
    return np.array([*numbers, math.nan], np.float64)[codes]


def _number(text: str) -> float | None:
    """NaN of a text that stands for a missing value; None of one that is no number, such as a
    number of a patient, 007."""
    if is_missing(text.strip()):
        return math.nan
    digits = text.strip().lstrip("+-")
    if not digits[:1].isdecimal() or (digits[:1] == "0" and digits[1:2].isdecimal()):
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _by_range(numbers: Floats, bins: int) -> tuple[Integers, list[str]]:
    """The range of each number, -1 without one, and the names of the ranges: as even as equal
    numbers, which stay together, allow."""
    known = np.sort(numbers[~np.isnan(numbers)])
    if not len(known):
        return np.full(len(numbers), -1), []
    places = len(known) * np.arange(1, bins) // bins
    edges = np.unique(known[places])
    edges = edges[edges > known[0]]
    codes = np.searchsorted(edges, numbers, "right")
    starts = [0, *np.searchsorted(known, edges, "left").tolist(), len(known)]
    whole = bool((known == np.trunc(known)).all()) and abs(known).max() < 2**53
    names = [
        _range(known[start], known[stop - 1], whole) for start, stop in itertools.pairwise(starts)
    ]
    return np.where(np.isnan(numbers), -1, codes), names


def _range(low: float, high: float, whole: bool) -> str:
    ends = [f"{int(end)}" if whole else f"{end:.6g}" for end in (low, high)]
    return ends[0] if low == high else " to ".join(ends)


def _group(outputs: Outputs, value: str, places: Integers) -> Group:
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
