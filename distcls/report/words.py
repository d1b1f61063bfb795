"""Figures in words for people."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distcls import plotting

NONE = "\N{EN DASH}"
"""For a figure that is not there."""
SHARES = frozenset(
    ("top1", "top2", "top3", "top5", "top10", "exact", "balanced_accuracy", "macro_f1",
     "macro_precision", "macro_recall", "weighted_f1", "weighted_precision", "weighted_recall",
     "ece")
)  # fmt: skip
"""Figures that are shares, and shown in percent."""


def in_words(name: str, value: float | None) -> str:
    """A figure, a share in percent."""
    if value is None or not np.isfinite(value):
        return NONE
    if name not in SHARES:
        return f"{value:.4f}"
    return f"{value:.2%}" if 0.99 < value < 1 or 0 < value < 0.01 else f"{value:.1%}"


def of_split(split: str) -> str:
    """What images of a split are called."""
    return {"test": "test", "val": "validation", "train": "training"}[split]


def file_size(path: Path) -> str:
    """The size of a file."""
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} kB"


def setting(value: object) -> str:
    """The value of a setting; a list without its brackets."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def short(name: str) -> str:
    """The name of a class for a table."""
    return plotting.shorten(name, 100)
