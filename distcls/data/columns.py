"""Columns of a manifest beside those that make the dataset: a camera, a site, an age.

`prepare` keeps them in manifest.parquet for the figures of groups, text as dictionaries, numbers
and truth values as Parquet has them. What cannot be kept is left out with its reason, or refused
where it was asked for by name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distcls.errors import UsageError, did_you_mean, plain

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("image_id", "path", "label", "split", "offset", "height", "width", "channels")
"""Columns of manifest.parquet; `weight` (float64), `group` (string) and `labels` may follow, and
then those of the manifest that are kept.

`labels` (list of int32) is there for multi-head (the class in each head) and for multi-label (the
labels that an image has). `label` is then the first of them, or -1.
"""
LABELS = "labels"
OWN = frozenset((*COLUMNS, "weight", "group", LABELS))
"""The columns that distcls gives a meaning."""
RESERVED = OWN | {"truth", "right", "probability", "margin", "loss", "probabilities"}
"""Names that no other column can have: these, and those of predictions.parquet."""
NONE = "none"
"""In place of names: no column is kept."""

MOST_COLUMNS = 64
LONGEST_NAME, LONGEST = 100, 256
"""Characters of a name and of a value."""
MOST_BYTES = 1 << 28
"""Of all texts of a column."""

Block = Mapping[str, "pa.Array"]
"""Some rows, by column."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which columns of a table may be kept, by their names alone."""

    names: dict[str, str]
    """The name as the table's reader has it: the name that is kept."""
    left_out: dict[str, str]
    """The name of a column: why it is not kept."""
    asked: bool
    """Whether they were asked for by name."""


def choose_columns(
    columns: Mapping[str, str],
    *,
    used: frozenset[str],
    repeated: frozenset[str],
    asked: Sequence[str],
    where: str,
) -> Choice:
    """The columns that may be kept, of `columns` (names in lower case: as written).

    Those `used` for paths, labels and the like are not among them; `asked` names columns, `none`,
    or, empty, means all. Raises UsageError for a name that is asked for and cannot be kept.
    """
    if tuple(asked) == (NONE,):
        return Choice({}, {}, True)
    wanted = [name.strip().lower() for name in asked]
    for given, name in zip(asked, wanted, strict=True):
        if name not in columns:
            hint = did_you_mean(given, filter(str.strip, columns.values()))
            raise UsageError(f"keep_columns: {where} has no column {given!r}{hint}")
        if name in used:
            raise UsageError(
                f"keep_columns: {given!r} is a column that the dataset is made of (path, label, "
                "split, weight, group); name others"
            )
    others = wanted or [name for name in columns if name not in used]
    if len(others) > MOST_COLUMNS:
        if wanted:
            raise UsageError(f"keep_columns: {len(others):,} columns, at most {MOST_COLUMNS}")
        reason = f"at most {MOST_COLUMNS} are kept; name those that matter with --keep-columns"
        return Choice({}, {f"all {len(others):,} other columns": reason}, False)
    names, left_out = {}, {}
    for name in others:
        written = columns[name].strip()
        reason = _unfit(name, written, repeated)
        if reason and wanted:
            raise UsageError(f"keep_columns: {plain(written)!r} {reason}")
        if reason:
            left_out[plain(written) or "a column"] = reason
        else:
            names[name] = written
    return Choice(names, left_out, bool(wanted))


def _unfit(name: str, written: str, repeated: frozenset[str]) -> str:
    """Why a column cannot be kept under its name; empty if it can."""
    if not written:
        return "has no name"
    if not written.isprintable() or len(written) > LONGEST_NAME:
        return f"is no name of at most {LONGEST_NAME} printable characters"
    if name in RESERVED:
        return "is a name that distcls uses; rename it"
    return "is there twice" if name in repeated else ""


class ManifestColumns:
    """The columns of a manifest that are kept, which are read once they are needed."""

    def __init__(
        self, where: str, rows: int, choice: Choice, read: Callable[[], Iterator[Block]]
    ) -> None:
        """`read` gives the chosen columns of the manifest `where`, some of its rows at a time."""
        self._where, self._rows, self._choice, self._read = where, rows, choice, read

    @property
    def table(self) -> pa.Table:
        """A column each, in the manifest's order, [rows]: texts (as dictionaries), numbers or truth
        values; null where there is none. Raises UsageError for a column that was asked for and
        cannot be kept, and where the file has changed."""
        return self._found[0]

    @property
    def left_out(self) -> dict[str, str]:
        """The name of a column that is not kept: why."""
        return self._found[1]

    def take(self, rows: Sequence[int]) -> pa.Table:
        """The values of some rows of the manifest, in this order."""
        return self.table.take(rows)

    @functools.cached_property
    def _found(self) -> tuple[pa.Table, dict[str, str]]:
        import pyarrow as pa

        names, left_out = self._choice.names, dict(self._choice.left_out)
        gathered = {name: _Gathered() for name in names}
        for block in self._read() if names else ():
            for name, column in gathered.items():
                column.add(block[name])
        kept = {}
        for name, column in gathered.items():
            values = column.values()
            if values is None:
                if self._choice.asked:
                    raise UsageError(
                        f"keep_columns: column {names[name]!r} of {self._where} {column.fault}"
                    )
                left_out[names[name]] = column.fault
                continue
            if len(values) != self._rows:
                raise UsageError(f"{self._where}: changed while it was read")
            kept[names[name]] = values
        return pa.table(kept), left_out


class _Unfit(ValueError):
    """Values that are not kept; the text says why."""


class _Gathered:
    """The values of one column."""

    def __init__(self) -> None:
        self.fault = ""
        """Why it is not kept."""
        self._chunks: list[pa.Array] = []
        self._bytes = 0

    def add(self, values: pa.Array) -> None:
        """Some more rows."""
        if self.fault:
            return
        try:
            chunk = _plain_values(values)
            self._bytes += chunk.dictionary.nbytes if hasattr(chunk, "dictionary") else 0
            if self._bytes > MOST_BYTES:
                raise _Unfit(f"holds more than {MOST_BYTES >> 20} MiB of text")
        except _Unfit as error:
            self.fault, self._chunks = str(error), []
        else:
            self._chunks.append(chunk)

    def values(self) -> pa.ChunkedArray | None:
        """All rows; None with a fault."""
        import pyarrow as pa

        if self.fault:
            return None
        together = pa.chunked_array(self._chunks)
        if together.null_count == len(together):
            self.fault = "is empty"
            return None
        if not pa.types.is_dictionary(together.type):
            return together
        coded = together.unify_dictionaries()
        if len(coded.chunk(0).dictionary) > len(coded) // 2:  # hardly any text is there twice
            return together.cast(pa.string())
        return pa.chunked_array([pa.concat_arrays(coded.chunks)])


def _plain_values(values: pa.Array) -> pa.Array:
    """Texts as a dictionary, whole numbers as int64, other numbers and truth values as they are.
    Raises _Unfit for others."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, is_a = values.type, pa.types
    if is_a.is_boolean(kind):
        return values
    if is_a.is_integer(kind):
        try:
            return values.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise _Unfit("holds numbers of more than 63 bits") from error
    if is_a.is_floating(kind):
        values = values.cast(pa.float32()) if is_a.is_float16(kind) else values
        return pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    text = pa.dictionary(pa.int32(), pa.string())
    if is_a.is_null(kind):
        return pa.nulls(len(values), pa.string()).dictionary_encode()
    try:
        if is_a.is_decimal(kind) or (is_a.is_temporal(kind) and not is_a.is_duration(kind)):
            values = values.cast(pa.string())
        plain_text = is_a.is_string(values.type) or is_a.is_large_string(values.type)
        values = values.dictionary_encode() if plain_text else values
        if not is_a.is_dictionary(values.type):
            raise _Unfit(f"holds {_short(kind)}, no plain values")
        longest = pc.max(pc.binary_length(values.dictionary)).as_py() or 0
        if longest > LONGEST:  # of bytes, at first
            values.dictionary.validate(full=True)
            longest = pc.max(pc.utf8_length(values.dictionary)).as_py()
        if longest > LONGEST:
            raise _Unfit(f"holds texts of more than {LONGEST} characters")
        texts = values.cast(text).dictionary_decode()
        texts.validate(full=True)
        empty = pc.equal(texts, "")  # a missing value, as in a CSV
        return pc.if_else(empty, pa.scalar(None, pa.string()), texts).dictionary_encode()
    except pa.ArrowException as error:
        raise _Unfit(f"holds {_short(kind)}, which cannot be read as text") from error


def _short(kind: Any) -> str:
    import pyarrow as pa

    return plain(str(kind.value_type if pa.types.is_dictionary(kind) else kind), 40)


def kept_names(table: pa.Table) -> list[str]:
    """The columns of a manifest.parquet that are its manifest's, and mean nothing to distcls."""
    return [name for name in table.column_names if name not in OWN]


def with_plain_columns(table: pa.Table) -> pa.Table:
    """A manifest.parquet without columns that `prepare` would not have kept."""
    names = table.column_names
    return table.select(
        [
            place
            for place, name in enumerate(names)
            if name in OWN
            or (name not in RESERVED and names.count(name) == 1 and _is_plain(table.column(place)))
        ]
    )


def _is_plain(column: pa.ChunkedArray) -> bool:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, is_a = column.type, pa.types
    if not is_a.is_dictionary(kind):
        return bool(is_a.is_integer(kind) or is_a.is_floating(kind) or is_a.is_boolean(kind))
    if not is_a.is_string(kind.value_type):
        return False
    lengths = (pc.max(pc.binary_length(chunk.dictionary)).as_py() for chunk in column.chunks)
    return all((length or 0) <= 4 * LONGEST for length in lengths)  # bytes
