"""The output table: rows out of logits, written as CSV, JSON lines or Parquet."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from distcls.errors import UsageError
from distcls.files import csv_line
from distcls.runtime.pipeline import Chunk
from distcls.task import Task

ABSTAINED = "abstained"
"""Column with --threshold: whether a label, or that of any head, was not likely enough."""

Floats = NDArray[np.float32]
LabelColumns = tuple[list[str | None], Floats]
"""Labels and probabilities of some images, for one pair of columns."""


class RowBuilder:
    """Turns chunks into columns of a table.

    image_id, label, probability, then for single-label tasks the next likely classes (label_2,
    probability_2, ...), for heads each one's own (label:HEAD, probability:HEAD), then on request
    p:CLASS, with a threshold abstained, and error. The probability of a multi-head or multi-label
    prediction is the joint one of all its classes, as if they were independent.
    """

    def __init__(
        self,
        task: Task,
        *,
        top_k: int = 1,
        probabilities: bool = False,
        threshold: float | None = None,
    ) -> None:
        """Raises UsageError for options that the task does not support.

        That is a `top_k` of more classes than there are, or of heads or labels at all, and a
        threshold of labels.
        """
        if not task.single and top_k > 1:
            raise UsageError(
                f"top_k: {top_k} is for a single label per image, the model has {task.summary()}; "
                "--probabilities gives them all"
            )
        if top_k > len(task.classes):
            number = len(task.classes)
            raise UsageError(f"top_k: {top_k} is more than the model's {number} classes")
        if task.kind == "multi_label" and threshold is not None:
            raise UsageError(
                f"threshold: {threshold:g} is for a single label per image or head, the model "
                f"has {task.summary()}, each with its own threshold; --probabilities gives "
                "them all"
            )
        self._task = task
        self._top_k = top_k
        self._threshold = threshold
        self._all = [f"p:{name}" for name in task.classes] if probabilities else []
        endings = [f"_{rank + 1}" if rank else "" for rank in range(top_k)]
        endings += [f":{head.name}" for head in task.heads]
        self._pairs = [(f"label{ending}", f"probability{ending}") for ending in endings]

    @property
    def names(self) -> list[str]:
        """All columns in order."""
        pairs = [name for pair in self._pairs for name in pair]
        return ["image_id", *pairs, *self._all, *sorted(self.booleans), "error"]

    @property
    def numbers(self) -> set[str]:
        """The columns that hold numbers."""
        return {probability for _, probability in self._pairs} | set(self._all)

    @property
    def booleans(self) -> set[str]:
        """The columns that hold true or false."""
        return set() if self._threshold is None else {ABSTAINED}

    def __call__(self, chunk: Chunk, image_ids: Sequence[str]) -> Columns:
        """The rows of a chunk; a bad image's is empty but for its name and the error.

        With a threshold, a class that is less likely is not named; its probability stays. The label
        of all heads is named if each head's class is.
        """
        good = np.array([error is None for error in chunk.errors])
        logits = chunk.logits[good]
        probabilities = self._task.probabilities(logits)
        labels = self._top_classes if self._task.single else self._multi_output
        found, abstained = labels(logits, probabilities)
        columns: Columns = {"image_id": [image_ids[index] for index in chunk.indices]}
        for (label, probability), (texts, values) in zip(self._pairs, found, strict=True):
            columns[label] = _spread(good, texts)
            columns[probability] = _spread(good, shortest(values))
        for index, name in enumerate(self._all):
            columns[name] = _spread(good, shortest(probabilities[:, index]))
        if self._threshold is not None:
            columns[ABSTAINED] = _spread(good, abstained.tolist())
        columns["error"] = chunk.errors
        return columns

    def _top_classes(
        self, logits: Floats, probabilities: Floats
    ) -> tuple[list[LabelColumns], NDArray[np.bool_]]:
        """The likeliest class, the next, and so on; and which images are abstained from, [N]."""
        if self._top_k == 1:
            ranked = self._task.decide(logits)
        else:  # of equal logits the lower class comes first
            ranked = np.argsort(-logits, axis=1, kind="stable")[:, : self._top_k]
        of_rank = np.take_along_axis(probabilities, ranked, axis=1)
        abstained = self._below_threshold(of_rank[:, 0])
        named = np.array(self._task.classes, object)[ranked]
        named[abstained, 0] = None
        columns = [(named[:, rank].tolist(), of_rank[:, rank]) for rank in range(self._top_k)]
        return columns, abstained

    def _multi_output(
        self, logits: Floats, probabilities: Floats
    ) -> tuple[list[LabelColumns], NDArray[np.bool_]]:
        """All heads or labels as one text, then each head's; and which are abstained from, [N]."""
        decided = self._task.decide(logits)
        joint = self._task.confidence(probabilities, decided)
        abstained = np.zeros(len(logits), np.bool_)
        heads: list[LabelColumns] = []
        if self._task.heads:
            own = self._task.of_answers(probabilities, decided)
            for position, head in enumerate(self._task.heads):
                below = self._below_threshold(own[:, position])
                names = [head.classes[index] for index in decided[:, position].tolist()]
                heads.append((_blank_where(names, below), own[:, position]))
                abstained |= below
        return [(_blank_where(self._task.texts(decided), abstained), joint), *heads], abstained

    def _below_threshold(self, probabilities: Floats) -> NDArray[np.bool_]:
        """Whether each of [N] is less than the threshold; all False without one."""
        if self._threshold is None:
            return np.zeros(len(probabilities), np.bool_)
        return np.asarray(probabilities < self._threshold, np.bool_)


def _blank_where(texts: list[str], abstained: NDArray[np.bool_]) -> list[str | None]:
    return [None if blank else text for text, blank in zip(texts, abstained.tolist(), strict=True)]


def _spread(good: NDArray[np.bool_], values: list[Any]) -> list[Any]:
    """`values` for the readable images, None for bad ones."""
    if good.all():
        return values
    left = iter(values)
    return [next(left) if is_good else None for is_good in good.tolist()]


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


def shortest(values: NDArray[np.float32]) -> list[float]:
    """Numbers whose decimal form is the shortest that gives the same float32 back."""
    return [float(text) for text in values.astype(np.str_).tolist()]


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
