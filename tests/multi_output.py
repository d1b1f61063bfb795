"""Real digits two by two in a picture, in a manifest with columns for every task."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np

from distcls.data.prepare import PrepareOptions, prepare
from distcls.task import Head, Task
from tests.sources import digits, put

DIGITS = 5
"""Of the digits 0 to 4: few images are enough to learn them."""
TAGS = ("0", "1", "2", "3", "4")

TEXT = {"text_column": "text"}
HEADS = {"label_columns": ("left", "right")}
TAGGED = {"labels_column": "tags"}


def manifest(folder: Path, count: int = 300, seed: int = 0) -> Path:
    """Grey pictures, 28 by 56, of one digit or two; a quarter have one, the right side then black.

    Columns: path; text, `3` or `34`; left and right, where right may be `none`; tags, the digits
    from 1 on with `|` between, none for a picture of noughts; split.
    """
    images, labels = digits(901)
    images = images[labels < DIGITS]
    labels = labels[labels < DIGITS]
    rng = np.random.default_rng(seed)
    rows = [("path", "text", "left", "right", "tags", "split")]
    for number in range(count):
        picture = np.zeros((28, 56), np.uint8)
        places = rng.integers(0, len(images), 1 + int(rng.random() < 0.75))
        for side, place in enumerate(places):
            large = cv2.resize(images[place], (28, 28), interpolation=cv2.INTER_LINEAR)
            picture[:, 28 * side : 28 * side + 28] = large
        shown = [str(labels[place]) for place in places]
        put(folder / "images" / f"{number:04d}.png", picture)
        tags = "|".join(sorted({name for name in shown if name != "0"}))
        split = ("train", "train", "train", "train", "val", "test")[number % 6]
        right = shown[1] if len(shown) == 2 else "none"
        rows.append((f"images/{number:04d}.png", "".join(shown), shown[0], right, tags, split))
    path = folder / "list.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(rows)
    return path


def dataset(source: Path, out: Path, **options: object) -> Path:
    """The dataset directory of a manifest."""
    prepare(PrepareOptions(source=str(source), out=out, quiet=True, **options))  # type: ignore[arg-type]
    return out


def heads(*sizes: int) -> Task:
    """Heads a, b, ... of so many classes each, c0, c1, ..."""
    names = "abcdefgh"
    return Task.of_heads(
        [
            Head(name, tuple(f"c{index}" for index in range(size)))
            for name, size in zip(names, sizes, strict=False)
        ]
    )


def labels(number: int, thresholds: tuple[float, ...] | None = None) -> Task:
    """So many labels, l0, l1, ..."""
    names = tuple(f"l{index}" for index in range(number))
    return Task(kind="multi_label", classes=names, thresholds=thresholds)
