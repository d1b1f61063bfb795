"""Batch prediction: one row for each input, in input order, an error included.

The rows are written in parts (see `distcls.inference.parts`), so that a run that is killed can go
on; the finished parts become the output in one step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distcls import log
from distcls.errors import DistclsError, UsageError
from distcls.figures import new_figure
from distcls.files import atomic_path, digest, require_writable
from distcls.inference import parts as unfinished
from distcls.inference.features import classes_of, split_features
from distcls.inference.identity import identity_of
from distcls.inference.inputs import Source
from distcls.inference.model import Model
from distcls.inference.options import PredictOptions, PredictResult
from distcls.inference.parts import Identity, Parts, Record
from distcls.inference.pipeline import Chunk, stream
from distcls.inference.providers.plan import plan_of
from distcls.inference.rows import ABSTAINED, columns, rows
from distcls.inference.show import Gallery
from distcls.inference.stages import Stages, draw
from distcls.inference.writers import check_ending, open_features, open_writer

__all__ = ["PredictOptions", "PredictResult", "check_output", "predict"]

FEATURES = ".features.parquet"
"""Ending of the parts of --features."""


def check_output(options: PredictOptions) -> None:
    """Raise UsageError, before any work, if the results could not be written."""
    check_ending(options.out)
    going_on = options.resume and unfinished.folder_of(options.out).is_dir()
    for target in _targets(options):
        if target.is_dir():
            raise UsageError(f"out: {target} is a folder, expected the name of a file")
        if target.exists() and not options.overwrite and not going_on:
            what = "is whole, there is nothing to resume" if options.resume else "exists already"
            raise UsageError(f"{target} {what}; choose another --out or add --overwrite")
    if options.show or options.profile is not None:
        new_figure(1, 1)  # tells now if matplotlib is missing
    for target in _targets(options):
        require_writable(target.parent)


def _targets(options: PredictOptions) -> list[Path]:
    chosen = [options.out]
    if options.features is not None:
        chosen.append(options.features)
    if options.show:
        chosen.append(options.picture)
    if options.profile is not None:
        chosen.append(options.profile)
    return chosen


def predict(model: Model, source: Source, options: PredictOptions) -> PredictResult:
    """Predict all images of `source` and write `options.out`, and `options.features` if given.

    A bad image is a row with its reason in the column `error`. Raises UsageError, and writes
    nothing, if there is no readable image at all, or if what `--resume` is to continue was begun
    with something else. With features the model has to be a `WithFeatures`.
    """
    classes = classes_of(model)
    if options.top_k > len(classes):
        raise UsageError(f"top_k: {options.top_k} is more than the model's {len(classes)} classes")
    count = min(len(source), options.limit or len(source))
    began = time.monotonic()
    with unfinished.opened(
        options.out, resume=options.resume, overwrite=options.overwrite
    ) as parts:
        run = _Run(model, source, options, count, parts)
        resumed = parts.rows
        with _kept(parts):
            run.finish_parts()
            run.deliver()
        records = list(parts.records)
        parts.remove()
    seconds = time.monotonic() - began
    if options.show:
        run.gallery.draw(source, classes, options.picture)
    if options.profile is not None:
        draw(run.stages, options.profile, model.provider)
    return PredictResult(
        images=count,
        errors=sum(record.errors for record in records),
        abstained=sum(record.abstained for record in records),
        resumed=resumed,
        seconds=seconds,
        provider=model.provider,
        stages=run.stages.to_json(),
        out=options.out,
        features=options.features,
        shown=options.picture if options.show else None,
    )


@contextlib.contextmanager
def _kept(parts: Parts) -> Iterator[None]:
    """Add to an error of the run that what is finished can be continued."""
    try:
        yield
    except UsageError:
        raise
    except DistclsError as error:
        if not parts.records:
            raise
        hint = f"{parts.rows:,} rows are kept in {parts.folder}, --resume continues them"
        raise DistclsError(f"{error}; {hint}") from error


class _Run:
    """One run of batch prediction over the parts of its output."""

    def __init__(
        self, model: Model, source: Source, options: PredictOptions, count: int, parts: Parts
    ) -> None:
        self.gallery = Gallery(options.show, count, options.seed)
        self.stages = Stages()
        self._model = model
        self._source = source
        self._options = options
        self._count = count
        self._parts = parts
        self._classes = classes_of(model)
        self._names, self._numbers = columns(options, self._classes)
        self._batch = options.batch_size or plan_of(model).batch_size
        self._rows = math.ceil(options.part_rows / self._batch) * self._batch
        """Rows of a part: whole batches, so that a batch is the same in a run that goes on."""

    def finish_parts(self) -> None:
        """Predict what is not finished yet."""
        with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
            # a million files take seconds to look up, the first part takes longer
            identity = pool.submit(identity_of, self._model, self._source, self._options)
            if self._parts.records:
                self._parts.check(identity.result())
                for record in self._parts.records:
                    self.gallery.restore(record.picked)
                log.say(f"{self._parts.rows:,} of {self._count:,} images are done already")
            self._predict(identity)

    def deliver(self) -> None:
        """Put the finished parts together and in their place."""
        if sum(record.errors for record in self._parts.records) == self._count:
            first = next(record.first_error for record in self._parts.records)
            self._parts.records.clear()  # nothing to go on with
            raise UsageError(
                f"{self._options.input}: none of {self._count} images is readable; {first}"
            )
        if self._options.features is not None:
            self._parts.deliver(FEATURES, self._options.features)
        out = self._options.out
        self._parts.deliver(out.suffix, out, self._names)

    def _predict(self, identity: Future[Identity]) -> None:
        options, done = self._options, self._parts.rows
        width = len(self._model.card.classes) - len(self._classes)  # of the features, if any
        chunks = stream(
            self._source,
            self._model,
            indices=range(done, self._count),
            batch_size=self._batch,
            workers=options.workers,
            stages=self.stages,
        )
        with (
            contextlib.closing(chunks),
            tqdm(
                total=self._count, initial=done, unit="img", disable=not log.show_progress()
            ) as bar,
        ):
            for number in range(len(self._parts.records), math.ceil(self._count / self._rows)):
                record = self._write(number, self._of_part(chunks, number), width, bar)
                if not number:
                    self._parts.begin(identity.result())
                self._parts.finish(record)

    def _of_part(self, chunks: Iterator[Chunk], number: int) -> Iterator[Chunk]:
        """The chunks of one part; it ends with its last row, and does not wait for the next."""
        end = min((number + 1) * self._rows, self._count)
        for chunk in chunks:
            yield chunk
            if chunk.indices.stop >= end:
                return

    def _write(self, number: int, chunks: Iterator[Chunk], width: int, bar: tqdm[Any]) -> Record:
        """Write the files of a part, and tell what is in them."""
        kind = self._options.out.suffix
        paths = [self._parts.path(number, kind), self._parts.path(number, FEATURES)]
        tally = _Tally(self._source)
        with contextlib.ExitStack() as stack:
            part = stack.enter_context(atomic_path(paths[0]))
            write = stack.enter_context(
                open_writer(part, self._names, kind, self._numbers, {ABSTAINED})
            )
            if width:
                part = stack.enter_context(atomic_path(paths[1]))
                write_features = stack.enter_context(open_features(part, width))
            for whole in chunks:
                chunk, features = split_features(whole, width)
                table = rows(chunk, self._source, self._classes, self._options)
                write(table)
                if width:
                    write_features(table["image_id"], features)
                self.gallery.offer(chunk, table)
                tally.add(chunk, table.get(ABSTAINED, ()))
                bar.update(len(chunk.indices))
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
