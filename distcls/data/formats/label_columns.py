"""Answers out of a manifest's columns: a head a column, a head a character, or several labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from distcls.data.source import natural_order
from distcls.errors import BadValue, UsageError, did_you_mean, require
from distcls.task import BLANK, Head, Task

Cells = tuple[str, ...]
"""What one row holds in the columns asked for."""
Labels = tuple[int, ...]
"""An image's class in each head, or the labels it is given."""

SEPARATOR = "|"
LONGEST = 64
"""Characters of a text at most: each costs a head, and a sentence is a mistake."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerColumns:
    """Where a manifest holds several answers for each image: one of these, or none."""

    label_columns: Cells = ()
    """A column a head."""
    text_column: str | None = None
    """The column of a text, a head a character."""
    labels_column: str | None = None
    """The column of any number of labels."""
    separator: str | None = None
    """What stands between those labels; null is |."""

    def __post_init__(self) -> None:
        given = self.options
        if len(given) > 1:
            value = getattr(self, given[1])
            raise BadValue(given[1], value, f"none with {given[0]}: one kind of answer")
        plain = [name.strip().lower() for name in self.label_columns]
        differ = len(set(plain)) == len(plain)
        require(differ, "label_columns", self.label_columns, "columns of different names")
        if self.separator is not None:
            used = self.labels_column is not None
            require(used, "separator", self.separator, "none; it belongs to labels_column")
            require(self.separator != "", "separator", self.separator, "one character or more")

    @property
    def options(self) -> list[str]:
        """Which of the three were given."""
        names = ("label_columns", "text_column", "labels_column")
        return [name for name in names if getattr(self, name) not in (None, ())]

    @property
    def names(self) -> Cells:
        """The columns' names."""
        one = (self.text_column, self.labels_column)
        return self.label_columns or tuple(name for name in one if name is not None)


def find_answers(
    path: Path, columns: AnswerColumns, rows: Sequence[Cells], names: Cells | None
) -> tuple[Task, list[Labels]]:
    """What is answered, and each row's own answer.

    `names` are the classes in order, where the user gave them: a text's characters, or the labels.
    Raises UsageError naming the row.
    """
    if columns.labels_column is not None:  # as they are: spaces may belong to the separator
        return _find_labels(path, columns, rows, names)
    rows = [tuple(cell.strip() for cell in row) for row in rows]
    if columns.label_columns:
        if names is not None:
            raise UsageError("classes: one list of names does not tell which label column it is of")
        return _find_heads(path, columns.label_columns, rows)
    assert columns.text_column is not None
    return _find_text(path, columns.text_column, rows, names)


def _find_heads(path: Path, columns: Cells, rows: Sequence[Cells]) -> tuple[Task, list[Labels]]:
    for number, row in enumerate(rows, 1):
        for column, cell in zip(columns, row, strict=True):
            if not cell:
                raise UsageError(
                    f"{path}, row {number}: {column} is empty; every image has a class in each "
                    "head, if only `none`"
                )
    values = zip(*rows, strict=True)
    heads = [Head(name, natural_order(cells)) for name, cells in zip(columns, values, strict=True)]
    index = [{name: place for place, name in enumerate(head.classes)} for head in heads]
    labels = [tuple(of[cell] for of, cell in zip(index, row, strict=True)) for row in rows]
    return Task.of_heads(heads), labels


def _find_text(
    path: Path, column: str, rows: Sequence[Cells], names: Cells | None
) -> tuple[Task, list[Labels]]:
    texts = [row[0] for row in rows]
    for number, text in enumerate(texts, 1):
        if not text:
            raise UsageError(f"{path}, row {number}: {column} is empty")
        if len(text) > LONGEST:
            raise UsageError(
                f"{path}, row {number}: {column} has {len(text)} characters, at most {LONGEST} are "
                "possible, a head each"
            )
    if long := [name for name in names or () if len(name) != 1]:
        raise UsageError(f"classes: {long[0]!r} is no character, as {column!r} has them")
    alphabet = names or natural_order(character for text in texts for character in text)
    longest = max(map(len, texts))
    if min(map(len, texts)) < longest:
        alphabet = (*alphabet, BLANK)
    index = _index(path, alphabet, "character")
    labels = []
    for number, text in enumerate(texts, 1):
        padded = [*text, *[BLANK] * (longest - len(text))]
        labels.append(tuple(index(number, character) for character in padded))
    heads = [Head(str(place), alphabet) for place in range(1, longest + 1)]
    return Task.of_heads(heads), labels


def _find_labels(
    path: Path, columns: AnswerColumns, rows: Sequence[Cells], names: Cells | None
) -> tuple[Task, list[Labels]]:
    separator = SEPARATOR if columns.separator is None else columns.separator
    parts = [[part.strip() for part in row[0].split(separator)] for row in rows]
    given = [list(dict.fromkeys(part for part in row if part)) for row in parts]
    classes = names or natural_order(name for row in given for name in row)
    index = _index(path, classes, "label")
    labels = [
        tuple(sorted(index(number, name) for name in row)) for number, row in enumerate(given, 1)
    ]
    return Task(kind="multi_label", classes=classes), labels


def _index(path: Path, classes: Cells, what: str) -> Callable[[int, str], int]:
    """A function from row number and name to the class's index."""
    known = {name: place for place, name in enumerate(classes)}

    def find(number: int, name: str) -> int:
        if name not in known:
            hint = did_you_mean(name, classes)
            raise UsageError(
                f"{path}, row {number}: {what} {name!r} is not one of the classes{hint}"
            )
        return known[name]

    return find
