"""Whether the files of a dataset directory are what `distcls prepare` wrote: schema, digests, rows.

dataset.json has the SHA-256 of all files of the directory, its own content included.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distcls import log, stored
from distcls.data.columns import OWN, with_plain_columns
from distcls.errors import DistclsError, UsageError, shown
from distcls.files import digest, write_json
from distcls.system import cache_folder
from distcls.task import Task

if TYPE_CHECKING:
    import pyarrow as pa

LARGEST_SIDE = 2**20
"""Of an image in a pack, in pixels."""
NOTED_BYTES = 2**30
"""Size from which comparing a pack with its digest, at a gigabyte a second, is announced."""

_PLAIN = stored.plain(most=100_000)
_COUNTS = stored.mapping(stored.whole())
info_schema = stored.record(
    {
        "format": stored.whole(1, 1),
        "packed": stored.flag,
        "pack_bytes": stored.whole(),
        "root": stored.nothing_or(stored.text()),
    },
    {
        "kind": stored.text(100),
        "source": stored.nothing_or(stored.text()),
        "source_fingerprint": stored.nothing_or(stored.SHA256),
        "relative_root": stored.nothing_or(stored.text()),
        "counts": _COUNTS,
        "class_counts": stored.mapping(_COUNTS),
        "rejected": stored.whole(),
        "left_out": _COUNTS,
        "background": stored.nothing_or(stored.each(stored.whole(0, 255), 3, 3)),
        "transparent": stored.whole(),
        "repeated": _COUNTS,
        "seed": stored.whole(-(2**62), 2**62),
        "options": _PLAIN,
        "sha256": stored.record(
            {},
            dict.fromkeys(
                ("classes.json", "manifest.parquet", "pack.bin", "dataset.json"), stored.SHA256
            ),
        ),
        "version": stored.text(100),
    },
)
"""What dataset.json holds; earlier versions wrote less."""


def sealed(info: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The content of dataset.json, which is called `name`, with its own digest in it."""
    others = {key: value for key, value in info.get("sha256", {}).items() if key != name}
    plain = {**info, "sha256": others}
    return {**plain, "sha256": {**others, name: stored.canonical_digest(plain)}}


def read_info(path: Path) -> dict[str, Any]:
    """The content of dataset.json. Raises UsageError if it is not that, or has been changed."""
    info: dict[str, Any] = read_json(path)
    form = info.get("format") if isinstance(info, dict) else None
    if isinstance(info, dict) and form != 1:
        found = shown(form)
        raise UsageError(f"{path.parent}: dataset format {found}, expected 1")
    try:
        info_schema(info, "")
    except stored.Unfit as error:
        raise UsageError(f"{path}: {error}; prepare the dataset again") from error
    digests = info.get("sha256", {})
    if path.name in digests and digests != sealed(info, path.name)["sha256"]:
        raise UsageError(
            f"{path}: wrong checksum, it is not what distcls prepare wrote; prepare the dataset "
            "again (--root names the new folder of images that have moved)"
        )
    if not digests:
        log.say(f"{path}: has no checksums; whether the dataset is damaged cannot be known")
    return info


def read_json(path: Path) -> Any:
    """Any values of a JSON file of the directory. Raises UsageError if it cannot be read."""
    try:
        return stored.read_json(path, stored.anything)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path}: {reason}; is {path.parent} a dataset directory?") from error


def require_digest(path: Path, data: bytes, expected: str | None) -> None:
    """Raise UsageError for bytes that have another SHA-256 than is expected, if one is."""
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise _changed(path)


def _changed(path: Path) -> UsageError:
    return UsageError(
        f"{path}: wrong checksum, it is not what distcls prepare wrote; copy or prepare the "
        "dataset again"
    )


def read_manifest(path: Path, expected: str | None, columns: set[str]) -> pa.Table:
    """The table of manifest.parquet, with at least these columns.

    Raises UsageError if it cannot be read or has another SHA-256 than the `expected` one.
    """
    import pyarrow as pa  # an extra of the inference install

    try:
        data = stored.read_bytes(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    require_digest(path, data, expected)
    try:
        own, others = OWN.__contains__, lambda name: name not in OWN
        with stored.open_parquet(path, data, own, coded=others) as file:
            table: pa.Table = with_plain_columns(file.read())
    except stored.Unfit as error:
        raise UsageError(f"{path}: {error}") from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path}: cannot be read: {reason}") from error
    if missing := columns - set(table.column_names):
        raise UsageError(f"{path}: column {sorted(missing)[0]!r} is missing")
    if twice := len(table.column_names) - len(set(table.column_names)):
        raise UsageError(f"{path}: {twice} of its columns are there twice")
    return table


class Rows:
    """The rows of a manifest, each of which `check` looks at."""

    def __init__(self, table: pa.Table, where: Path) -> None:
        self._table = table
        self._where = where

    def check(
        self, task: Task, splits: tuple[str, ...], pack_bytes: int | None, *, signed: bool
    ) -> None:
        """Raise UsageError, naming the row, for a value that none can have.

        `pack_bytes` is None without a pack. Labels of several heads, and weights, are checked where
        they are read; ids that are there twice, which takes most of a second for a million, where
        no checksum has `signed` the table.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        ids, names = (self._texts(name) for name in ("image_id", "split"))
        known = pc.is_in(names, pa.array(splits)).to_numpy()
        self._require(known, "split", f"one of {', '.join(splits)}")
        if not signed and pc.count_distinct(ids).as_py() < len(ids):
            self._refuse(_first_repeated(ids), "image_id", "each one once")
        labels, least = self._numbers("label"), 0 if task.single else -1
        most = len(task.classes) - 1
        self._require(
            (labels >= least) & (labels <= most), "label", f"a class from {least} to {most}"
        )
        if pack_bytes is None:
            paths = self._texts("path")
            bad = pc.or_(pc.match_substring(paths, "\0"), pc.equal(paths, ""))
            self._require(~bad.to_numpy(), "path", "the path of a file")
        else:
            self._check_places(pack_bytes)

    def _check_places(self, pack_bytes: int) -> None:
        """Where the images lie in the pack."""
        sides = [self._numbers(name) for name in ("height", "width")]
        for name, side in zip(("height", "width"), sides, strict=True):
            fits = (side >= 1) & (side <= LARGEST_SIDE)
            self._require(fits, name, f"1 to {LARGEST_SIDE:,}")
        channels, offsets = self._numbers("channels"), self._numbers("offset")
        self._require((channels == 1) | (channels == 3), "channels", "1 or 3")
        last = pack_bytes - sides[0] * sides[1] * channels
        inside = (offsets >= 0) & (offsets <= last)
        self._require(inside, "offset", f"an image within the {pack_bytes:,} bytes of the pack")

    def _texts(self, name: str) -> pa.ChunkedArray:
        import pyarrow as pa

        column = self._table.column(name)
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise UsageError(f"{self._where}: column {name!r} holds {column.type}, expected texts")
        self._require_all(column, name, "a text")
        return column

    def _numbers(self, name: str) -> NDArray[np.int64]:
        import pyarrow as pa

        column = self._table.column(name)
        if not pa.types.is_integer(column.type):
            raise UsageError(
                f"{self._where}: column {name!r} holds {column.type}, expected whole numbers"
            )
        self._require_all(column, name, "a whole number")
        return np.asarray(column.to_numpy(), np.int64)

    def _require_all(self, column: pa.ChunkedArray, name: str, expected: str) -> None:
        if column.null_count:
            self._require(column.is_valid().to_numpy(), name, expected)

    def _require(self, good: NDArray[np.bool_], name: str, expected: str) -> None:
        if not good.all():
            self._refuse(int(good.argmin()), name, expected)

    def _refuse(self, row: int, name: str, expected: str) -> None:
        value = shown(self._table.column(name)[row].as_py())
        where = "" if name == "image_id" else f" ({self._table.column('image_id')[row].as_py()!r})"
        raise UsageError(
            f"{self._where}: row {row}{where}: {name} is {value}, expected {expected}; prepare the "
            "dataset again"
        )


def _first_repeated(ids: pa.ChunkedArray) -> int:
    seen: set[str] = set()
    for row, name in enumerate(ids.to_pylist()):
        if name in seen:
            return row
        seen.add(name)
    raise AssertionError("one of them is there twice")


def verify_pack(path: Path, expected: str | None) -> None:
    """Raise UsageError for a pack that has another SHA-256 than is expected, if one is.

    Each pack is read for that once on a machine: what was found right is remembered in the cache
    folder, by the file's number, size and times.
    """
    if expected is not None:
        _verify(path, expected, _identity(path))


def remember_pack(path: Path, verified: str) -> None:
    """Record that a pack has this SHA-256; where the cache cannot be written it is read again."""
    with contextlib.suppress(DistclsError, OSError, RuntimeError):  # the last: no home folder
        write_json(_record(_identity(path), verified), {"pack": str(path.resolve())})


@functools.lru_cache(maxsize=64)
def _verify(path: Path, expected: str, identity: tuple[int, ...]) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        if _record(identity, expected).is_file():
            return
    size = path.stat().st_size
    if size >= NOTED_BYTES:
        log.say(f"{path}: comparing {size / 2**30:.1f} GiB with their checksum, this once")
    if digest(path) != expected:
        raise _changed(path)
    remember_pack(path, expected)


def _identity(path: Path) -> tuple[int, ...]:
    status = os.stat(path)  # noqa: PTH116 - of what a link leads to
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,  # which no program can set back
    )


def _record(identity: tuple[int, ...], verified: str) -> Path:
    """Its name alone says all, so nothing of its content is ever taken."""
    facts = json.dumps([*identity, verified]).encode()
    return cache_folder() / "packs" / f"{hashlib.sha256(facts).hexdigest()}.json"
