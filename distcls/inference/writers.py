"""Tables written row by row as CSV, JSON lines or Parquet, by the ending of the file's name."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distcls.errors import UsageError

Columns = dict[str, Sequence[Any]]
"""Some rows, by column: text, numbers or None."""

Write = Callable[[Columns], None]

Floats = NDArray[np.float32]

ROW_GROUP = 8192
"""Rows that a Parquet file gathers before it writes them."""


def check_ending(path: Path) -> None:
    """Raise UsageError unless the ending of `path` is one that can be written."""
    if path.suffix.lower() not in _OPENERS:
        choices = ", ".join(_OPENERS)
        raise UsageError(f"out: {str(path)!r} has no known ending, expected one of {choices}")


@contextlib.contextmanager
def open_writer(
    path: Path,
    names: Sequence[str],
    kind: str,
    numbers: set[str],
    booleans: Collection[str] = (),
) -> Iterator[Write]:
    """Open `path` for a table with columns `names`.

    Those in `numbers` are float32, those in `booleans` true or false, the others text. `kind` is
    the ending that decides the format: .csv, .jsonl or .parquet. Yields a function that appends
    rows; each call gives all columns in the order of `names`.
    """
    with _OPENERS[kind.lower()](path, _schema(names, numbers, booleans)) as write:
        yield write


@contextlib.contextmanager
def open_features(path: Path, width: int) -> Iterator[Callable[[Sequence[str], Floats], None]]:
    """Open a Parquet file of `image_id` and `features`, a list of `width` float32 each.

    Yields a function that appends names and their features, float32 [N, width]; a row that holds
    a NaN becomes null.
    """
    kind = pa.list_(pa.float32(), width)
    schema = pa.schema([("image_id", pa.string()), ("features", kind)])
    with _parquet_writer(path, schema) as writer:

        def write(names: Sequence[str], features: Floats) -> None:
            flat = pa.array(np.ascontiguousarray(features, np.float32).ravel())
            missing = pa.array(np.isnan(features).any(axis=1))
            lists = pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=missing)
            writer.write_table(pa.table([pa.array(names, pa.string()), lists], schema=schema))

        yield write


def join(parts: Sequence[Path], path: Path, kind: str, names: Sequence[str] = ()) -> None:
    """Make one table of tables with the same columns `names`, written by `open_writer`.

    `kind` is the ending that says their format. The result depends on the parts' rows alone.
    """
    if kind.lower() == ".parquet":
        _join_parquet(parts, path)
        return
    header = csv_line(names).encode() if kind.lower() == ".csv" else b""
    with path.open("wb") as whole:
        whole.write(header)
        for part in parts:
            with part.open("rb") as handle:
                handle.seek(len(header))
                shutil.copyfileobj(handle, whole, 1 << 20)


def shortest(values: NDArray[np.float32]) -> list[float]:
    """Numbers whose decimal form is the shortest that gives the same float32 back."""
    return [float(text) for text in values.astype(np.str_).tolist()]


def csv_line(cells: Iterable[object]) -> str:
    """A line of CSV (RFC 4180, but ended by a line feed); None is an empty cell.

    Written out, because the csv module leaves a lone carriage return unquoted before Python 3.13.
    """
    return ",".join(_csv_cell(cell) for cell in cells) + "\n"


def _csv_cell(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).lower()
    text = str(cell)
    if any(mark in text for mark in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def _schema(names: Sequence[str], numbers: set[str], booleans: Collection[str]) -> Any:
    def kind(name: str) -> Any:
        if name in numbers:
            return pa.float32()
        return pa.bool_() if name in booleans else pa.string()

    return pa.schema([(name, kind(name)) for name in names])


@contextlib.contextmanager
def _open_csv(path: Path, schema: Any) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as handle:
        handle.write(csv_line(schema.names))

        def write(columns: Columns) -> None:
            rows = zip(*columns.values(), strict=True)
            handle.write("".join(csv_line(row) for row in rows))

        yield write


@contextlib.contextmanager
def _open_jsonl(path: Path, schema: Any) -> Iterator[Write]:
    names = list(schema.names)
    with path.open("w", encoding="utf-8", newline="") as handle:

        def write(columns: Columns) -> None:
            for row in zip(*columns.values(), strict=True):
                line = dict(zip(names, row, strict=True))
                handle.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")

        yield write


@contextlib.contextmanager
def _open_parquet(path: Path, schema: Any) -> Iterator[Write]:
    with _gathered(path, schema) as append:

        def write(columns: Columns) -> None:
            arrays = [pa.array(columns[field.name], field.type) for field in schema]
            append(pa.RecordBatch.from_arrays(arrays, schema=schema))

        yield write


@contextlib.contextmanager
def _gathered(path: Path, schema: Any) -> Iterator[Callable[[Any], None]]:
    """Open a Parquet file; yields a function that takes record batches and gathers row groups."""
    waiting: list[Any] = []

    def flush() -> None:
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting, schema).combine_chunks())
            waiting.clear()

    def append(batch: Any) -> None:
        waiting.append(batch)
        if sum(batch.num_rows for batch in waiting) >= ROW_GROUP:
            flush()

    with _parquet_writer(path, schema) as writer:
        yield append
        flush()


def _parquet_writer(path: Path, schema: Any) -> Any:
    # a dictionary of features would hold each of them once more
    plain = any(pa.types.is_fixed_size_list(field.type) for field in schema)
    return pq.ParquetWriter(path, schema, use_dictionary=not plain)


def _join_parquet(parts: Sequence[Path], path: Path) -> None:
    with contextlib.ExitStack() as stack:
        append: Callable[[Any], None] | None = None
        for part in parts:
            with pq.ParquetFile(part) as file:
                if append is None:
                    append = stack.enter_context(_gathered(path, file.schema_arrow))
                for batch in file.iter_batches(ROW_GROUP):
                    append(batch)


_OPENERS: dict[str, Callable[..., contextlib.AbstractContextManager[Write]]] = {
    ".csv": _open_csv,
    ".jsonl": _open_jsonl,
    ".parquet": _open_parquet,
}
