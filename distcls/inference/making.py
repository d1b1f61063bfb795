"""Making the parts of an output: images through the model, into the files of each part."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from distcls.files import atomic_path, digest
from distcls.inference.features import WithFeatures, split_features
from distcls.inference.inputs import Source
from distcls.inference.model import Model
from distcls.inference.options import PredictOptions
from distcls.inference.parts import Record, name_of
from distcls.inference.pipeline import Chunk, stream
from distcls.inference.providers.plan import plan_of
from distcls.inference.rows import ABSTAINED, Rows
from distcls.inference.show import Gallery
from distcls.inference.stages import Stages
from distcls.inference.writers import open_writer

FEATURES = ".features.parquet"
"""Ending of the parts of --features."""


class Making:
    """Makes any part of the output of one prediction; a part is the same whoever makes it."""

    def __init__(self, model: Model, source: Source, options: PredictOptions) -> None:
        """Raises UsageError for columns that the model's kind of answer does not have."""
        self.model = model
        self.source = source
        self.options = options
        self.rows = Rows(
            model.card.resolved_targets,
            top_k=options.top_k,
            probabilities=options.probabilities,
            threshold=options.threshold,
        )
        self.count = min(len(source), options.limit or len(source))
        """Images."""
        self.gallery = Gallery(options.show, self.count, options.seed)
        self.stages = Stages()
        self._width = model.width if isinstance(model, WithFeatures) else 0
        self._batch = options.batch_size or plan_of(model).batch_size
        self._rows = math.ceil(options.part_rows / self._batch) * self._batch
        """Rows of a part: whole batches, so that a batch is the same in a run that goes on."""

    @property
    def parts(self) -> int:
        """How many there are."""
        return math.ceil(self.count / self._rows)

    def in_order(
        self, numbers: range, folder: Path, advance: Callable[[int], object] = lambda _: None
    ) -> Iterator[Record]:
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
    ) -> Record:
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
                from distcls.inference.parquet import open_features

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
        return Record(
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

    source: Source
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
