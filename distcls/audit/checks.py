"""From what was seen of the images to findings: copies, odd images, classes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.audit.findings import Finding, Severity
from distcls.audit.near import Pair, near_pairs
from distcls.audit.scan import Scan
from distcls.data.source import ImageRecord, Rejected
from distcls.task import Task, same_names

FAVOUR = ("test", "val", "train")
"""Of copies in several splits the one in the first of these is kept."""
COPY = re.compile(r"\(\d+\)$|(^|[^a-z])(copy|copie|kopie|copia|dup|duplicate)([^a-z]|$)")
"""In a name without its ending, of what is probably the copy."""
FEW = 10
"""Training images of a class below which it is tiny."""
UNEVEN = 20
"""Size of the largest class, in those of the smallest, from which classes are unbalanced."""
BLANK = 2 / 255
"""Standard deviation of grey values up to which an image is blank."""
DARK, BRIGHT = 0.2, 0.85
"""An image is dark if its 99th percentile of grey is below, bright if its 5th is above."""
FEW_BITS = 0.5
"""Entropy of the grey values below which an image says little."""
BLURRED, SOFT = 0.004, 0.1
"""Sharpness below which an image is blurred, and below which it is if it is an outlier."""
OUTLIER = 3.5
"""Robust deviations from the median of the logarithms (Iglewicz, Hoaglin, 1993)."""
LEAST_SCALE = 0.15
"""Least robust standard deviation of logarithms: images that are all alike differ by 16 %."""
LONG = 4.0
"""Aspect ratio from which an image is long, if it is an outlier."""

Name = Callable[[int], str]


def image_findings(scanned: Scan, task: Task, rejected: Sequence[Rejected]) -> Iterator[Finding]:
    """All that is found without a model."""
    for row in rejected:
        yield Finding(kind="broken", severity="error", image=row.image_id, text=row.reason)
    tell = Teller(scanned.records, task)
    for at, reason in scanned.broken.items():
        yield tell(at, "broken", "error", reason)
    good = np.ones(len(scanned.records), bool)
    good[list(scanned.broken)] = False
    yield from duplicates(scanned, tell, good)
    yield from class_findings(scanned.records, task)
    yield from _odd(scanned, tell, np.flatnonzero(good))


class Teller:
    """Findings about images by position."""

    def __init__(self, records: Sequence[ImageRecord], task: Task) -> None:
        self.records, self.task = records, task
        # `--fix` renames labels, not the classes of heads
        groups = [] if task.heads else same_names(task.classes)
        self._meaning = {name: names[0] for names in groups for name in names}

    def same_label(self, at: int, other: int) -> bool:
        """Whether the labels of two images mean the same: names of one class are one label."""
        return self._meant(at) == self._meant(other)

    def _meant(self, at: int) -> object:
        if self.task.heads:
            return self.records[at].labels
        names = [self.task.classes[place] for place in self._places(at)]
        return {self._meaning.get(name, name) for name in names}

    def _places(self, at: int) -> list[int]:
        """The positions of an image's labels among all classes."""
        record = self.records[at]
        return [record.label] if self.task.single else self.task.flat(record.labels or ())

    def label(self, at: int) -> str:
        """The label of an image as a text."""
        return "|".join(self.task.classes[place] for place in self._places(at))

    def place(self, at: int) -> str:
        """An image and its split, for a text."""
        record = self.records[at]
        return f"{record.image_id!r}" + (f" in {record.split}" if record.split else "")

    def __call__(
        self,
        at: int,
        kind: str,
        severity: Severity,
        text: str,
        *,
        other: int | None = None,
        value: float | None = None,
    ) -> Finding:
        record = self.records[at]
        return Finding(
            kind=kind,
            severity=severity,
            text=text,
            position=at,
            image=record.image_id,
            split=record.split or "",
            label=self.label(at),
            related="" if other is None else self.records[other].image_id,
            related_position=other,
            value=value,
        )


def duplicates(scanned: Scan, tell: Teller, good: NDArray[np.bool_]) -> Iterator[Finding]:
    """Copies, exact and near ones. Each is named with the image that it repeats."""
    records = scanned.records
    opaque = scanned.table["transparent"] == 0
    kept = good.copy()
    for members in _alike(scanned.table["pixels"], np.flatnonzero(good)):
        # a flattened copy has lost its transparency
        members.sort(key=lambda at: (*_favour(records[at])[:1], opaque[at], _favour(records[at])))
        kept[members[1:]] = False
        for at in members[1:]:
            yield _copy(scanned, tell, at, members[0], members)
    pairs = near_pairs(scanned.thumbs, np.flatnonzero(kept))
    for at, other, score in _partners(pairs, records):
        yield _near_copy(tell, at, other, score)


def _alike(pixels: NDArray[np.bytes_], good: NDArray[np.int64]) -> list[list[int]]:
    """The images among `good` (positions) that have the digest of another one, by their digests;
    in the order of the first of each."""
    order = good[np.argsort(pixels[good], kind="stable")]
    starts = np.flatnonzero(pixels[order[1:]] != pixels[order[:-1]]) + 1
    sizes = np.diff(starts, prepend=0, append=len(order))
    groups = [
        order[start : start + size].tolist()
        for start, size in zip(np.append(0, starts)[sizes > 1], sizes[sizes > 1], strict=True)
    ]
    return sorted(groups)


def turned_copies(
    tell: Teller, pairs: Iterable[tuple[Pair, str]], known: Iterable[Finding]
) -> Iterator[Finding]:
    """Findings for turned and mirrored copies, but for images that are copies already."""
    taken = {each.position for each in known if each.related_position is not None}
    for pair, how in pairs:
        first, second = sorted(pair[:2], key=lambda at: (_favour(tell.records[at]), at))
        if second not in taken:
            taken.add(second)
            yield _near_copy(tell, second, first, pair.score, f" {how}")


def _favour(record: ImageRecord) -> tuple[int, bool, str]:
    """A key, the least of copies is kept: by its split, then that whose name is of no copy and
    comes first."""
    name = os.path.splitext(record.image_id)[0]  # noqa: PTH122 - an id is no path
    split = FAVOUR.index(record.split) if record.split in FAVOUR else len(FAVOUR)
    return split, COPY.search(name.lower()) is not None, name


def _copy(scanned: Scan, tell: Teller, at: int, first: int, members: list[int]) -> Finding:
    """The finding for one of several images with the same pixels."""
    file = scanned.table["file"]
    what = "the same file as" if file[at] and file[at] == file[first] else "the same pixels as"
    records = scanned.records
    differs = next((each for each in members if not tell.same_label(each, at)), None)
    if differs is not None:
        label = tell.label(differs)
        text = f"{what} {tell.place(differs)}, which is labelled {label!r}"
        return tell(at, "conflict", "error", text, other=differs)
    if records[at].split != records[first].split:
        text = f"{what} {tell.place(first)}: scores there will be too high"
        return tell(at, "leak", "error", text, other=first)
    return tell(at, "duplicate", "warning", f"{what} {tell.place(first)}", other=first)


def _partners(
    pairs: Iterable[Pair], records: Sequence[ImageRecord]
) -> list[tuple[int, int, float]]:
    """For each image that is nearly another's, the best of those that are kept rather than it."""
    best: dict[int, tuple[int, float]] = {}
    for pair in pairs:
        ends = sorted(pair[:2], key=lambda at: (_favour(records[at]), at))
        if ends[1] not in best or best[ends[1]][1] < pair.score:
            best[ends[1]] = (ends[0], pair.score)
    return [(at, *best[at]) for at in sorted(best)]


def _near_copy(tell: Teller, at: int, other: int, score: float, how: str = "") -> Finding:
    where = f"{tell.place(other)}{how}"
    if not tell.same_label(at, other):
        text = f"nearly the same picture as {where}, which is labelled {tell.label(other)!r}"
        return tell(at, "near_conflict", "warning", text, other=other, value=score)
    if tell.records[at].split != tell.records[other].split:
        text = f"nearly the same picture as {where}: scores there may be too high"
        return tell(at, "near_leak", "warning", text, other=other, value=score)
    text = f"nearly the same picture as {where}"
    return tell(at, "near_duplicate", "warning", text, other=other, value=score)


def class_findings(records: Sequence[ImageRecord], task: Task) -> Iterator[Finding]:
    """Names that mean one class, tiny and unbalanced classes."""
    yield from _named_twice(records, task)
    divided = any(record.split == "train" for record in records)
    counts: Counter[int] = Counter()
    for record in records:
        if record.split == "train" or not divided:
            counts.update([record.label] if record.labels is None else task.flat(record.labels))
    what = "training image" if divided else "image"
    for place, name in enumerate(task.classes):
        if counts[place] < FEW:
            number = log.counted(counts[place], what)
            text = f"{name!r} has {number}, fewer than {FEW}"
            yield Finding(
                kind="tiny_class", severity="warning", label=name, text=text, value=counts[place]
            )
    sizes = [(counts[place], name) for place, name in enumerate(task.classes)]
    least, most = min(sizes), max(sizes)
    if task.single and most[0] > UNEVEN * least[0]:
        text = (
            f"{most[1]!r} has {most[0]:,} {what}s, {least[1]!r} {least[0]:,}: see balanced "
            "sampling and class weights in docs/training-options.md"
        )
        yield Finding(kind="imbalance", severity="info", label=least[1], related=most[1], text=text)


def _named_twice(records: Sequence[ImageRecord], task: Task) -> Iterator[Finding]:
    """A finding for each class name but the most used one of those that mean one class."""
    groups = same_names(task.classes)
    if not groups:
        return
    sizes = Counter(
        task.classes[place]
        for record in records
        for place in ([record.label] if record.labels is None else task.flat(record.labels))
    )
    for names in groups:
        kept, *others = sorted(names, key=lambda name: -sizes[name])
        for name in others:
            text = f"{name!r} and {kept!r} differ in case, blanks or Unicode form only"
            yield Finding(kind="class_name", severity="error", label=name, related=kept, text=text)


def _odd(scanned: Scan, tell: Teller, good: NDArray[np.int64]) -> Iterator[Finding]:
    """Images that are hard to see anything on, or unlike the others in shape."""
    rows = scanned.table[good]
    blank = rows["spread"] <= BLANK
    dark = ~blank & (rows["brightest"] < DARK)
    bright = ~blank & (rows["darkest"] > BRIGHT)
    poor = ~blank & ~dark & ~bright & (rows["entropy"] < FEW_BITS)
    sharpness = rows["sharpness"]
    outlier = (sharpness < SOFT) & (_deviation(sharpness) < -OUTLIER)
    blurred = ~blank & ((sharpness < BLURRED) | outlier)
    area = rows["height"].astype(float) * rows["width"]
    size = np.abs(_deviation(area)) > 2 * OUTLIER
    ratio = rows["width"] / np.maximum(rows["height"], 1)
    long = (np.maximum(ratio, 1 / np.maximum(ratio, 1e-9)) > LONG) & (
        np.abs(_deviation(ratio)) > OUTLIER
    )
    grey = "of 0 to 1"
    tests: list[tuple[NDArray[np.bool_], str, Severity, NDArray[np.float64], str]] = [
        (blank, "blank", "warning", rows["spread"], "one colour; standard deviation {:.3f}"),
        (dark, "dark", "info", rows["brightest"], f"99 % of its pixels are below {{:.2f}} {grey}"),
        (
            bright,
            "bright",
            "info",
            rows["darkest"],
            f"95 % of its pixels are above {{:.2f}} {grey}",
        ),
        (poor, "low_information", "info", rows["entropy"], "{:.2f} bits a pixel"),
        (
            blurred,
            "blurred",
            "warning",
            rows["sharpness"],
            "sharpness {:.4f}, far below the others",
        ),
        (size, "odd_size", "info", area, "{shape}, far from the others"),
        (long, "odd_aspect_ratio", "info", ratio, "{shape}"),
        (
            rows["orientation"] > 1,
            "rotated",
            "info",
            rows["orientation"],
            "EXIF orientation {:.0f}",
        ),
        (rows["hidden"], "hidden_pixels", "info", rows["transparent"], HIDDEN),
        (
            (rows["transparent"] > 0) & ~rows["hidden"],
            "transparent",
            "info",
            rows["transparent"],
            "{:.0%} of its pixels are not opaque",
        ),
    ]
    for found, kind, severity, values, text in tests:
        for place in np.flatnonzero(found).tolist():
            value = round(float(values[place]), 4)
            height, width = rows["height"][place], rows["width"][place]
            words = text.format(value, shape=f"{width}x{height} pixels")
            yield tell(int(good[place]), kind, severity, words, value=value)


HIDDEN = (
    "{:.0%} of its pixels are not opaque, and those below hold a picture: it appears where alpha "
    "is ignored"
)


def _deviation(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each value's logarithm lies from the median, in robust standard deviations."""
    if not len(values):
        return np.zeros(0)
    logs = np.log(np.maximum(values.astype(np.float64), 1e-6))
    distance = logs - np.median(logs)
    scale = max(1.4826 * float(np.median(np.abs(distance))), LEAST_SCALE)
    return np.asarray(distance / scale)
