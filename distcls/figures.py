"""Drawing without a display: matplotlib's figures on the Agg canvas, loaded when first needed."""

from __future__ import annotations

import functools
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from distcls.errors import UsageError
from distcls.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#e07b00", "#2e7d32", "#c62828", "#6b7280"

_WIDE_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
)
"""Fonts with the scripts that matplotlib's own DejaVu Sans lacks, if one is installed."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` by `height` inches. Raises UsageError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            'drawing needs matplotlib, which is not installed; pip install "distcls[plot]"'
        ) from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write the figure as a PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_path(path) as part, warnings.catch_warnings():
        # a box in the picture tells that a letter has no font; a warning a letter says no more
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasAgg(figure)
        figure.savefig(part, format="png", dpi=dpi)


@functools.cache
def fonts() -> list[str]:
    """Font families to draw names with: DejaVu Sans, then what is installed of wider ones."""
    from matplotlib import font_manager

    installed = set(font_manager.fontManager.get_font_names())
    return ["DejaVu Sans", *(name for name in _WIDE_FONTS if name in installed)]


def grid_columns(number: int) -> int:
    """Columns of a grid a little wider than high, with few empty places in its last row."""
    ideal = math.ceil(math.sqrt(1.6 * number))
    choices = range(min(number, max(1, ideal - 1)), min(number, ideal + 2) + 1)
    return min(choices, key=lambda columns: (-number % columns, abs(columns - ideal)))


def shorten(text: str, most: int) -> str:
    """At most `most` letters on one line, the end cut."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
