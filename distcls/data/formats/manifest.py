"""Manifests: a CSV or Parquet table with one image a row.

Columns, the first that is there of each: the file (path, file, filename, image, image_id), the
label (label, class, category, target; others where they are named), and where given image_id,
split, weight (another column where it is named), group. Rows are counted from 1 and the header is
not one of them.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gc
import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from distcls.data.dataset import first_label
from distcls.data.formats.label_columns import AnswerColumns, find_answers
from distcls.data.formats.remote import Entries, Truths
from distcls.data.source import (
    BLOCK,
    SPLIT_NAMES,
    ImageRecord,
    ImageSource,
    LabelledSource,
    Names,
    NamesBuilder,
    from_encoded,
    natural_order,
)
from distcls.errors import UsageError, did_you_mean
from distcls.task import Task

SUFFIXES = (".csv", ".parquet")
FILE_COLUMNS = ("path", "file", "filename", "image", "image_id")
LABEL_COLUMNS = ("label", "class", "category", "target")

Row = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Columns that were named, in lower case."""

    weight: str
    answers: Row = ()

    def includes(self, name: str) -> bool:
        """Whether a column of this name is read."""
        known = (*FILE_COLUMNS, *LABEL_COLUMNS, *self.answers, "split", self.weight, "group")
        return _plain(name) in known


def read_manifest(
    path: Path,
    names: tuple[str, ...] | None,
    weight_column: str | None = None,
    answers: AnswerColumns | None = None,
) -> LabelledSource:
    """Read a manifest; relative paths start at its folder. Raises UsageError naming the row."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: a manifest ends in {' or '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise UsageError(f"{path}: the manifest is empty (0 bytes)")
    wanted = Wanted(
        weight="weight" if weight_column is None else _plain(weight_column),
        answers=() if answers is None else tuple(map(_plain, answers.names)),
    )
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _parquet_rows(path, wanted)
    columns = _columns(path, next(rows), wanted)
    _check_named(path, columns, weight_column, answers)
    table = [_fields(f"{path}, row {number}", row, columns) for number, row in enumerate(rows, 1)]
    if not table:
        raise UsageError(f"{path}: the manifest has a header but no rows")
    _check_unique(path, table)
    if answers is None:
        classes = names or natural_order(fields["label"] for fields in table)
        records, task = _of_one_class(path, table, classes), Task(classes=classes)
    else:
        cells = [fields.pop("answers") for fields in table]
        task, found = find_answers(path, answers, cells, names)
        records = [
            ImageRecord(label=first_label(labels), labels=labels, **fields)
            for labels, fields in zip(found, table, strict=True)
        ]
    return LabelledSource(
        kind="manifest",
        location=str(path.resolve()),
        root=path.resolve().parent,
        records=records,
        task=task,
    )


def _of_one_class(path: Path, table: list[dict[str, Any]], classes: Row) -> list[ImageRecord]:
    index = {name: label for label, name in enumerate(classes)}
    records = []
    for number, fields in enumerate(table, 1):
        label = fields.pop("label")
        if label not in index:
            hint = did_you_mean(label, classes)
            raise UsageError(
                f"{path}, row {number}: label {label!r} is not one of the classes{hint}"
            )
        records.append(ImageRecord(label=index[label], **fields))
    return records


def _check_named(
    path: Path, columns: dict[str, int], weight: str | None, answers: AnswerColumns | None
) -> None:
    """Raise UsageError unless the columns that were asked for are there."""
    asked = [] if weight is None else [("weight_column", "weight", weight)]
    if answers is not None:
        option = answers.options[0]
        asked += [(option, f"answer {place}", name) for place, name in enumerate(answers.names)]
    for option, use, name in asked:
        if use not in columns:
            hint = did_you_mean(name, _names(path))
            raise UsageError(f"{option}: {path} has no column {name!r}{hint}")


def _plain(name: str) -> str:
    return name.strip().lower()


def _names(path: Path) -> Row:
    """All columns, also those that are not read."""
    if path.suffix.lower() == ".csv":
        return next(_csv_rows(path))
    return tuple(pq.read_schema(path).names)


def _csv_rows(path: Path) -> Iterator[Row]:
    """The header, then the rows; blank lines are passed over."""
    number = -1
    width = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            for row in csv.reader(handle, strict=True):
                if not row:
                    continue
                number += 1
                width = width or len(row)
                if len(row) != width:
                    raise UsageError(
                        f"{path}, row {number}: {len(row)} values, but the header has {width}"
                    )
                yield tuple(row)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 after row {max(number, 0)}") from error
    except csv.Error as error:
        raise UsageError(f"{path}, row {number + 1}: not valid CSV: {error}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if number < 0:
        raise UsageError(f"{path}: the manifest is empty")


def _parquet_rows(path: Path, wanted: Wanted) -> Iterator[Row]:
    """The header, then the rows as text; null is empty text."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            read = [name for name in schema.names if wanted.includes(name)]
            for name in read:
                _check_type(path, name, schema.field(name).type, wanted)
            yield tuple(read)
            for batch in file.iter_batches(columns=read):
                columns = [batch.column(i).to_pylist() for i in range(batch.num_columns)]
                for row in zip(*columns, strict=True):
                    yield tuple("" if value is None else str(value) for value in row)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path}: cannot be read as Parquet: {error}") from error


def _check_type(path: Path, name: str, kind: Any, wanted: Wanted) -> None:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    number = pa.types.is_integer(kind) or (
        pa.types.is_floating(kind) and _plain(name) == wanted.weight
    )
    if not (text or number or pa.types.is_null(kind)):
        raise UsageError(f"{path}: column {name!r} holds {kind}, expected text or integers")


def _columns(path: Path, header: Row, wanted: Wanted) -> dict[str, int]:
    """Position of each column that is used, by what it is used for."""
    names = [_plain(name) for name in header]
    twice = [name for name in names if names.count(name) > 1 and wanted.includes(name)]
    if twice:
        raise UsageError(f"{path}: column {twice[0]!r} stands there more than once")
    extras = {"split": "split", "weight": wanted.weight, "group": "group"}
    extras |= {f"answer {place}": name for place, name in enumerate(wanted.answers)}
    found = {use: names.index(name) for use, name in extras.items() if name in names}
    needed = {"path": FILE_COLUMNS} | ({} if wanted.answers else {"label": LABEL_COLUMNS})
    for use, choices in needed.items():
        present = [name for name in choices if name in names]
        if not present:
            raise UsageError(
                f"{path}: no column for the {'image' if use == 'path' else 'label'}; "
                f"expected one of {', '.join(choices)}, found {', '.join(header)}"
            )
        found[use] = names.index(present[0])
    found["image_id"] = names.index("image_id") if "image_id" in names else found["path"]
    return found


def _fields(where: str, row: Row, columns: dict[str, int]) -> dict[str, Any]:
    """What a Record needs, the label still as text. Raises UsageError naming the row."""
    values = {use: row[position] for use, position in columns.items()}
    for use in ("path", "image_id", "label"):
        if use in values and not values[use].strip():
            raise UsageError(f"{where}: {use} is empty")
    if "\0" in values["path"]:
        raise UsageError(f"{where}: path {values['path']!r} holds a zero byte")
    fields: dict[str, Any] = {use: values[use] for use in ("path", "image_id")}
    if "label" in values:
        fields["label"] = values["label"].strip()
    else:
        fields["answers"] = tuple(
            value for use, value in values.items() if use.startswith("answer ")
        )
    if "split" in values:
        split = values["split"].strip().lower()
        if split not in SPLIT_NAMES:
            raise UsageError(f"{where}: split {values['split']!r} is not one of train, val, test")
        fields["split"] = SPLIT_NAMES[split]
    if "weight" in values:
        fields["weight"] = _weight(where, values["weight"])
    if "group" in values:
        fields["group"] = values["group"] or None
    return fields


def _weight(where: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise UsageError(f"{where}: weight {text!r} is not a number of at least 0")
    return weight


def _check_unique(path: Path, table: list[dict[str, Any]]) -> None:
    first: dict[str, int] = {}
    for number, fields in enumerate(table, 1):
        earlier = first.setdefault(fields["image_id"], number)
        if earlier != number:
            raise UsageError(
                f"{path}, row {number}: {fields['image_id']!r} stands in row {earlier} already; "
                "each image may be listed once"
            )


PATH_COLUMNS = ("path", "file", "filename", "image", "image_id")
"""Columns of a manifest that may hold the file's path, the first that is there wins."""

ENDINGS = (".csv", ".parquet")

Block = dict[str, list[str | None]]
"""Some rows, by column."""

Table = tuple[list[str], Iterator[Block]]

_WANTED = frozenset((*PATH_COLUMNS, "label"))


def from_manifest(
    name: str, base: str, timeout: float, content: bytes | None = None
) -> ImageSource:
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
