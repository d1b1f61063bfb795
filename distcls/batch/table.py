"""The output table: rows out of logits, written as CSV, JSON lines or Parquet."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls.errors import UsageError
from distcls.files import csv_line
from distcls.runtime.pipeline import Chunk
from distcls.task import Task

ABSTAINED = "abstained"
"""The column that says that an answer, or part of it, was not likely enough; with a threshold."""

Floats = NDArray[np.float32]
Answer = tuple[list[str | None], Floats]
"""Texts and probabilities of some images, for one pair of columns."""


class Rows:
    """Turns answered chunks into columns of a table.

    image_id, label, probability, then for one class an image the next likely ones (label_2,
    probability_2, ...), for heads each one's own (label:HEAD, probability:HEAD), then where asked
    for p:CLASS, with a threshold abstained, and error. The probability of several answers is that
    of all of them together, as if they were independent.
    """

    def __init__(
        self,
        task: Task,
        *,
        top_k: int = 1,
        probabilities: bool = False,
        threshold: float | None = None,
    ) -> None:
        """Raises UsageError for what the kind of answer does not have.

        That is more classes than there are, several of heads or labels, a threshold of labels.
        """
        if not task.single and top_k > 1:
            raise UsageError(
                f"top_k: {top_k} is for one class an image, the model has {task.summary()}; "
                "--probabilities gives them all"
            )
        if top_k > len(task.classes):
            number = len(task.classes)
            raise UsageError(f"top_k: {top_k} is more than the model's {number} classes")
        if task.kind == "multi_label" and threshold is not None:
            raise UsageError(
                f"threshold: {threshold:g} is for one class an image or in each head, the model "
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
        """The rows of a chunk; a bad image's are empty but for its name and the error.

        With a threshold, a class that is less likely is not named; its probability stays. An answer
        of heads is named if each of its classes is.
        """
        good = np.array([error is None for error in chunk.errors])
        logits = chunk.logits[good]
        probabilities = self._task.probabilities(logits)
        answer = self._ranked if self._task.single else self._several
        found, unsure = answer(logits, probabilities)
        columns: Columns = {"image_id": [image_ids[index] for index in chunk.indices]}
        for (label, probability), (texts, values) in zip(self._pairs, found, strict=True):
            columns[label] = _spread(good, texts)
            columns[probability] = _spread(good, shortest(values))
        for place, name in enumerate(self._all):
            columns[name] = _spread(good, shortest(probabilities[:, place]))
        if self._threshold is not None:
            columns[ABSTAINED] = _spread(good, unsure.tolist())
        columns["error"] = chunk.errors
        return columns

    def _ranked(
        self, logits: Floats, probabilities: Floats
    ) -> tuple[list[Answer], NDArray[np.bool_]]:
        """Names and probabilities of the likeliest class, the next, and so on; who abstains."""
        if self._top_k == 1:
            ranked = self._task.decide(logits)
        else:  # of equal logits the lower class comes first
            ranked = np.argsort(-logits, axis=1, kind="stable")[:, : self._top_k]
        of_rank = np.take_along_axis(probabilities, ranked, axis=1)
        unsure = self._unsure(of_rank[:, 0])
        named = np.array(self._task.classes, object)[ranked]
        named[unsure, 0] = None
        return [(named[:, rank].tolist(), of_rank[:, rank]) for rank in range(self._top_k)], unsure

    def _several(
        self, logits: Floats, probabilities: Floats
    ) -> tuple[list[Answer], NDArray[np.bool_]]:
        """Text and probability of the whole answer, then of each head's; who abstains."""
        answers = self._task.decide(logits)
        whole = self._task.confidence(probabilities, answers)
        unsure = np.zeros(len(logits), np.bool_)
        parts: list[Answer] = []
        if self._task.heads:
            own = self._task.of_answers(probabilities, answers)
            for place, head in enumerate(self._task.heads):
                doubtful = self._unsure(own[:, place])
                names = [head.classes[index] for index in answers[:, place].tolist()]
                parts.append((_without(names, doubtful), own[:, place]))
                unsure |= doubtful
        return [(_without(self._task.texts(answers), unsure), whole), *parts], unsure

    def _unsure(self, likeliest: Floats) -> NDArray[np.bool_]:
        """Whether each class is less likely than the threshold, [N]."""
        if self._threshold is None:
            return np.zeros(len(likeliest), np.bool_)
        return np.asarray(likeliest < self._threshold, np.bool_)


def _without(texts: list[str], unsure: NDArray[np.bool_]) -> list[str | None]:
    """The texts, None where an answer is unsure."""
    return [
        None if doubtful else text for text, doubtful in zip(texts, unsure.tolist(), strict=True)
    ]


def _spread(good: NDArray[np.bool_], values: list[Any]) -> list[Any]:
    """`values` at the places that are good, None at the others."""
    if good.all():
        return values
    left = iter(values)
    return [next(left) if fine else None for fine in good.tolist()]


Columns = dict[str, Sequence[Any]]
"""Some rows, by column: text, numbers or None."""

Write = Callable[[Columns], None]


def check_ending(path: Path) -> None:
    """Raise UsageError unless the ending of `path` is one that can be written."""
    if path.suffix.lower() not in _OPENERS:
        choices = ", ".join(_OPENERS)
        raise UsageError(f"out: {str(path)!r} has no known ending, expected one of {choices}")
    if path.suffix.lower() == ".parquet":
        pass


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
        from distcls.batch.parquet import join_tables

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
    from distcls.batch.parquet import open_table

    return open_table(path, names, numbers, booleans)


_OPENERS: dict[str, Callable[..., contextlib.AbstractContextManager[Write]]] = {
    ".csv": _open_csv,
    ".jsonl": _open_jsonl,
    ".parquet": _open_parquet,
}
