"""A grid of images with a few words under each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls.figures import fonts, grid_columns, new_figure, save, shorten

WIDTH, GAP, LINE, TITLE = 1.7, 0.12, 0.15, 0.4
"""Inches: an image's width, the gap between two, a line of text, the title."""
TALLEST = 2.0
"""Images of more than this height to width are drawn smaller."""
NARROWEST = 4.5
"""Inches that the title takes."""
LETTERS = 28
"""What fits on a line below an image."""
SMALL = 100
"""Images with fewer pixels a side are drawn pixel by pixel."""


def draw_grid(
    images: NDArray[np.uint8], texts: Sequence[str], path: Path, *, title: str = ""
) -> None:
    """Write RGB images [N, h, w, 3], one or more, and a text for each as a PNG, atomically.

    Raises UsageError without matplotlib.
    """
    number, height, width = images.shape[:3]
    columns = grid_columns(number)
    rows = math.ceil(number / columns)
    tall = WIDTH * min(height / width, TALLEST)
    below = [_lines(text) for text in texts]
    pitch = tall + LINE * max(map(len, below)) + 2 * GAP
    wide = columns * (WIDTH + GAP) - GAP
    whole = (max(NARROWEST, wide + 2 * GAP), rows * pitch + TITLE)
    figure = new_figure(*whole)
    # places are computed here: a layout engine would take a second for each dozen of images
    figure.set_layout_engine("none")
    figure.text(0.5, 1 - TITLE / 2 / whole[1], title, ha="center", va="center", fontsize=11)
    style: dict[str, Any] = {"fontfamily": fonts(), "parse_math": False}
    smooth = "nearest" if max(height, width) < SMALL else "antialiased"
    for place, (image, lines) in enumerate(zip(images, below, strict=True)):
        row, column = divmod(place, columns)
        left = (whole[0] - wide) / 2 + column * (WIDTH + GAP)
        bottom = whole[1] - TITLE - row * pitch - tall
        axes = figure.add_axes(
            (left / whole[0], bottom / whole[1], WIDTH / whole[0], tall / whole[1])
        )
        axes.imshow(image, interpolation=smooth)
        axes.axis("off")
        figure.text(
            (left + WIDTH / 2) / whole[0],
            (bottom - 0.05) / whole[1],
            "\n".join(lines),
            ha="center",
            va="top",
            fontsize=8,
            color="#111827",
            **style,
        )
    save(figure, path)


def _lines(text: str) -> list[str]:
    """A text in lines that fit; a sum that does not is broken after its plus signs."""
    lines = []
    for line in text.split("\n"):
        parts = line.split(" + ") if len(line) > LETTERS else [line]
        lines += [f"{part} +" for part in parts[:-1]] + parts[-1:]
    return [shorten(line, LETTERS) for line in lines]
