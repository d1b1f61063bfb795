"""Batch prediction: one row for each input, in input order, an error included.

The rows are written in parts (see `distcls.batch.parts`), so that a run that is killed can go
on; the finished parts become the output in one step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from distcls import log
from distcls.batch.options import PredictOptions, PredictResult
from distcls.batch.part_writer import FEATURES, PartWriter
from distcls.batch.parts import Identity, PartRecord, Parts, folder_of, opened
from distcls.batch.ray import Reopen, check_ray, made_on_ray
from distcls.batch.setup import fingerprint_of
from distcls.batch.table import check_ending
from distcls.data.source import ImageSource
from distcls.errors import DistclsError, UsageError
from distcls.files import atomic_path, require_writable
from distcls.plotting import new_figure
from distcls.runtime.model import Model


def check_output(options: PredictOptions) -> None:
    """Raise UsageError, before any work, if the results could not be written."""
    check_ending(options.out)
    if options.features is not None:
        check_ending(options.features)
    going_on = options.resume and folder_of(options.out).is_dir()
    for target in _outputs(options):
        if target.is_dir():
            raise UsageError(f"out: {target} is a folder, expected the name of a file")
        if target.exists() and not options.overwrite and not going_on:
            what = "is whole, there is nothing to resume" if options.resume else "exists already"
            raise UsageError(f"{target} {what}; choose another --out or add --overwrite")
    if options.engine == "ray":
        check_ray(options)
    if options.show or options.profile is not None:
        new_figure(1, 1)  # tells now if matplotlib is missing
    for target in _outputs(options):
        require_writable(target.parent)


def _outputs(options: PredictOptions) -> list[Path]:
    chosen = [options.out]
    if options.features is not None:
        chosen.append(options.features)
    if options.show:
        chosen.append(options.picture)
    if options.profile is not None:
        chosen.append(options.profile)
    return chosen


def predict(
    model: Model, source: ImageSource, options: PredictOptions, reopen: Reopen | None = None
) -> PredictResult:
    """Predict all images of `source` and write `options.out`, and `options.features` if given.

    A bad image is a row with its reason in the column `error`. Raises UsageError, and writes
    nothing, if there is no readable image at all, or if what `--resume` is to continue was begun
    with something else. With features the model has to be a `WithFeatures`. Workers of
    `--engine ray` open model and source by `reopen`.
    """
    making = PartWriter(model, source, options)
    began = time.monotonic()
    with opened(options.out, resume=options.resume, overwrite=options.overwrite) as parts:
        resumed = parts.rows
        with _kept(parts):
            _finish(parts, making, reopen)
            _deliver(parts, making)
        records = list(parts.records)
        parts.remove()
    seconds = time.monotonic() - began
    if options.show:
        task = model.card.task
        # a truth in figures may be a class's number, but of several answers it is their text
        making.gallery.draw(source, task.classes if task.single else (), options.picture)
    if options.profile is not None:
        making.stages.draw(options.profile, model.provider)
    return PredictResult(
        images=making.count,
        errors=sum(record.errors for record in records),
        abstained=sum(record.abstained for record in records),
        resumed=resumed,
        seconds=seconds,
        provider=model.provider,
        stages=making.stages.to_json(),
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


def _finish(parts: Parts, making: PartWriter, reopen: Reopen | None) -> None:
    """Make the parts that are not finished yet."""
    model, source, options = making.model, making.source, making.options
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        # a million files take seconds to look up, the first part takes longer
        identity = pool.submit(fingerprint_of, model, source, options)
        if parts.records:
            parts.check(identity.result())
            for record in parts.records:
                making.gallery.restore(record.picked)
            log.say(f"{parts.rows:,} of {making.count:,} images are done already")
        with tqdm(
            total=making.count, initial=parts.rows, unit="img", disable=not log.show_progress()
        ) as bar:
            for record in _made(parts, making, identity, bar.update, reopen):
                if not parts.records:
                    parts.begin(identity.result())
                parts.finish(record)


def _made(
    parts: Parts,
    making: PartWriter,
    identity: Future[Identity],
    advance: Callable[[int], object],
    reopen: Reopen | None,
) -> Iterator[PartRecord]:
    """The records of the remaining parts in order, each as soon as its files are written."""
    numbers = range(len(parts.records), making.parts)
    if making.options.engine == "local":
        yield from making.in_order(numbers, parts.folder, advance)
    elif numbers:
        assert reopen is not None
        for record, files in made_on_ray(making, identity.result(), numbers, reopen):
            for name, content in files.items():
                with atomic_path(parts.folder / name) as part:
                    part.write_bytes(content)
            making.gallery.restore(record.picked)
            advance(record.rows)
            yield record


def _deliver(parts: Parts, making: PartWriter) -> None:
    """Put the finished parts together and in their place."""
    options = making.options
    if sum(record.errors for record in parts.records) == making.count:
        first = next(record.first_error for record in parts.records)
        parts.records.clear()  # nothing to go on with
        raise UsageError(f"{options.input}: none of {making.count} images is readable; {first}")
    if options.features is not None:
        parts.deliver(FEATURES, options.features)
    parts.deliver(options.out.suffix, options.out, making.rows.names)
