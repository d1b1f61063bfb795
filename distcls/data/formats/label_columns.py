"""Labels from a manifest's columns: multi-head (one head per column, or per character) and
multi-label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from distcls import log
from distcls.data.source import LabelOptions, is_missing, natural_order, whole_numbers
from distcls.errors import UsageError, did_you_mean
from distcls.task import BLANK, Head, Task

Cells = tuple[str, ...]
"""What one row holds in the columns of the labels."""
Labels = tuple[int, ...]
"""An image's class in each head, or the labels that it has."""

SEPARATOR = "|"
LONGEST = 64
"""Characters of a text at most: each costs a head, and a sentence is a mistake."""


def encode_labels(
    path: Path, options: LabelOptions, rows: Sequence[Cells]
) -> tuple[Task, list[Labels]]:
    """The task, and the labels of each row.

    Where `options` give classes, they are the characters of a text, or the labels, in order. Raises
    UsageError naming the row.
    """
    if options.labels_column is not None:  # as they are: spaces may belong to the separator
        return _multi_label(path, options, rows)
    rows = [tuple(cell.strip() for cell in row) for row in rows]
    if options.label_columns:
        if options.classes is not None:
            raise UsageError(
                "classes: one list of names does not say which label column it belongs to"
            )
        return _column_heads(path, options.label_columns, rows)
    assert options.text_column is not None
    return _character_heads(path, options.text_column, rows, options.classes)


def plain_numbers(
    labels: Iterable[str], where: str, classes: Sequence[str] | None = None
) -> dict[str, str]:
    """Labels such as 2.0 and their names as whole numbers, which is said, if all are such.

    Empty if they are not, or if all are among `classes` as they are.
    """
    distinct = set(labels)
    plain = {} if classes and distinct <= set(classes) else whole_numbers(distinct)
    if plain:
        written = next(name for name in natural_order(distinct) if name != plain[name])
        log.say(f"{where} are whole numbers: {written} is the class {plain[written]}")
    return plain


def _column_heads(path: Path, columns: Cells, rows: Sequence[Cells]) -> tuple[Task, list[Labels]]:
    for number, row in enumerate(rows, 1):
        for column, cell in zip(columns, row, strict=True):
            if is_missing(cell):
                what = f"{cell!r}, a missing value" if cell else "empty"
                raise UsageError(
                    f"{path}, row {number}: {column} is {what}; every image needs a class in each "
                    "head, such as `none`"
                )
    plain = [
        plain_numbers(cells, f"{path}: {column}")
        for column, cells in zip(columns, zip(*rows, strict=True), strict=True)
    ]
    rows = [tuple(of.get(cell, cell) for of, cell in zip(plain, row, strict=True)) for row in rows]
    values = zip(*rows, strict=True)
    heads = [Head(name, natural_order(cells)) for name, cells in zip(columns, values, strict=True)]
    index = [{name: place for place, name in enumerate(head.classes)} for head in heads]
    labels = [tuple(of[cell] for of, cell in zip(index, row, strict=True)) for row in rows]
    return Task.of_heads(heads), labels


def _character_heads(
    path: Path, column: str, rows: Sequence[Cells], names: Cells | None
) -> tuple[Task, list[Labels]]:
    texts = [row[0] for row in rows]
    for number, text in enumerate(texts, 1):
        if not text:
            raise UsageError(f"{path}, row {number}: {column} is empty")
        if len(text) > LONGEST:
            raise UsageError(
                f"{path}, row {number}: {column} has {len(text)} characters, at most {LONGEST} are "
                "possible, one head per character"
            )
    if long := [name for name in names or () if len(name) != 1]:
        raise UsageError(f"classes: {long[0]!r} is not a single character, as {column!r} needs")
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


def _multi_label(
    path: Path, options: LabelOptions, rows: Sequence[Cells]
) -> tuple[Task, list[Labels]]:
    separator = SEPARATOR if options.separator is None else options.separator
    cells = ["" if is_missing(row[0].strip(), options.classes) else row[0] for row in rows]
    if gaps := sum(cell != row[0] for cell, row in zip(cells, rows, strict=True) if row[0].strip()):
        log.say(f"{path}: {gaps:,} rows hold a missing value, which is read as no label")
    split = [[name.strip() for name in cell.split(separator)] for cell in cells]
    given = [list(dict.fromkeys(name for name in row if name)) for row in split]
    classes = options.classes or natural_order(name for row in given for name in row)
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
