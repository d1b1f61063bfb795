"""A picture of some images with their predictions, to look at before trusting a table."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distcls.figures import GREEN, GREY, RED, fonts, grid_columns, new_figure, save, shorten
from distcls.inference.inputs import Source
from distcls.inference.pipeline import Chunk
from distcls.inference.writers import Columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class Picked:
    """An image that was chosen, with its prediction."""

    index: int
    label: str | None
    """None where no class was likely enough."""
    probability: float


class Gallery:
    """Chooses random images while predictions stream by, and draws them at the end."""

    def __init__(self, size: int, count: int, seed: int) -> None:
        """Choose `size` of `count` inputs; `seed` decides which."""
        self._size = size
        self._lots = np.random.default_rng(seed).random(count if size else 0)
        self._picked: list[tuple[float, Picked]] = []

    @property
    def picked(self) -> list[Picked]:
        """The choice so far, in input order."""
        return sorted((item for _, item in self._picked), key=lambda item: item.index)

    def offer(self, chunk: Chunk, rows: Columns) -> None:
        """Take what has drawn a low lot; bad images never."""
        if not self._size:
            return
        offered = [
            (float(self._lots[index]), Picked(index, label, probability))
            for index, label, probability, error in zip(
                chunk.indices, rows["label"], rows["probability"], chunk.errors, strict=True
            )
            if error is None
        ]
        self._picked = heapq.nsmallest(self._size, self._picked + offered, key=lambda pair: pair[0])

    def within(self, indices: range) -> list[list[Any]]:
        """The choice so far among `indices`, as plain values."""
        chosen = [item for item in self.picked if item.index in indices]
        return [[item.index, item.label, item.probability] for item in chosen]

    def restore(self, chosen: list[list[Any]]) -> None:
        """Take what `within` gave in an earlier run with the same size, count and seed."""
        taken = [(float(self._lots[item[0]]), Picked(*item)) for item in chosen]
        self._picked = heapq.nsmallest(self._size, self._picked + taken, key=lambda pair: pair[0])

    def draw(self, source: Source, classes: Sequence[str], path: Path) -> None:
        """Write the PNG. Raises UsageError without matplotlib."""
        picked = self.picked
        columns = grid_columns(len(picked))
        rows = math.ceil(len(picked) / columns)
        images = [source.load(item.index) for item in picked]
        tallest = max(image.shape[0] / image.shape[1] for image in images)
        figure = new_figure(1.9 * columns, (1.8 * min(tallest, 2) + 0.65) * rows + 0.3)
        truths = [_truth(source, item.index, classes) for item in picked]
        known = [
            item.label == truth
            for item, truth in zip(picked, truths, strict=True)
            if truth is not None and item.label is not None
        ]
        if known:
            text = f"{len(known) - sum(known)} of {len(known)} wrong"
            figure.suptitle(text, fontsize=11, color="#374151")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(picked) :]:
            axes.axis("off")
        for axes, image, item, truth in zip(grid.flat, images, picked, truths, strict=False):
            _draw_one(axes, image, item, truth, source.image_ids[item.index])
        save(figure, path)


def _draw_one(
    axes: Axes, image: NDArray[np.uint8], item: Picked, truth: str | None, image_id: str
) -> None:
    unknown = truth is None or item.label is None
    color = GREY if unknown else GREEN if item.label == truth else RED
    smooth = "nearest" if max(image.shape[:2]) < 100 else "antialiased"
    axes.imshow(image, interpolation=smooth)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=3 if color == RED else 1.5)
    label = "(unsure)" if item.label is None else shorten(item.label, 20)
    title = f"{label} {item.probability:.1%}"
    if color == RED:
        title += f"\nnot {shorten(truth or '', 20)}"
    style: dict[str, Any] = {"fontfamily": fonts(), "parse_math": False}
    text_color = RED if color == RED else "#111827"
    axes.set_title(title, fontsize=9, color=text_color, **style)
    name = image_id if len(image_id) <= 26 else "…" + image_id[-25:]
    axes.set_xlabel(shorten(name, 26), fontsize=7, color=GREY, **style)


def _truth(source: Source, index: int, classes: Sequence[str]) -> str | None:
    """The true class' name; a manifest may also give its number."""
    truth = source.truths[index] if source.truths is not None else None
    if truth is not None and truth not in classes and truth.isdecimal():
        return classes[int(truth)] if int(truth) < len(classes) else truth
    return truth
