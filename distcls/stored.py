"""What is read back from disk is not trusted: bounded reads of regular files, and schemas.

A schema is a function made by those below. Called with a value and its place, such as
`preprocess.size[0]`, it raises `Unfit`, one short line, for what it does not allow. Each kind of
file declares its own beside its reader: model cards, dataset directories, training states, parts of
an output, entries of the cache.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distcls.errors import shown

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Schema = Callable[[Any, str], None]

MOST_JSON = 1 << 28
"""Bytes of the largest JSON file that is read, unless its reader has a limit of its own."""
MOST_NAMES = 1_000_000
"""Classes, or labels, of a task."""
NAME_LENGTH = 10_000
"""Characters of a name."""


ROWS_PER_BYTE = 16
"""Rows of a Parquet file; equal ones take next to nothing, but each image has its own name."""
MOST_UNPACKED, UNPACKED_PER_BYTE = 1 << 30, 64
"""Bytes to which a Parquet file may unpack: so many, and so many for each of its own."""


class Unfit(ValueError):
    """A value that its schema does not allow; the text names its place and what is expected."""


def require_fit(condition: bool, place: str, value: object, expected: str) -> None:
    """Raise Unfit for the value at `place` unless the condition holds."""
    if not condition:
        raise Unfit(f"{place or 'it'} is {shown(value)}, expected {expected}")


def anything(value: object, place: str) -> None:
    """What nobody reads, or somebody else checks."""


def flag(value: object, place: str) -> None:
    """True or false."""
    require_fit(isinstance(value, bool), place, value, "true or false")


def text(longest: int = NAME_LENGTH, pattern: str = "", expected: str = "") -> Schema:
    """A text that can be encoded, of limited length, which matches a pattern as a whole."""
    matcher = re.compile(pattern) if pattern else None

    def check(value: object, place: str) -> None:
        good = isinstance(value, str) and len(value) <= longest and _is_encodable(value)
        require_fit(good, place, value, expected or f"a text of at most {longest} characters")
        assert isinstance(value, str)
        fits = matcher is None or matcher.fullmatch(value) is not None
        require_fit(fits, place, value, expected or f"a text such as {pattern}")

    return check


def one_of(*choices: object) -> Schema:
    """One of these values."""
    expected = "one of " + ", ".join(map(str, choices))
    kinds = {type(choice) for choice in choices}
    return lambda value, place: require_fit(
        type(value) in kinds and value in choices, place, value, expected
    )


def whole(low: int = 0, high: int = 2**48) -> Schema:
    """A whole number within bounds, both included."""
    expected = f"a whole number from {low:,} to {high:,}"
    return lambda value, place: require_fit(
        type(value) is int and low <= value <= high, place, value, expected
    )


def number(low: float = -math.inf, high: float = math.inf, *, nan: bool = False) -> Schema:
    """A number within bounds, both included; not a number only if allowed."""
    bounds = "" if low == -math.inf and high == math.inf else f" from {low:g} to {high:g}"

    def check(value: Any, place: str) -> None:
        fits = type(value) is float or (type(value) is int and abs(value) < 2**63)
        fits = fits and (low <= value <= high or (nan and math.isnan(value)))
        require_fit(fits, place, value, f"a number{bounds}")

    return check


def nothing_or(schema: Schema) -> Schema:
    """Null, or what the schema allows."""

    def check(value: object, place: str) -> None:
        if value is not None:
            schema(value, place)

    return check


def each(item: Schema, most: int, least: int = 0) -> Schema:
    """A list of limited length whose items all fit."""
    size = f"{least:,}" if least == most else f"{least:,} to {most:,}"

    def check(value: Any, place: str) -> None:
        require_fit(isinstance(value, list | tuple), place, value, f"a list of {size} values")
        if not least <= len(value) <= most:
            raise Unfit(f"{place or 'it'} has {len(value):,} values, expected {size}")
        for at, member in enumerate(value):
            item(member, f"{place}[{at}]")

    return check


def items(*schemas: Schema) -> Schema:
    """A list of as many items, each of which fits its own schema."""
    listed = each(anything, len(schemas), len(schemas))

    def check(value: Any, place: str) -> None:
        listed(value, place)
        for at, (member, schema) in enumerate(zip(value, schemas, strict=True)):
            schema(member, f"{place}[{at}]")

    return check


def names(most: int = MOST_NAMES, least: int = 0) -> Schema:
    """Texts, each of them once."""
    listed = each(text(), most, least)

    def check(value: Any, place: str) -> None:
        listed(value, place)
        if len(set(value)) < len(value):
            twice = next(name for name, count in Counter(value).items() if count > 1)
            raise Unfit(f"{place or 'it'} has {shown(twice)} twice, expected each name once")

    return check


def mapping(item: Schema, most: int = MOST_NAMES) -> Schema:
    """A mapping of texts whose values all fit."""
    key_schema = text()

    def check(value: Any, place: str) -> None:
        require_fit(isinstance(value, dict), place, value, "a mapping")
        require_fit(len(value) <= most, place, value, f"at most {most:,} entries")
        for key, member in value.items():
            key_schema(key, f"a key of {place or 'it'}")
            item(member, _below(place, key))

    return check


def record(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """A mapping with these keys and no others: an unknown one may change what the others mean."""
    known = {**required, **(optional or {})}

    def check(value: Any, place: str) -> None:
        require_fit(isinstance(value, dict), place, value, "a mapping")
        for key in required:
            if key not in value:
                raise Unfit(f"{_below(place, key)} is missing")
        for key, member in value.items():
            if key not in known:
                raise Unfit(
                    f"{_below(place, shown(key))} is not known to this version of distcls; was it "
                    "written by a newer one?"
                )
            known[key](member, _below(place, key))

    return check


def plain(most: int = 10_000, deepest: int = 8, longest: int = NAME_LENGTH) -> Schema:
    """Nested plain values: so many in all, however often a part is shared, and so deep at most."""
    word = text(longest)

    def check(value: object, place: str) -> None:
        left = most

        def visit(value: Any, place: str, depth: int) -> None:
            nonlocal left
            left -= 1
            if left < 0 or depth > deepest:
                raise Unfit(f"{place} is nested too deep or holds too much")
            if isinstance(value, str):
                word(value, place)
            elif isinstance(value, dict):
                for key, member in value.items():
                    word(key, f"a key of {place}")
                    visit(member, _below(place, key), depth + 1)
            elif isinstance(value, list | tuple):
                for at, member in enumerate(value):
                    visit(member, f"{place}[{at}]", depth + 1)
            else:
                fits = value is None or type(value) in (bool, float)
                fits = fits or (type(value) is int and abs(value) < 2**63)
                require_fit(fits, place, value, "a plain value")

        visit(value, place, 0)

    return check


SHA256 = text(64, "[0-9a-f]{64}", "a SHA-256 in hexadecimals")
FILE_NAME = text(255, r"(?!\.{1,2}$)[^/\\\0]+", "the plain name of a file")
"""The name of a file in a folder that is known, never a way to another one."""


def regular_descriptor(path: str | os.PathLike[str]) -> int:
    """The descriptor of a regular file, to be closed. Raises OSError for anything else: a device
    never ends, and a pipe waits for its writer."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    raise OSError(errno.EINVAL, f"not a regular file but {kind}", str(path))


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file, opened. Raises OSError for anything else."""
    return os.fdopen(regular_descriptor(path), "rb")


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """All bytes of a regular file of at most `most`. Raises OSError, with a reason, if it is none
    or larger."""
    with open_regular(path) as handle:
        found = handle.read() if most is None else handle.read(most + 1)
    if most is not None and len(found) > most:
        raise OSError(errno.EFBIG, f"it is larger than the {most:,} bytes expected", str(path))
    return found


def read_json(path: Path, schema: Schema, most: int = MOST_JSON) -> Any:
    """The values of a JSON file that fit the schema. Raises OSError or ValueError with a reason."""
    return parse_json(read_bytes(path, most), schema)


def parse_json(data: bytes | str, schema: Schema = anything, place: str = "") -> Any:
    """JSON values that fit the schema. Raises ValueError, with a reason, for anything else."""
    try:
        found = json.loads(data, object_pairs_hook=_once)
    except RecursionError as error:
        raise Unfit(f"{place or 'it'} is nested too deep") from error
    schema(found, place)
    return found


def open_parquet(
    path: Path | str,
    data: bytes | None = None,
    wanted: Callable[[str], bool] = bool,
    coded: Callable[[str], bool] | None = None,
) -> pq.ParquetFile:
    """A Parquet file, or its content, whose wanted columns unpack to no more than its size allows.

    Texts of `coded` columns are read as dictionaries, which unpack to a number for each row.

    A text that is there once may stand for each of a million rows, so the longest of each column
    and group counts for all rows. Raises Unfit with a reason; OSError and pyarrow's errors for what
    is no Parquet.
    """
    import pyarrow as pa  # an extra of the inference install
    import pyarrow.parquet as pq

    size = Path(path).stat().st_size if data is None else len(data)
    source = path if data is None else pa.BufferReader(data)
    metadata = pq.read_metadata(source)
    schema = metadata.schema.to_arrow_schema()
    if metadata.num_rows > ROWS_PER_BYTE * size:
        raise Unfit(f"{metadata.num_rows:,} rows in {size:,} bytes, which cannot be")
    texts = [field.name for field in schema if wanted(field.name) and _is_text(field.type)]
    unpacked, most = 0, MOST_UNPACKED + UNPACKED_PER_BYTE * size
    with pq.ParquetFile(source, metadata=metadata, read_dictionary=texts) as file:
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            # not by columns: asking pyarrow for those of a damaged footer may end the process
            unpacked += max(0, group.total_byte_size)
            if unpacked <= most:
                unpacked += group.num_rows * _longest_texts(file, number, texts)
            if unpacked > most:
                raise Unfit(f"its {size:,} bytes may unpack to {unpacked:,}, more than a table has")
    names = [field.name for field in schema if _is_text(field.type)]
    kept = None if coded is None else [name for name in names if coded(name)]
    return pq.ParquetFile(source, metadata=metadata, read_dictionary=kept)


def _longest_texts(file: pq.ParquetFile, group: int, texts: list[str]) -> int:
    """Bytes of the longest text in each column's dictionary, all columns together."""
    import pyarrow as pa
    import pyarrow.compute as pc

    batches = file.iter_batches(1, row_groups=[group], columns=texts, use_threads=False)
    with contextlib.closing(batches):  # before the file is
        first = next(batches, None)
    return sum(
        pc.max(pc.binary_length(column.dictionary)).as_py() or 0
        for column in (() if first is None else first.columns)
        if pa.types.is_dictionary(column.type)
    )


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    return any(is_kind(kind) for is_kind in kinds)


def canonical_digest(values: Any) -> str:
    """SHA-256 of JSON values, whatever their layout in a file; hexadecimal."""
    compact = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(compact.encode()).hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise Unfit(f"key {shown(next(k for k in keys if keys.count(k) > 1))} is there twice")
    return found


def _below(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _is_encodable(value: str) -> bool:
    """Whether it has no lone surrogates, which JSON can spell and no output can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
