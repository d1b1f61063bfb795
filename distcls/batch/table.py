"""The output table: rows written as CSV, JSON lines or Parquet."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from distcls.errors import UsageError
from distcls.files import csv_line
from distcls.prediction import Columns
from distcls.task import Floats

Write = Callable[[Columns], None]

ROW_GROUP = 8192
"""Rows that a Parquet file gathers before it writes them."""


def check_ending(path: Path) -> None:
    """Raise UsageError unless the ending of `path` is one that can be written."""
    if path.suffix.lower() not in _OPENERS:
        choices = ", ".join(_OPENERS)
        raise UsageError(f"out: {str(path)!r} has no known ending, expected one of {choices}")
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet  # noqa: F401 - raises now if it is missing


@contextlib.contextmanager
def open_writer(
    path: Path,
    names: Sequence[str],
    ending: str,
    numbers: set[str],
    booleans: Collection[str] = (),
) -> Iterator[Write]:
    """Open `path` for a table with columns `names`.

    Those in `numbers` are float32, those in `booleans` true or false, all other text. `ending`
    decides the format: .csv, .jsonl or .parquet. Yields a function that appends
    rows; each call gives all columns in the order of `names`.
    """
    with _OPENERS[ending.lower()](path, names, numbers, booleans) as write:
        yield write


def join(parts: Sequence[Path], path: Path, ending: str, names: Sequence[str] = ()) -> None:
    """Join tables with the same columns `names`, written by `open_writer`, into one.

    `ending` decides their format. The result depends on the parts' rows alone.
    """
    if ending.lower() == ".parquet":
        _join_parquet(parts, path)
        return
    with path.open("wb") as joined:
        copy_rows(parts, joined, ending, names)


def copy_rows(
    parts: Sequence[Path],
    target: BinaryIO,
    ending: str,
    names: Sequence[str],
    *,
    header: bool = True,
) -> None:
    """Append the rows of .csv or .jsonl tables to `target`; a CSV's header once, or not at all."""
    first = csv_line(names).encode() if ending.lower() == ".csv" else b""
    target.write(first if header else b"")
    for part in parts:
        with part.open("rb") as handle:
            handle.seek(len(first))
            shutil.copyfileobj(handle, target, 1 << 20)


@contextlib.contextmanager
def _open_csv(
    path: Path, names: Sequence[str], _numbers: set[str], _booleans: Collection[str]
) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as handle:
        handle.write(csv_line(names))

        def write(columns: Columns) -> None:
            rows = zip(*columns.values(), strict=True)
            handle.write("".join(csv_line(row) for row in rows))

        yield write


@contextlib.contextmanager
def _open_jsonl(
    path: Path, names: Sequence[str], _numbers: set[str], _booleans: Collection[str]
) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as handle:

        def write(columns: Columns) -> None:
            for row in zip(*columns.values(), strict=True):
                line = dict(zip(names, row, strict=True))
                handle.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")

        yield write


@contextlib.contextmanager
def _open_parquet(
    path: Path, names: Sequence[str], numbers: set[str], booleans: Collection[str]
) -> Iterator[Write]:
    import pyarrow as pa  # an extra, of 170 MB: CSV and JSON lines do without

    def column_type(name: str) -> pa.DataType:
        if name in numbers:
            return pa.float32()
        return pa.bool_() if name in booleans else pa.string()

    schema = pa.schema([(name, column_type(name)) for name in names])
    with _row_groups(path, schema) as append:

        def write(columns: Columns) -> None:
            arrays = [pa.array(columns[field.name], field.type) for field in schema]
            append(pa.RecordBatch.from_arrays(arrays, schema=schema))

        yield write


@contextlib.contextmanager
def open_features(path: Path, width: int) -> Iterator[Callable[[Sequence[str], Floats], None]]:
    """Open a Parquet file of `image_id` and `features`, a list of `width` float32 each.

    Yields a function that appends names and their features, float32 [N, width]; a row that holds
    a NaN becomes null.
    """
    import pyarrow as pa

    kind = pa.list_(pa.float32(), width)
    schema = pa.schema([("image_id", pa.string()), ("features", kind)])
    with _parquet_writer(path, schema) as writer:

        def write(names: Sequence[str], features: Floats) -> None:
            flat = pa.array(np.ascontiguousarray(features, np.float32).ravel())
            missing = pa.array(np.isnan(features).any(axis=1))
            lists = pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=missing)
            writer.write_table(pa.table([pa.array(names, pa.string()), lists], schema=schema))

        yield write


def _join_parquet(parts: Sequence[Path], path: Path) -> None:
    import pyarrow.parquet as pq

    with contextlib.ExitStack() as stack:
        append: Callable[[Any], None] | None = None
        for part in parts:
            with pq.ParquetFile(part) as file:
                if append is None:
                    append = stack.enter_context(_row_groups(path, file.schema_arrow))
                for batch in file.iter_batches(ROW_GROUP):
                    append(batch)


@contextlib.contextmanager
def _row_groups(path: Path, schema: Any) -> Iterator[Callable[[Any], None]]:
    """Open a Parquet file; yields a function that takes record batches and gathers row groups."""
    import pyarrow as pa

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
    import pyarrow as pa
    import pyarrow.parquet as pq

    # a dictionary of features would hold each of them once more
    plain = any(pa.types.is_fixed_size_list(field.type) for field in schema)
    return pq.ParquetWriter(path, schema, use_dictionary=not plain)


_OPENERS: dict[str, Callable[..., contextlib.AbstractContextManager[Write]]] = {
    ".csv": _open_csv,
    ".jsonl": _open_jsonl,
    ".parquet": _open_parquet,
}
