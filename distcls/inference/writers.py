"""Tables written row by row as CSV, JSON lines or Parquet, by the ending of the file's name."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls.errors import UsageError

Columns = dict[str, Sequence[Any]]
"""Some rows, by column: text, numbers or None."""

Write = Callable[[Columns], None]


def check_ending(path: Path) -> None:
    """Raise UsageError unless the ending of `path` is one that can be written."""
    if path.suffix.lower() not in _OPENERS:
        choices = ", ".join(_OPENERS)
        raise UsageError(f"out: {str(path)!r} has no known ending, expected one of {choices}")
    if path.suffix.lower() == ".parquet":
        import distcls.inference.parquet  # noqa: F401 - tells now if pyarrow is missing


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
    with _OPENERS[kind.lower()](path, names, numbers, booleans) as write:
        yield write


def join(parts: Sequence[Path], path: Path, kind: str, names: Sequence[str] = ()) -> None:
    """Make one table of tables with the same columns `names`, written by `open_writer`.

    `kind` is the ending that says their format. The result depends on the parts' rows alone.
    """
    if kind.lower() == ".parquet":
        from distcls.inference.parquet import join_tables

        join_tables(parts, path)
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


def _open_parquet(
    path: Path, names: Sequence[str], numbers: set[str], booleans: Collection[str]
) -> contextlib.AbstractContextManager[Write]:
    from distcls.inference.parquet import open_table

    return open_table(path, names, numbers, booleans)


_OPENERS: dict[str, Callable[..., contextlib.AbstractContextManager[Write]]] = {
    ".csv": _open_csv,
    ".jsonl": _open_jsonl,
    ".parquet": _open_parquet,
}
