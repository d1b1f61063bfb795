"""`PartWriter`: images through the model into the files of each part of the output."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distcls.batch.options import PredictOptions
from distcls.batch.parts import PartRecord, part_name
from distcls.batch.table import open_features, open_writer
from distcls.data.source import ImageSource, whole_numbers
from distcls.files import atomic_path, digest
from distcls.plotting import GREEN, GREY, RED, Tile, draw_grid, shorten
from distcls.prediction import ABSTAINED, Columns, RowBuilder, least_probabilities
from distcls.predictor import Predictor
from distcls.runtime.model import Model, WithFeatures
from distcls.runtime.pipeline import Chunk, Profiler

FEATURES = ".features.parquet"
"""Ending of the parts of --features."""


class PartWriter:
    """Writes any part of the output of one prediction.

    A part depends on inputs, model and options alone, whichever process or machine writes it.
    """

    def __init__(self, model: Model, source: ImageSource, options: PredictOptions) -> None:
        self.model = model
        self.source = source
        self.options = options
        self.rows = RowBuilder(
            model.card.task,
            top_k=options.top_k,
            probabilities=options.probabilities,
            threshold=options.threshold,
            least=least_probabilities(model.card.calibration, options.coverage),
        )
        self.count = min(len(source), options.limit or len(source))
        """Images."""
        self.gallery = Gallery(options.show, self.count, options.seed)
        self.profiler = Profiler()
        self._width = model.width if isinstance(model, WithFeatures) else 0
        self._predictor = Predictor(model, batch_size=options.batch_size, workers=options.workers)
        batch = self._predictor.batch_size
        self._rows = math.ceil(options.part_rows / batch) * batch
        """Rows of a part: whole batches, so that a resumed run computes the same batches."""

    @property
    def parts(self) -> int:
        """Number of parts."""
        return math.ceil(self.count / self._rows)

    def write(
        self, numbers: range, folder: Path, advance: Callable[[int], object] = lambda _: None
    ) -> Iterator[PartRecord]:
        """Write the files of consecutive parts into `folder`; yields the record of each.

        `advance` is called with the number of images of each chunk.
        """
        chunks = self._predictor.chunks(
            self.source,
            indices=range(numbers.start * self._rows, min(numbers.stop * self._rows, self.count)),
            profiler=self.profiler,
        )
        with contextlib.closing(chunks):
            for number in numbers:
                yield self._write_part(number, self._until_end(chunks, number), folder, advance)

    def _until_end(self, chunks: Iterator[Chunk], number: int) -> Iterator[Chunk]:
        """The chunks of one part; ends with its last row, without waiting for the next chunk."""
        end = min((number + 1) * self._rows, self.count)
        for chunk in chunks:
            yield chunk
            if chunk.indices.stop >= end:
                return

    def _write_part(
        self, number: int, chunks: Iterator[Chunk], folder: Path, advance: Callable[[int], object]
    ) -> PartRecord:
        ending, rows = self.options.ending, self.rows
        paths = [folder / part_name(number, name) for name in (ending, FEATURES)]
        counts = _Counts(self.source)
        with contextlib.ExitStack() as stack:
            part = stack.enter_context(atomic_path(paths[0]))
            write = stack.enter_context(
                open_writer(part, rows.names, ending, rows.numbers, rows.booleans)
            )
            if self._width:
                part = stack.enter_context(atomic_path(paths[1]))
                write_features = stack.enter_context(open_features(part, self._width))
            for chunk in chunks:
                columns = rows(chunk, self.source.image_ids)
                write(columns)
                if chunk.features is not None:
                    write_features(columns["image_id"], chunk.features)
                self.gallery.offer(chunk, columns)
                counts.add(chunk, columns.get(ABSTAINED, ()))
                advance(len(chunk.indices))
        return PartRecord(
            rows=counts.rows,
            errors=counts.errors,
            abstained=counts.abstained,
            first_error=counts.first_error,
            picked=self.gallery.picked_in(range(number * self._rows, (number + 1) * self._rows)),
            files={path.name: digest(path) for path in paths[: 1 + bool(self._width)]},
        )


@dataclasses.dataclass
class _Counts:
    """Counters of a part while it is written."""

    source: ImageSource
    rows: int = 0
    errors: int = 0
    abstained: int = 0
    first_error: str = ""

    def add(self, chunk: Chunk, abstained: Sequence[bool | None]) -> None:
        """Count a chunk."""
        self.rows += len(chunk.indices)
        self.abstained += sum(map(bool, abstained))
        for index, error in zip(chunk.indices, chunk.errors, strict=True):
            if error is not None:
                self.first_error = self.first_error or f"{self.source.image_ids[index]}: {error}"
                self.errors += 1


@dataclasses.dataclass(frozen=True)
class Picked:
    """An image picked for the gallery, with its prediction."""

    index: int
    label: str | None
    """None where the model abstained."""
    probability: float


class Gallery:
    """Random images with their predictions: picked while predictions stream by, drawn at the end.

    Every input draws a random number beforehand, and those with the smallest are picked: so the
    choice does not depend on where a run was interrupted.
    """

    def __init__(self, size: int, count: int, seed: int) -> None:
        """Pick `size` of `count` inputs; `seed` decides which."""
        self._size = size
        self._priority = np.random.default_rng(seed).random(count if size else 0)
        self._picked: list[tuple[float, Picked]] = []

    @property
    def picked(self) -> list[Picked]:
        """The choice so far, in input order."""
        return sorted((item for _, item in self._picked), key=lambda item: item.index)

    def offer(self, chunk: Chunk, columns: Columns) -> None:
        """Consider the images of a chunk; bad ones are never picked."""
        if not self._size:
            return
        self._pick(
            [
                Picked(index, label, probability)
                for index, label, probability, error in zip(
                    chunk.indices,
                    columns["label"],
                    columns["probability"],
                    chunk.errors,
                    strict=True,
                )
                if error is None
            ]
        )

    def picked_in(self, indices: range) -> list[list[Any]]:
        """The choice so far among `indices`, as plain values."""
        return [list(dataclasses.astuple(item)) for item in self.picked if item.index in indices]

    def restore(self, picked: list[list[Any]]) -> None:
        """Consider what `picked_in` gave in a run with the same size, count and seed."""
        known = len(self._priority)
        self._pick([Picked(*item) for item in picked if item[0] < known])

    def draw(self, source: ImageSource, classes: Sequence[str], path: Path) -> None:
        """Write the images as a PNG, wrong labels in red. Raises UsageError without matplotlib.

        `classes` give the names for true classes that the source states by number.
        """
        tiles, known, wrong = [], 0, 0
        for item in self.picked:
            truth = _true_class(source, item.index, classes)
            tile = _tile(source.image(item.index), item, truth, source.image_ids[item.index])
            tiles.append(tile)
            known += tile.color != GREY
            wrong += tile.color == RED
        draw_grid(tiles, path, title=f"{wrong} of {known} wrong" if known else "")

    def _pick(self, items: list[Picked]) -> None:
        offered = [(float(self._priority[item.index]), item) for item in items]
        self._picked = heapq.nsmallest(self._size, self._picked + offered, key=lambda pair: pair[0])


def _tile(image: Any, item: Picked, truth: str | None, image_id: str) -> Tile:
    unknown = truth is None or item.label is None
    color = GREY if unknown else GREEN if item.label == truth else RED
    label = "(abstained)" if item.label is None else shorten(item.label, 20)
    text = f"{label} {item.probability:.1%}"
    if color == RED:
        text += f"\nnot {shorten(truth or '', 20)}"
    return Tile(image=image, text=text, name=image_id, color=color)


def _true_class(source: ImageSource, index: int, classes: Sequence[str]) -> str | None:
    """The true class' name; a manifest may also give its number, and write that as 2.0."""
    truth = source.true_labels[index] if source.true_labels is not None else None
    if truth is not None and classes and truth not in classes:
        truth = whole_numbers([truth]).get(truth, truth)
    if truth is not None and truth not in classes and truth.isdecimal():
        return classes[int(truth)] if int(truth) < len(classes) else truth
    return truth
