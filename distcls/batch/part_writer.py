"""PartWriter the parts of an output: images through the model, into the files of each part."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distcls.batch.options import PredictOptions
from distcls.batch.parts import PartRecord, name_of
from distcls.batch.table import ABSTAINED, Columns, Rows, open_writer
from distcls.data.source import ImageSource
from distcls.files import atomic_path, digest
from distcls.plotting import GREEN, GREY, RED, fonts, grid_columns, new_figure, save, shorten
from distcls.runtime.model import Model, WithFeatures
from distcls.runtime.pipeline import Chunk, Profiler, split_features, stream

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

    def draw(self, source: ImageSource, classes: Sequence[str], path: Path) -> None:
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


def _truth(source: ImageSource, index: int, classes: Sequence[str]) -> str | None:
    """The true class' name; a manifest may also give its number."""
    truth = source.truths[index] if source.truths is not None else None
    if truth is not None and truth not in classes and truth.isdecimal():
        return classes[int(truth)] if int(truth) < len(classes) else truth
    return truth


FEATURES = ".features.parquet"
"""Ending of the parts of --features."""


class PartWriter:
    """Makes any part of the output of one prediction; a part is the same whoever makes it."""

    def __init__(self, model: Model, source: ImageSource, options: PredictOptions) -> None:
        """Raises UsageError for columns that the model's kind of answer does not have."""
        self.model = model
        self.source = source
        self.options = options
        self.rows = Rows(
            model.card.task,
            top_k=options.top_k,
            probabilities=options.probabilities,
            threshold=options.threshold,
        )
        self.count = min(len(source), options.limit or len(source))
        """Images."""
        self.gallery = Gallery(options.show, self.count, options.seed)
        self.stages = Profiler()
        self._width = model.width if isinstance(model, WithFeatures) else 0
        self._batch = options.batch_size or model.execution.batch_size
        self._rows = math.ceil(options.part_rows / self._batch) * self._batch
        """Rows of a part: whole batches, so that a batch is the same in a run that goes on."""

    @property
    def parts(self) -> int:
        """How many there are."""
        return math.ceil(self.count / self._rows)

    def in_order(
        self, numbers: range, folder: Path, advance: Callable[[int], object] = lambda _: None
    ) -> Iterator[PartRecord]:
        """Write the files of consecutive parts into `folder`; tells what is in them, one by one.

        `advance` is told of every few images that are done.
        """
        chunks = stream(
            self.source,
            self.model,
            indices=range(numbers.start * self._rows, min(numbers.stop * self._rows, self.count)),
            batch_size=self._batch,
            workers=self.options.workers,
            stages=self.stages,
        )
        with contextlib.closing(chunks):
            for number in numbers:
                yield self._write(number, self._of_part(chunks, number), folder, advance)

    def _of_part(self, chunks: Iterator[Chunk], number: int) -> Iterator[Chunk]:
        """The chunks of one part; it ends with its last row, and does not wait for the next."""
        end = min((number + 1) * self._rows, self.count)
        for chunk in chunks:
            yield chunk
            if chunk.indices.stop >= end:
                return

    def _write(
        self, number: int, chunks: Iterator[Chunk], folder: Path, advance: Callable[[int], object]
    ) -> PartRecord:
        """Write the files of a part, and tell what is in them."""
        kind, width, rows = self.options.out.suffix, self._width, self.rows
        paths = [folder / name_of(number, ending) for ending in (kind, FEATURES)]
        tally = _Tally(self.source)
        with contextlib.ExitStack() as stack:
            part = stack.enter_context(atomic_path(paths[0]))
            write = stack.enter_context(
                open_writer(part, rows.names, kind, rows.numbers, rows.booleans)
            )
            if width:
                from distcls.batch.parquet import open_features

                part = stack.enter_context(atomic_path(paths[1]))
                write_features = stack.enter_context(open_features(part, width))
            for whole in chunks:
                chunk, features = split_features(whole, width)
                table = rows(chunk, self.source.image_ids)
                write(table)
                if width:
                    write_features(table["image_id"], features)
                self.gallery.offer(chunk, table)
                tally.add(chunk, table.get(ABSTAINED, ()))
                advance(len(chunk.indices))
        return PartRecord(
            rows=tally.rows,
            errors=tally.errors,
            abstained=tally.abstained,
            first_error=tally.first,
            picked=self.gallery.within(range(number * self._rows, (number + 1) * self._rows)),
            files={path.name: digest(path) for path in paths[: 1 + bool(width)]},
        )


@dataclasses.dataclass
class _Tally:
    """What is counted while a part is written."""

    source: ImageSource
    rows: int = 0
    errors: int = 0
    abstained: int = 0
    first: str = ""

    def add(self, chunk: Chunk, abstained: Sequence[bool | None]) -> None:
        """Count a chunk."""
        self.rows += len(chunk.indices)
        self.abstained += sum(map(bool, abstained))
        for index, error in zip(chunk.indices, chunk.errors, strict=True):
            if error is not None:
                self.first = self.first or f"{self.source.image_ids[index]}: {error}"
                self.errors += 1
