"""What every kind of source is read into, before an image is decoded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distcls.errors import UsageError
from distcls.targets import Targets

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What sources call their splits, in lower case, and what they are called here."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """One image of a source: a file at `path`, or `pixels` that are there already."""

    image_id: str
    """Unique in the source."""
    label: int
    """Index into the source's classes; of several answers the first, or -1."""
    split: str | None = None
    """The source's own split: train, val or test; None where it has none."""
    path: str | None = None
    """Below the source's root, or absolute."""
    pixels: NDArray[np.uint8] | None = None
    """Grey [height, width]."""
    weight: float | None = None
    """How much the image counts in training."""
    group: str | None = None
    """Images of one group (a patient, a scene) stay in one split."""
    labels: tuple[int, ...] | None = None
    """Where an image has several answers: its class in each head, or the labels it is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A source as it was found: all of its images, in its own order."""

    kind: str
    """digits, idx, mnist, fashion-mnist, folder or manifest."""
    location: str
    """Where it was found, absolute; or `digits`."""
    root: Path | None
    """Folder of the records' paths, absolute; None if the images are no files."""
    classes: tuple[str, ...]
    """Class names in label order."""
    records: list[Record]
    targets: Targets | None = None
    """Heads or labels, where an image has several answers."""

    @property
    def resolved_targets(self) -> Targets:
        """What is answered, one class an image included."""
        return self.targets or Targets(classes=self.classes)

    def positions(self, record: Record) -> list[int]:
        """Where an image's answers stand among the classes."""
        if record.labels is None:
            return [record.label]
        return self.resolved_targets.flat(record.labels)


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names from a file: a JSON list, or one name a line. Raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"classes {path}: cannot be read: {reason}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"classes {path}: expected a list of names")
    names = [name for name in names if name.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"classes {path}: {twice[0]!r} stands there more than once")
    return tuple(names)


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct names sorted: as numbers if all are (2 before 10), else by code point."""
    distinct = set(names)
    if all(name.isascii() and name.isdigit() for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))
