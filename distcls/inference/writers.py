"""Tables written row by row as CSV, JSON lines or Parquet, by the ending of the file's name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
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

ROW_GROUP = 8192
"""Rows that a Parquet file gathers before it writes them."""


def check_ending(path: Path) -> None:
    """Raise UsageError unless the ending of `path` is one that can be written."""
    if path.suffix.lower() not in _OPENERS:
        choices = ", ".join(_OPENERS)
        raise UsageError(f"out: {str(path)!r} has no known ending, expected one of {choices}")


@contextlib.contextmanager
def open_writer(path: Path, names: Sequence[str], kind: str, numbers: set[str]) -> Iterator[Write]:
    """Open `path` for a table with columns `names`, those in `numbers` float32, the others text.

    `kind` is the ending that decides the format: .csv, .jsonl or .parquet. Yields a function that
    appends rows; each call gives all columns in the order of `names`.
    """
    with _OPENERS[kind.lower()](path, names, numbers) as write:
        yield write


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
    text = str(cell)
    if any(mark in text for mark in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


@contextlib.contextmanager
def _open_csv(path: Path, names: Sequence[str], numbers: set[str]) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as handle:
        handle.write(csv_line(names))

        def write(columns: Columns) -> None:
            rows = zip(*columns.values(), strict=True)
            handle.write("".join(csv_line(row) for row in rows))

        yield write


@contextlib.contextmanager
def _open_jsonl(path: Path, names: Sequence[str], numbers: set[str]) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as handle:

        def write(columns: Columns) -> None:
            for row in zip(*columns.values(), strict=True):
                line = dict(zip(names, row, strict=True))
                handle.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")

        yield write


@contextlib.contextmanager
def _open_parquet(path: Path, names: Sequence[str], numbers: set[str]) -> Iterator[Write]:
    kinds = [(name, pa.float32() if name in numbers else pa.string()) for name in names]
    schema = pa.schema(kinds)
    waiting: list[Any] = []

    def flush() -> None:
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting, schema).combine_chunks())
            waiting.clear()

    def write(columns: Columns) -> None:
        arrays = [pa.array(columns[name], kind) for name, kind in kinds]
        waiting.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
        if sum(batch.num_rows for batch in waiting) >= ROW_GROUP:
            flush()

    with pq.ParquetWriter(path, schema) as writer:
        yield write
        flush()


_OPENERS: dict[str, Callable[..., contextlib.AbstractContextManager[Write]]] = {
    ".csv": _open_csv,
    ".jsonl": _open_jsonl,
    ".parquet": _open_parquet,
}
