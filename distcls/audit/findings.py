"""What an audit finds: a row each, their table and their summary."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from distcls.errors import legible
from distcls.files import csv_line

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

KINDS: dict[str, str] = {
    "broken": "files that are no readable image",
    "conflict": "the same picture with different labels",
    "leak": "the same picture in two splits",
    "duplicate": "the same picture again",
    "near_conflict": "nearly the same picture with different labels",
    "near_leak": "nearly the same picture in two splits",
    "near_duplicate": "nearly the same picture again",
    "class_name": "class names that differ in case, blanks or Unicode form only",
    "tiny_class": "classes of few training images",
    "imbalance": "classes of very different sizes",
    "label_error": "labels that the other images contradict",
    "drift": "differences of a split from train",
    "blank": "images of one colour",
    "dark": "dark images",
    "bright": "bright images",
    "blurred": "blurred images",
    "low_information": "images with very few grey values",
    "odd_size": "sizes far from the others",
    "odd_aspect_ratio": "very long or very tall images",
    "rotated": "images turned by their EXIF orientation",
    "hidden_pixels": "pictures below transparent pixels",
    "transparent": "images with transparency",
}
"""Every kind of finding, in the order of the report, and what it is."""
COLUMNS = ("kind", "severity", "image", "split", "label", "related", "value", "text")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something about one image, or a class, that a person should look at."""

    kind: str
    """One of `KINDS`."""
    severity: Severity
    """error: results will be wrong; warning: they may be; info: worth knowing."""
    text: str
    """In words, the remedy included where there is one."""
    position: int | None = None
    """Which image of the dataset; None for a class or a split."""
    image: str = ""
    """Its id."""
    split: str = ""
    label: str = ""
    """Its label, or the class."""
    related: str = ""
    """Id of the other image, or the other class."""
    related_position: int | None = None
    """Which image that is."""
    value: float | None = None
    """The number that decided."""
    related_value: float | None = None
    """Of a label error, the probability of `related`; `value` is that of the label."""

    def row(self) -> list[Any]:
        """The cells of a row of audit.csv."""
        cells = (getattr(self, name) for name in COLUMNS)
        return [legible(cell) if isinstance(cell, str) else cell for cell in cells]


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """By severity, then by kind; of one kind as they were found."""
    kinds = list(KINDS)
    return sorted(findings, key=lambda each: (_rank(each.severity), kinds.index(each.kind)))


def _rank(severity: Severity) -> int:
    return SEVERITIES.index(severity)


def table(findings: Iterable[Finding]) -> Iterator[str]:
    """The lines of audit.csv."""
    yield csv_line(COLUMNS)
    for each in findings:
        yield csv_line(each.row())


def counted(findings: Sequence[Finding]) -> dict[str, dict[str, int]]:
    """Number of findings by severity and kind, without zeros."""
    counts = Counter((each.severity, each.kind) for each in findings)
    return {
        severity: {kind: counts[severity, kind] for kind in KINDS if counts[severity, kind]}
        for severity in SEVERITIES
    }
