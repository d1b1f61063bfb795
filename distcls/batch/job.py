"""Batch prediction: one row for each input, in input order, an error included.

    check_output    fails early if the output could not be written
    predict         writes the missing parts, then joins them into the output

The rows are written in parts (see `distcls.batch.parts`), so that an interrupted run can be
resumed; the finished parts become the output in one step.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from distcls import log
from distcls.batch.loading import fingerprint_of
from distcls.batch.options import PredictOptions, PredictResult
from distcls.batch.part_writer import FEATURES, PartWriter
from distcls.batch.parts import Fingerprint, PartRecord, Parts, open_parts, parts_folder
from distcls.batch.ray import Reopen, check_ray, write_on_ray
from distcls.batch.table import check_ending
from distcls.data.dataset import INFO
from distcls.data.source import ImageSource
from distcls.errors import DistclsError, UsageError
from distcls.files import atomic_path, require_writable
from distcls.plotting import draw_profile, new_figure
from distcls.runtime.model import Model


def check_output(options: PredictOptions) -> None:
    """Raise UsageError, before any work, if the results could not be written."""
    if options.to_standard_output:
        log.require_output()
    else:
        check_ending(options.out)
    if options.features is not None:
        check_ending(options.features)
    # an empty folder is no unfinished run: nothing would be resumed, and a whole output replaced
    resuming = options.resume and any(parts_folder(options.out).glob("*"))
    for target in _outputs(options):
        if target.is_dir():
            raise UsageError(f"out: {target} is a folder, expected the name of a file")
        if target.exists() and not options.overwrite and not resuming:
            what = "is complete, there is nothing to resume" if options.resume else "exists already"
            raise UsageError(f"{target} {what}; choose another --out or add --overwrite")
    if options.engine == "ray":
        check_ray(options)
    if options.show or options.profile is not None:
        new_figure(1, 1)  # raises now if matplotlib is missing
    for target in _outputs(options):
        require_writable(target.parent)


def _outputs(options: PredictOptions) -> list[Path]:
    picture = options.picture if options.show else None
    out = None if options.to_standard_output else options.out
    targets = (out, options.features, picture, options.profile)
    return [target for target in targets if target is not None]


def predict(
    model: Model, source: ImageSource, options: PredictOptions, reopen: Reopen | None = None
) -> PredictResult:
    """Predict all images of `source` and write `options.out`, and `options.features` if given.

    A bad image is a row with its reason in the column `error`. Raises UsageError, and writes
    nothing, if no image is readable, or if the run that `--resume` is to continue has another
    fingerprint. With features the model has to be a `WithFeatures`. Workers of `--engine ray` open
    model and source with `reopen`.
    """
    writer = PartWriter(model, source, options)
    _require_no_input(_outputs(options), source, options.inputs)
    began = time.monotonic()
    with (
        _parts_of(options) as out,
        open_parts(out, resume=options.resume, overwrite=options.overwrite) as parts,
    ):
        resumed = parts.rows
        with _resume_hint(parts):
            _write_missing_parts(parts, writer, reopen)
            _deliver(parts, writer)
        records = list(parts.records)
        parts.remove()
    seconds = time.monotonic() - began
    profile = writer.profiler.to_json()
    if options.show:
        task = model.card.task
        # a true class may be given by number; multi-output labels are always text
        source = source.on_background(model.card.preprocess.background)
        writer.gallery.draw(source, task.classes if task.single else (), options.picture)
    if options.profile is not None:
        draw_profile(profile, options.profile, title=model.provider)
    return PredictResult(
        images=writer.count,
        errors=sum(record.errors for record in records),
        first_error=next((r.first_error for r in records if r.first_error), ""),
        abstained=sum(record.abstained for record in records),
        resumed=resumed,
        seconds=seconds,
        provider=model.provider,
        profile=profile,
        out=options.out,
        features=options.features,
        shown=options.picture if options.show else None,
    )


def _require_no_input(targets: list[Path], source: ImageSource, inputs: Sequence[str]) -> None:
    """Raise UsageError for an output, to be replaced, that is an image or part of a dataset."""
    there = {os.path.realpath(target): target for target in targets if target.exists()}
    for real, target in there.items():
        for folder in inputs:
            dataset = (Path(folder) / INFO).is_file()
            if dataset and Path(real).is_relative_to(os.path.realpath(folder)):
                raise UsageError(f"{target} is a file of the dataset directory {folder}")
    for path in (source.paths() or ()) if there else ():
        if path in there:
            raise UsageError(f"{there[path]} is one of the images; choose another name")


@contextlib.contextmanager
def _parts_of(options: PredictOptions) -> Iterator[Path]:
    """The output beside which the parts are written; for standard output a temporary one."""
    if not options.to_standard_output:
        yield options.out
        return
    with tempfile.TemporaryDirectory(prefix="distcls-") as folder:
        yield Path(folder) / f"rows{options.ending}"


@contextlib.contextmanager
def _resume_hint(parts: Parts) -> Iterator[None]:
    """Add to an error of the run that its finished parts can be resumed."""
    try:
        yield
    except UsageError:
        raise
    except DistclsError as error:
        if not parts.records or parts.printed:
            raise
        hint = f"{parts.rows:,} rows are kept in {parts.folder}, --resume continues them"
        raise DistclsError(f"{error}; {hint}") from error


def _write_missing_parts(parts: Parts, writer: PartWriter, reopen: Reopen | None) -> None:
    model, source, options = writer.model, writer.source, writer.options
    with ThreadPoolExecutor(1, thread_name_prefix="fingerprint") as pool:
        # the sizes and times of a million files take seconds, the first part takes longer
        fingerprint = pool.submit(fingerprint_of, model, source, options)
        if parts.records:
            parts.check(fingerprint.result())
            if dropped := parts.keep_unchanged(source):
                log.warn(
                    f"images have changed since they were predicted, at unchanged sizes and times: "
                    f"the last {log.counted(dropped, 'part')} of {parts.folder} are predicted again"
                )
            for record in parts.records:
                writer.gallery.restore(record.picked)
            log.say(f"{parts.rows:,} of {writer.count:,} images are already done")
        # rows on the same terminal are progress enough
        shown = not (options.to_standard_output and sys.stdout is not None and sys.stdout.isatty())
        with log.Progress("predicting", writer.count, done=parts.rows, shown=shown) as progress:
            for record in _new_records(parts, writer, fingerprint, progress.update, reopen):
                if not parts.records:
                    parts.begin(fingerprint.result())
                parts.finish(record)
                if options.to_standard_output and _any_readable(parts):
                    parts.print(options.ending, writer.rows.names)


def _any_readable(parts: Parts) -> bool:
    return any(record.errors < record.rows for record in parts.records)


def _new_records(
    parts: Parts,
    writer: PartWriter,
    fingerprint: Future[Fingerprint],
    advance: Callable[[int], object],
    reopen: Reopen | None,
) -> Iterator[PartRecord]:
    """The records of the missing parts in order, each as soon as its files are written."""
    numbers = range(len(parts.records), writer.parts)
    if writer.options.engine == "local":
        yield from writer.write(numbers, parts.folder, advance)
    elif numbers:
        assert reopen is not None
        for record, files in write_on_ray(writer, fingerprint.result(), numbers, reopen):
            for name, content in files.items():
                with atomic_path(parts.folder / name) as part:
                    part.write_bytes(content)
            writer.gallery.restore(record.picked)
            advance(record.rows)
            yield record


def _deliver(parts: Parts, writer: PartWriter) -> None:
    """Join the finished parts and move the output to its final path."""
    options = writer.options
    if not _any_readable(parts):
        first = next(record.first_error for record in parts.records)
        parts.records.clear()  # nothing worth resuming
        count = log.counted(writer.count, "image")
        raise UsageError(f"{' '.join(options.inputs[:3])}: none of {count} is readable; {first}")
    if options.features is not None:
        parts.deliver(FEATURES, options.features)
    if not options.to_standard_output:
        parts.deliver(options.ending, options.out, writer.rows.names)
