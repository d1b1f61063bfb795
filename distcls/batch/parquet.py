"""Parquet files of predictions and features; the only module of batch prediction with pyarrow.

Its 170 MB are an extra, distcls[parquet]: CSV and JSON lines do without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Columns = dict[str, Sequence[Any]]
Floats = NDArray[np.float32]

ROW_GROUP = 8192
"""Rows that a file gathers before it writes them."""


@contextlib.contextmanager
def open_table(
    path: Path, names: Sequence[str], numbers: set[str], booleans: Collection[str]
) -> Iterator[Callable[[Columns], None]]:
    """Open `path` for a table, see `distcls.batch.table.open_writer`."""
    schema = _schema(names, numbers, booleans)
    with _gathered(path, schema) as append:

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
    kind = pa.list_(pa.float32(), width)
    schema = pa.schema([("image_id", pa.string()), ("features", kind)])
    with _writer(path, schema) as writer:

        def write(names: Sequence[str], features: Floats) -> None:
            flat = pa.array(np.ascontiguousarray(features, np.float32).ravel())
            missing = pa.array(np.isnan(features).any(axis=1))
            lists = pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=missing)
            writer.write_table(pa.table([pa.array(names, pa.string()), lists], schema=schema))

        yield write


def join_tables(parts: Sequence[Path], path: Path) -> None:
    """One file of files with the same columns; it depends on their rows alone."""
    with contextlib.ExitStack() as stack:
        append: Callable[[Any], None] | None = None
        for part in parts:
            with pq.ParquetFile(part) as file:
                if append is None:
                    append = stack.enter_context(_gathered(path, file.schema_arrow))
                for batch in file.iter_batches(ROW_GROUP):
                    append(batch)


def _schema(names: Sequence[str], numbers: set[str], booleans: Collection[str]) -> Any:
    def kind(name: str) -> Any:
        if name in numbers:
            return pa.float32()
        return pa.bool_() if name in booleans else pa.string()

    return pa.schema([(name, kind(name)) for name in names])


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

    with _writer(path, schema) as writer:
        yield append
        flush()


def _writer(path: Path, schema: Any) -> Any:
    # a dictionary of features would hold each of them once more
    plain = any(pa.types.is_fixed_size_list(field.type) for field in schema)
    return pq.ParquetWriter(path, schema, use_dictionary=not plain)
