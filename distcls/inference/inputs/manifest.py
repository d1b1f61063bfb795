"""Manifests: a CSV or Parquet table with one image a row."""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from distcls.errors import UsageError
from distcls.inference.inputs.entries import Entries, Truths
from distcls.inference.inputs.source import BLOCK, Names, NamesBuilder, Source, from_encoded

PATH_COLUMNS = ("path", "file", "filename", "image", "image_id")
"""Columns of a manifest that may hold the file's path, the first that is there wins."""

ENDINGS = (".csv", ".parquet")

Block = dict[str, list[str | None]]
"""Some rows, by column."""

Table = tuple[list[str], Iterator[Block]]

_WANTED = frozenset((*PATH_COLUMNS, "label"))


def from_manifest(name: str, base: str, timeout: float, content: bytes | None = None) -> Source:
    """The images that a manifest lists: the file called `name`, or its `content` if that is given.

    Paths in it are relative to `base`, a folder or a URL. Raises UsageError, naming the row, for
    what cannot be read. A million rows are held in some 100 MB.
    """
    table = _open_csv if name.lower().endswith(".csv") else _open_parquet
    with table(name, content) as (columns, blocks):
        path = next((column for column in PATH_COLUMNS if column in columns), None)
        if path is None:
            expected = ", ".join(PATH_COLUMNS)
            raise UsageError(
                f"{name}: no column with the images' paths, expected one of {expected}"
            )
        given = path != "image_id" and "image_id" in columns
        with _uncollected():
            paths, ids, truths = _gather(name, path, blocks, given_ids=given)
    if not len(paths):
        raise UsageError(f"{name}: lists no images")
    entries = Entries(base, paths, timeout)
    return from_encoded(
        ids,
        entries.read,
        truths=truths if "label" in columns else None,
        state=entries.state,
    )


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cycle collector: rows hold no cycles, and it would look at each of a million
    again and again, half of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _gather(
    name: str, path: str, blocks: Iterator[Block], *, given_ids: bool
) -> tuple[Names, Names, Truths]:
    """Paths, names and true classes; the path is the name of what has no other."""
    truths, ids = Truths(), NamesBuilder()
    done = 0

    def of_paths() -> Iterator[list[str]]:
        nonlocal done
        for block in blocks:
            paths = [text for text in block[path] if text]
            if len(paths) != len(block[path]):
                row = done + 1 + next(at for at, text in enumerate(block[path]) if not text)
                raise UsageError(f"{name}, row {row}: column {path!r} is empty")
            if given_ids:
                named = zip(block["image_id"], paths, strict=True)
                ids.extend([own or text for own, text in named])
            truths.extend(block.get("label", ()))
            done += len(paths)
            yield paths

    found = Names.of_blocks(of_paths())
    return found, ids.names() if given_ids else found, truths


@contextlib.contextmanager
def _open_csv(name: str, content: bytes | None) -> Iterator[Table]:
    """Column names, and the rows, many at a time.

    Python's own reader: it takes line breaks in names and guesses no types.
    """
    try:
        with _text(name, content) as handle:
            reader = csv.reader(handle, strict=True)
            header = next((row for row in reader if row), None)
            if header is None:
                raise UsageError(f"{name}: is empty, expected a line of column names")
            columns = [column.strip() for column in header]
            yield columns, _csv_blocks(name, reader, columns)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{name}: cannot be read: {error}") from error


def _text(name: str, content: bytes | None) -> IO[str]:
    if content is None:
        return Path(name).open(encoding="utf-8-sig", newline="")
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")


def _csv_blocks(name: str, reader: Iterator[list[str]], columns: list[str]) -> Iterator[Block]:
    wanted = {column: at for at, column in enumerate(columns) if column in _WANTED}
    done = 0
    while rows := list(itertools.islice(reader, BLOCK)):
        rows = [row for row in rows if row]
        if set(map(len, rows)) - {len(columns)}:
            number, row = next(
                (number, row)
                for number, row in enumerate(rows, start=done + 1)
                if len(row) != len(columns)
            )
            raise UsageError(f"{name}, row {number}: {len(row)} values, expected {len(columns)}")
        done += len(rows)
        yield {column: [row[at] or None for row in rows] for column, at in wanted.items()}


@contextlib.contextmanager
def _open_parquet(name: str, content: bytes | None) -> Iterator[Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(name if content is None else io.BytesIO(content)) as file:
            columns = list(file.schema_arrow.names)
            yield columns, _parquet_blocks(file, columns)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{name}: cannot be read: {str(error).splitlines()[0]}") from error


def _parquet_blocks(file: Any, columns: list[str]) -> Iterator[Block]:
    wanted = [column for column in columns if column in _WANTED]
    for batch in file.iter_batches(BLOCK, columns=wanted):
        yield {
            column: [None if value is None else str(value) for value in batch[column].to_pylist()]
            for column in wanted
        }
