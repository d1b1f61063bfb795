"""Manifests: a CSV or Parquet table with one image per row.

Columns, the named one or the first that is there of each: the file (path, file, filename,
file_name, image, image_id), the label (label, class, category, target), and where given image_id,
split, weight, group; upper and lower case are one. Of the other ones a dataset keeps those of plain
values (see `distcls.data.columns`). Rows are counted from 1 and the header is not one of them. A
row without a label (empty, or a text that stands for a missing value) is left out of a dataset;
paths without an ending or with backslashes are completed where one file fits.

One reader for `prepare` and `predict`. CSV is read by Python's csv module: it takes line breaks in
names, guesses no types and names the row of a mistake, where PyArrow's does neither.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import gc
import io
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from distcls import log
from distcls.data.columns import Block as Arrays
from distcls.data.columns import ManifestColumns, choose_columns
from distcls.data.formats.folder import complete_paths
from distcls.data.formats.label_columns import Labels, encode_labels, plain_numbers
from distcls.data.formats.remote import ListedSource, is_url
from distcls.data.source import (
    BLOCK,
    SPLIT_NAMES,
    ImageRecord,
    LabelledImages,
    LabelOptions,
    Names,
    NamesBuilder,
    OpenOptions,
    Rejected,
    TextColumn,
    first_label,
    is_missing,
    natural_order,
)
from distcls.errors import UsageError, did_you_mean
from distcls.stored import Unfit, open_parquet
from distcls.task import Task

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ENDINGS = (".csv", ".parquet")
FILE_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_id")
LABEL_COLUMNS = ("label", "class", "category", "target")

MOST_NAMED = 30
"""Columns that a message names."""

Block = dict[str, list[str | None]]
"""Some rows by column (as it is called in `Table.columns`); None where a cell is empty."""


@dataclasses.dataclass(frozen=True)
class Table:
    """An open table, read once from its first row to its last."""

    columns: dict[str, str]
    """Name in lower case, without blanks around it: the name as it is written."""
    repeated: frozenset[str]
    """Names in lower case that several columns have."""
    types: dict[str, str]
    """Parquet columns that hold neither text nor numbers as read here: what they hold."""
    blocks: Iterator[Block]
    """The rows, many at a time, of the columns that are read."""


class ManifestSource(ListedSource):
    """The images that a manifest lists, read from files or URLs."""

    def __init__(
        self, name: str, folder: str, options: OpenOptions, content: bytes | None = None
    ) -> None:
        """The manifest is the file called `name`, or `content` if that is given.

        Paths are relative to `folder`, a path or a URL, or to the root of `options`. Raises
        UsageError, naming the row, for what cannot be read. A million rows take some 100 MB.
        """
        self.location = name
        self._content, self._options = content, options
        if options.root is not None and not options.root.is_dir():
            raise UsageError(f"root: {options.root} is not a folder")
        base = folder if options.root is None else str(options.root)
        wanted = (*FILE_COLUMNS, *LABEL_COLUMNS, *_named_columns(options))
        with open_table(name, content, wanted) as table, _uncollected():
            files, ids, labels = _gather(name, base, table, options)
        if not len(files):
            raise UsageError(f"{name}: the manifest has a header but no rows")
        self._true_labels = labels
        whole = files if is_url(base) else complete_paths(base, files, name)
        if whole is not files and ids is None:
            ids = files.printable()  # an image is called as the manifest calls it
        super().__init__(base, whole, options.timeout, ids)

    @property
    def true_labels(self) -> Sequence[str | None] | None:
        """See `ImageSource`."""
        return self._true_labels

    def paths(self) -> None:
        """See `ImageSource`: a row of a table stays a row, whatever else names its file."""

    def labelled(self, options: LabelOptions) -> LabelledImages:
        """See `ImageSource`; the table is read once more, with the columns that are named.

        Raises UsageError naming the row.
        """
        path = Path(self.location)
        self._require_paths()
        weight = _plain(options.weight_column or "weight")
        columns = tuple(map(_plain, options.columns))
        named = _named_columns(self._options)
        wanted = (*FILE_COLUMNS, *LABEL_COLUMNS, *columns, *named, "split", weight, "group")
        records: list[ImageRecord] = []
        texts: list[tuple[str, ...]] = []
        with open_table(self.location, None, wanted, numbers=(weight,)) as table:
            _require_named(path, table, options)
            labels = columns or (_label_column(path, table, self._options),)
            for column in sorted({*labels, weight, "split", "group"} & table.types.keys()):
                _raise_type(path, table, column)
            used = self._used(table, {*labels, weight, "image_id", "split", "group"})
            choice = choose_columns(
                table.columns,
                used=used,
                repeated=table.repeated,
                asked=options.keep_columns,
                where=self.location,
            )
            for number, row in enumerate(_rows(table.blocks), start=1):
                where = f"{path}, row {number}"
                texts.append(tuple(row[column] or "" for column in labels))
                records.append(self._record(where, number - 1, row, weight))
        if len(records) != len(self):
            raise UsageError(f"{path}: changed while it was read")
        _require_unique(path, records)
        root = path.parent if self._options.root is None else self._options.root
        task, found = _encode(path, options, texts)
        return LabelledImages(
            source=self,
            format="manifest",
            location=str(path.resolve()),
            root=root.resolve(),
            task=task,
            records=[
                dataclasses.replace(
                    record, label=first_label(own), labels=own if options.columns else None
                )
                for record, own in zip(records, found, strict=True)
                if own is not None
            ],
            rejected=_without_label(path, records, texts, found),
            columns=ManifestColumns(
                self.location,
                len(self),
                choice,
                functools.partial(read_columns, self.location, tuple(choice.names)),
            ),
        )

    def _used(self, table: Table, columns: set[str]) -> frozenset[str]:
        """The columns of a table that the dataset is made of."""
        path = _find_column(
            self.location, table, "path_column", self._options.path_column, FILE_COLUMNS
        )
        return frozenset({*columns, path or ""})

    def _require_paths(self) -> None:
        """Raise UsageError unless it is a file of this machine."""
        if self._content is not None:
            raise UsageError(
                f"{self.location}: a dataset is prepared from local files; copy them here first"
            )
        if not self.files.mentions("://") and not self.files.mentions("\0"):
            return
        for number, name in enumerate(self.files, start=1):
            where = f"{self.location}, row {number}"
            if is_url(name):
                raise UsageError(
                    f"{where}: {name!r} is a URL; a dataset is prepared from local files, copy "
                    "them here first"
                )
            if "\0" in name:
                raise UsageError(f"{where}: path {name!r} contains a null byte")

    def _record(
        self, where: str, index: int, row: dict[str, str | None], weight: str
    ) -> ImageRecord:
        """The row's record, without its label."""
        split = (row.get("split") or "").strip().lower()
        if "split" in row and split not in SPLIT_NAMES:
            raise UsageError(
                f"{where}: split {row['split'] or ''!r} is not one of train, val, test"
            )
        return ImageRecord(
            index=index,
            image_id=self.image_ids[index],
            path=self.files[index],
            label=-1,
            split=SPLIT_NAMES[split] if "split" in row else None,
            weight=_weight(where, row[weight]) if weight in row else None,
            group=row.get("group"),
        )


def _encode(
    path: Path, options: LabelOptions, texts: list[tuple[str, ...]]
) -> tuple[Task, Sequence[Labels | None]]:
    """The task, and each row's labels; of one class per image a single one, None without any."""
    if options.columns:
        return encode_labels(path, options, texts)
    names = [row[0].strip() for row in texts]
    known = [name for name in names if not is_missing(name, options.classes)]
    if not known:
        raise UsageError(f"{path}: no row has a label")
    plain = plain_numbers(known, f"{path}: labels", options.classes)
    classes = options.classes or natural_order(plain.get(name, name) for name in known)
    labels = {name: label for label, name in enumerate(classes)}
    found: list[Labels | None] = []
    for number, text in enumerate(names, start=1):
        name = plain.get(text, text)
        if name not in labels and not is_missing(name):
            hint = did_you_mean(name, classes)
            raise UsageError(
                f"{path}, row {number}: label {name!r} is not one of the classes{hint}"
            )
        found.append((labels[name],) if name in labels else None)
    return Task(classes=classes), found


def _without_label(
    path: Path,
    records: Sequence[ImageRecord],
    texts: Sequence[tuple[str, ...]],
    found: Sequence[Labels | None],
) -> list[Rejected]:
    """The rows without a label, which are said."""
    rows = [number for number, labels in enumerate(found) if labels is None]
    rejected = []
    for row in rows:
        text = texts[row][0].strip()
        reason = f"no label ({text})" if text else "no label"
        rejected.append(Rejected(records[row].image_id, records[row].path, reason))
    if rejected:
        log.warn(
            f"{path}: {len(rows):,} of {len(found):,} rows have no label and are left out, first "
            f"row {rows[0] + 1}: {rejected[0].reason}"
        )
    return rejected


def _named_columns(options: OpenOptions) -> list[str]:
    """The columns that are named, in lower case."""
    return [_plain(name) for name in (options.path_column, options.label_column) if name]


def _find_column(
    name: str | Path, table: Table, option: str, named: str | None, usual: Sequence[str]
) -> str | None:
    """A column of the table: the named one, or the first of the usual ones that is there."""
    if named is None:
        return next((column for column in usual if column in table.columns), None)
    if _plain(named) not in table.columns:
        hint = did_you_mean(named, table.columns.values())
        raise UsageError(f"{option}: {name} has no column {named!r}{hint}")
    return _plain(named)


def _found(table: Table) -> str:
    """The columns of a table in a message, of many the first ones."""
    more = ", ..." if len(table.columns) > MOST_NAMED else ""
    return ", ".join(itertools.islice(table.columns.values(), MOST_NAMED)) + more


def _gather(
    name: str, base: str, table: Table, options: OpenOptions
) -> tuple[Names, Names | None, TextColumn | None]:
    """Paths, names where they are given, and labels. The path names an image without a name."""
    path = _find_column(name, table, "path_column", options.path_column, FILE_COLUMNS)
    if path is None:
        raise UsageError(
            f"{name}: no column for the image; expected one of {', '.join(FILE_COLUMNS)}, "
            f"found {_found(table)}; choose one with --path-column"
        )
    named = path != "image_id" and "image_id" in table.columns
    for column in (path, "image_id"):
        if column in table.types and (named or column == path):
            _raise_type(Path(name), table, column)
    label = _find_column(name, table, "label_column", options.label_column, LABEL_COLUMNS)
    if label in table.types:
        log.warn(
            f"{name}: column {label!r} holds {table.types[label]}, so it is not read as labels"
        )
        label = None
    files, ids, labels = NamesBuilder(), NamesBuilder(), TextColumn()
    done = 0
    for block in table.blocks:
        paths = _paths(name, base, path, block[path], done)
        files.extend(paths)
        if named:
            pairs = zip(block["image_id"], paths, strict=True)
            ids.extend([own or text for own, text in pairs])
        if label is not None:
            texts = ((text or "").strip() for text in block[label])
            labels.extend(None if is_missing(text) else text for text in texts)
        done += len(paths)
    return files.names(), ids.names() if named else None, labels if label is not None else None


def _paths(name: str, base: str, column: str, cells: list[str | None], done: int) -> list[str]:
    """The paths of some rows without the blanks around them, as spreadsheets put them there.

    A file whose name really begins or ends with a blank is found as it is written.
    """
    paths = [text.strip() if text else "" for text in cells]
    if "" in paths:
        raise UsageError(f"{name}, row {done + 1 + paths.index('')}: {column} is empty")
    if paths != cells and not is_url(base):
        for place, text in enumerate(cells):
            if text != paths[place] and text and "\0" not in text:
                exact = os.path.join(base, text)  # noqa: PTH118 - as the source joins them
                paths[place] = text if os.path.lexists(exact) else paths[place]
    return paths


def _rows(blocks: Iterable[Block]) -> Iterator[dict[str, str | None]]:
    for block in blocks:
        for cells in zip(*block.values(), strict=True):
            yield dict(zip(block, cells, strict=True))


def _label_column(path: Path, table: Table, options: OpenOptions) -> str:
    found = _find_column(path, table, "label_column", options.label_column, LABEL_COLUMNS)
    if found is None:
        raise UsageError(
            f"{path}: no column for the label; expected one of {', '.join(LABEL_COLUMNS)}, "
            f"found {_found(table)}; choose one with --label-column"
        )
    return found


def _require_named(path: Path, table: Table, options: LabelOptions) -> None:
    """Raise UsageError unless the columns that were named are there."""
    named = [(options.options[0], name) for name in options.columns]
    if options.weight_column is not None:
        named.append(("weight_column", options.weight_column))
    for option, name in named:
        if _plain(name) not in table.columns:
            hint = did_you_mean(name, table.columns.values())
            raise UsageError(f"{option}: {path} has no column {name!r}{hint}")


def _raise_type(path: Path, table: Table, column: str) -> None:
    raise UsageError(
        f"{path}: column {table.columns[column]!r} holds {table.types[column]}, expected text or "
        "integers"
    )


def _weight(where: str, text: str | None) -> float:
    try:
        weight = float(text or "")
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise UsageError(f"{where}: weight {text or ''!r} is not a number of at least 0")
    return weight


def _require_unique(path: Path, records: list[ImageRecord]) -> None:
    first: dict[str, int] = {}
    for number, record in enumerate(records, start=1):
        earlier = first.setdefault(record.image_id, number)
        if earlier != number:
            raise UsageError(
                f"{path}, row {number}: {record.image_id!r} is already in row {earlier}; "
                "each image may be listed once"
            )


def _plain(name: str) -> str:
    return name.strip().lower()


def _columns(name: str, header: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """The columns by their plain names. Raises UsageError for one that is read and there twice."""
    found: dict[str, str] = {}
    for column in header:
        plain = _plain(column)
        if plain in found and plain in wanted:
            raise UsageError(f"{name}: column {plain!r} occurs more than once")
        found.setdefault(plain, column)
    return found


def _repeated(header: Sequence[str]) -> frozenset[str]:
    counts = Counter(map(_plain, header))
    return frozenset(name for name, count in counts.items() if count > 1)


@contextlib.contextmanager
def open_table(
    name: str, content: bytes | None, wanted: Sequence[str], numbers: Sequence[str] = ()
) -> Iterator[Table]:
    """Open the manifest called `name`, or its `content` if that is given.

    Of the columns those in `wanted` (in lower case) are read; of `numbers` also floats. Raises
    UsageError, then and while rows are read, for what is no table.
    """
    if content is None:
        try:
            empty = Path(name).stat().st_size == 0
        except OSError as error:
            raise UsageError(f"{name}: cannot be read: {error.strerror}") from error
    else:
        empty = not content
    if empty:
        raise UsageError(f"{name}: the manifest is empty (0 bytes)")
    if name.lower().endswith(".csv"):
        with _csv_text(name, content) as handle:
            reader = csv.reader(handle, strict=True)
            header = _header(name, reader)
            columns = _columns(name, header, wanted)
            places = {plain: header.index(columns[plain]) for plain in wanted if plain in columns}
            blocks = _csv_blocks(name, reader, len(header), places)
            yield Table(columns, _repeated(header), {}, blocks)
    else:
        yield from _parquet_table(name, content, wanted, numbers)


def _csv_text(name: str, content: bytes | None) -> IO[str]:
    if content is None:
        return Path(name).open(encoding="utf-8-sig", newline="")
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")


def _header(name: str, reader: Iterator[list[str]]) -> list[str]:
    header: list[list[str]] = []
    with _csv_errors(name, lambda: 0):
        header.extend(itertools.islice((row for row in reader if row), 1))
    if not header:
        raise UsageError(f"{name}: the manifest is empty, expected a header with column names")
    return header[0]


def _csv_blocks(
    name: str, reader: Iterator[list[str]], width: int, places: dict[str, int]
) -> Iterator[Block]:
    done = 0
    while rows := _next_rows(name, reader, done):
        rows = [row for row in rows if row]  # blank lines are skipped
        if set(map(len, rows)) - {width}:
            place = next(at for at, row in enumerate(rows) if len(row) != width)
            raise UsageError(
                f"{name}, row {done + place + 1}: {len(rows[place])} values, but the header has "
                f"{width}"
            )
        done += len(rows)
        yield {column: [row[at] or None for row in rows] for column, at in places.items()}


def _next_rows(name: str, reader: Iterator[list[str]], done: int) -> list[list[str]]:
    rows: list[list[str]] = []
    with _csv_errors(name, lambda: done + sum(map(bool, rows)) + 1):
        rows.extend(itertools.islice(reader, BLOCK))  # after an error it has those before it
    return rows


@contextlib.contextmanager
def _csv_errors(name: str, row: Callable[[], int]) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: not UTF-8 after row {max(0, row() - 1)}") from error
    except csv.Error as error:
        raise UsageError(f"{name}, row {row()}: not valid CSV: {error}") from error
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error.strerror}") from error


def _parquet_table(
    name: str, content: bytes | None, wanted: Sequence[str], numbers: Sequence[str]
) -> Iterator[Table]:
    with (
        _parquet_errors(name),
        open_parquet(name, content, lambda column: _plain(column) in wanted) as file,
    ):
        schema = file.schema_arrow
        columns = _columns(name, schema.names, wanted)
        read = [plain for plain in dict.fromkeys(wanted) if plain in columns]
        held = {plain: schema.field(columns[plain]).type for plain in read}
        types = {
            plain: str(kind)
            for plain, kind in held.items()
            if not _readable(kind, number=plain in numbers)
        }
        read = [plain for plain in read if plain not in types]
        repeated = _repeated(schema.names)
        yield Table(columns, repeated, types, _parquet_blocks(file, columns, read))


@contextlib.contextmanager
def _parquet_errors(name: str) -> Iterator[None]:
    import pyarrow as pa  # an extra of the inference install

    try:
        yield
    except Unfit as error:
        raise UsageError(f"{name}: {error}") from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{name}: cannot be read as Parquet: {reason}") from error


def _readable(kind: pa.DataType, *, number: bool) -> bool:
    """Whether a column holds text or integers, or with `number` floats."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
    return bool(text or pa.types.is_integer(kind) or (number and pa.types.is_floating(kind)))


def _require_text(batch: pa.RecordBatch, names: Iterable[str]) -> None:
    """Raise pyarrow's error for a text that is not UTF-8; turning it into Python's would fail."""
    for name in names:
        batch[name].validate(full=True)


def _parquet_blocks(
    file: pq.ParquetFile, columns: dict[str, str], read: list[str]
) -> Iterator[Block]:
    for batch in file.iter_batches(BLOCK, columns=[columns[plain] for plain in read]):
        _require_text(batch, [columns[plain] for plain in read])
        yield {
            plain: [
                None if value is None or value == "" else str(value)
                for value in batch[columns[plain]].to_pylist()
            ]
            for plain in read
        }


def read_columns(name: str, columns: Sequence[str]) -> Iterator[Arrays]:
    """Some columns of a manifest (in lower case) as Arrow's arrays, many rows at a time; texts of
    Parquet as dictionaries, so that a long one that is there once takes its memory once."""
    import pyarrow as pa

    if name.lower().endswith(".csv"):
        with open_table(name, None, columns) as table, _uncollected():
            for block in table.blocks:
                yield {column: pa.array(cells, pa.string()) for column, cells in block.items()}
        return
    chosen = set(columns)
    with (
        _parquet_errors(name),
        open_parquet(name, wanted=lambda _: False, coded=lambda c: _plain(c) in chosen) as file,
    ):
        found = _columns(name, file.schema_arrow.names, columns)
        for batch in file.iter_batches(BLOCK, columns=[found[column] for column in columns]):
            yield {column: batch[found[column]] for column in columns}


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cycle collector: rows hold no cycles, and it would traverse each of a million
    again and again, half of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
