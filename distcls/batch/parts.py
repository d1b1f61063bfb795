"""The finished parts of an unfinished output, which survive a kill, and their fingerprint.

pre.csv.parts/
    fingerprint.json    what determines the rows: digests of inputs and models, and the options
    00000000.csv        rows 0 to 4095, and so on; with --features .features.parquet beside it
    00000000.json       how many rows and errors, and the files' SHA-256; written last

A part counts once its record (the .json) is there and its files match it. Rows belong to a part by
their number alone, so a resumed run continues with the same parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distcls import log, stored
from distcls.batch.table import copy_rows, join
from distcls.data.source import ImageSource
from distcls.errors import UsageError
from distcls.files import (
    atomic_path,
    claimed,
    digest,
    remove_unfinished,
    sync_folder,
    writable,
    write_json,
)

ENDING = ".parts"
FINGERPRINT = "fingerprint.json"
EXECUTION = "execution configs"
"""Key of a fingerprint: the execution config of each model, as plain values."""
_OURS = re.compile(
    # identity.json and whole.* are what 0.1.0 wrote
    r"\.?((?:fingerprint|identity)\.json|\d{8}\.[\w.]+|(?:joined|whole)\.[\w.]+)(\..*\.part)?"
)


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What determines the rows of an output; runs with equal fingerprints write equal bytes."""

    values: dict[str, Any]
    """Plain values, by names that an error can show."""

    def difference(self, begun: Fingerprint) -> tuple[str, str] | None:
        """What `begun` has and what this has at the first key that differs; None if equal."""
        for key in {**begun.values, **self.values}:
            if begun.values.get(key) != self.values.get(key):
                return begun._describe(key), self._describe(key)
        return None

    def _describe(self, key: str) -> str:
        value = self.values.get(key)
        if value is None:
            return f"no {key}"
        return f"{key} {str(value)[:12] if key in ('inputs', 'model') else value}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartRecord:
    """One finished part."""

    rows: int
    errors: int
    abstained: int
    first_error: str
    """Name and reason of the first bad image; empty if there is none."""
    picked: list[list[Any]]
    """Its images picked for the gallery (see `Gallery.picked_in`)."""
    files: dict[str, str]
    """SHA-256 of each file, by its name."""


SEAL = "sha256"
"""Key of a stored record: the digest of its others."""
MOST_BYTES = 2**26
"""Of a record or a fingerprint."""
_PICKED = stored.items(stored.whole(), stored.nothing_or(stored.text()), stored.number(nan=True))
fingerprint_schema = stored.mapping(stored.plain(most=1_000_000))
record_schema = stored.record(
    {
        "rows": stored.whole(1),
        "errors": stored.whole(),
        "abstained": stored.whole(),
        "first_error": stored.text(),
        "picked": stored.each(_PICKED, 100_000),
        "files": stored.mapping(stored.SHA256, most=10),
        SEAL: stored.SHA256,
    }
)
"""What the record of a part holds."""


class Parts:
    """The folder of parts beside an output; `open_parts` makes one."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = parts_folder(out)
        self.records: list[PartRecord] = []
        """Of the finished parts, in order, without a gap."""
        self.printed = 0
        """How many of them `print` has written."""

    @property
    def rows(self) -> int:
        """Rows that are finished."""
        return sum(record.rows for record in self.records)

    def path(self, number: int, ending: str) -> Path:
        """The file of part `number` with an ending: .csv, .features.parquet, .json."""
        return self.folder / part_name(number, ending)

    def files(self, ending: str) -> list[Path]:
        """The files of the finished parts with an ending, in order."""
        return [self.path(number, ending) for number in range(len(self.records))]

    def begin(self, fingerprint: Fingerprint) -> None:
        """Write the fingerprint; once, before the first part is finished."""
        write_json(self.folder / FINGERPRINT, fingerprint.values)

    def finish(self, record: PartRecord) -> None:
        """Write the record of the next part, whose files are written."""
        values = dataclasses.asdict(record)
        sealed = {**values, SEAL: stored.canonical_digest(values)}
        write_json(self.path(len(self.records), ".json"), sealed)
        self.records.append(record)

    def check(self, fingerprint: Fingerprint) -> None:
        """Raise UsageError unless the finished parts have the same fingerprint."""
        begun = read_fingerprint(self.out)
        if not begun.values:
            raise UsageError(f"{self.folder / FINGERPRINT} cannot be read; --overwrite starts over")
        difference = fingerprint.difference(begun)
        if difference is not None:
            raise UsageError(
                f"{self.folder}: was started with {difference[0]}, now it is {difference[1]}; "
                "--resume needs the same inputs and options, --overwrite starts over"
            )

    def load(self) -> None:
        """Find the finished parts, and delete every other file."""
        self.records = []
        while (record := self._read(len(self.records))) is not None:
            self.records.append(record)
        self._delete_others()

    def keep_unchanged(self, source: ImageSource) -> int:
        """Delete the finished parts from the first one on whose images have changed since it was
        written; how many those are."""
        first = 0
        for number, record in enumerate(self.records):
            written = self.path(number, ".json").stat().st_mtime_ns
            if source.changed_since(written, first, first + record.rows):
                dropped = len(self.records) - number
                self.records = self.records[:number]
                self._delete_others()
                return dropped
            first += record.rows
        return 0

    def _delete_others(self) -> None:
        known = {FINGERPRINT} if self.records else set()
        for number, record in enumerate(self.records):
            known |= {part_name(number, ".json"), *record.files}
        for path in self.folder.iterdir():
            if path.name not in known:
                path.unlink()

    def deliver(self, ending: str, out: Path, names: Sequence[str] = ()) -> None:
        """Join the files of an ending and put the table at `out`, in one step.

        It is written in the folder, so that a kill leaves no half table at `out`.
        """
        joined = self.folder / f"joined{ending}"
        with atomic_path(joined) as part:
            join(self.files(ending), part, out.suffix, names)
        with writable(out.parent):
            try:
                joined.replace(out)
            except OSError as error:
                if error.errno != errno.EXDEV:  # another file system
                    raise
                with atomic_path(out) as part:
                    shutil.copyfile(joined, part)
            sync_folder(out.parent)

    def print(self, ending: str, names: Sequence[str]) -> None:
        """Write the finished parts that are not printed yet to standard output, and delete their
        files; for a folder that nothing will be resumed from."""
        files = self.files(ending)[self.printed :]
        with log.writing_output():
            copy_rows(files, sys.stdout.buffer, ending, names, header=not self.printed)
        self.printed = len(self.records)
        for path in files:
            path.unlink()

    def remove(self) -> None:
        """Delete the folder, in one step."""
        with writable(self.folder.parent):
            gone = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.part")
            self.folder.replace(gone)
            sync_folder(self.folder.parent)
            shutil.rmtree(gone, ignore_errors=True)

    def _read(self, number: int) -> PartRecord | None:
        path = self.path(number, ".json")
        if not path.exists():
            return None
        try:
            values = stored.read_json(path, record_schema, MOST_BYTES)
            if values.pop(SEAL) != stored.canonical_digest(values):
                raise ValueError("it was changed")
            record = PartRecord(**values)
            own = all(name.startswith(part_name(number, ".")) for name in record.files)
            if own and all(digest(self.folder / name) == sha for name, sha in record.files.items()):
                return record
        except (OSError, ValueError):
            pass
        log.warn(f"{path} or its rows are damaged; predicting again from there")
        return None


def part_name(number: int, ending: str) -> str:
    """The file name of a part."""
    return f"{number:08d}{ending}"


def parts_folder(out: Path) -> Path:
    """The folder of the parts of the output `out`."""
    return out.with_name(out.name + ENDING)


def read_fingerprint(out: Path) -> Fingerprint:
    """The fingerprint of an unfinished run of `out`; empty if there is none that can be read."""
    try:
        values = stored.read_json(parts_folder(out) / FINGERPRINT, fingerprint_schema, MOST_BYTES)
    except (OSError, ValueError):
        return Fingerprint({})
    return Fingerprint(values)


@contextlib.contextmanager
def open_parts(out: Path, *, resume: bool, overwrite: bool) -> Iterator[Parts]:
    """The parts of `out`, locked for this process until the end of the block.

    Raises UsageError if another run writes them, if there are finished ones and neither `resume`
    nor `overwrite` is given, or if the folder holds something else.
    """
    parts = Parts(out)
    remove_unfinished(parts.folder)
    with _locked(parts.folder, out):
        unexpected = [
            path
            for path in parts.folder.iterdir()
            if path.is_dir() or not _OURS.fullmatch(path.name)
        ]
        if unexpected:
            raise UsageError(f"{unexpected[0]} is in the way of what --out {out} writes beside it")
        if overwrite:
            for path in parts.folder.iterdir():
                path.unlink()
        parts.load()
        if parts.records and not resume:
            raise UsageError(
                f"{parts.folder} holds {parts.rows:,} rows of an interrupted run; --resume "
                "continues it, --overwrite starts over"
            )
        try:
            yield parts
        finally:
            if parts.folder.exists() and not parts.records:
                parts.remove()


@contextlib.contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Make `folder` and hold a lock on it; the system releases it when the process dies."""
    with writable(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder, f"out: another run is writing {out} at this moment") as there:
        if not there:
            raise UsageError(f"out: another run has just written {out}")
        yield
