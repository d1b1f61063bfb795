"""The finished parts of an output that is being made: what survives a kill, and what it is of.

pre.csv.parts/
    identity.json    what the rows are made from: digests of inputs and models, and the options
    00000000.csv     rows 0 to 4095, and so on; .features.parquet beside it where asked for
    00000000.json    how many rows and errors, and the files' SHA-256; written last

A part counts once its record (the .json) is there and its files are what it says. Rows belong to
a part by their number alone, so a run that was killed goes on with the same parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distcls import log
from distcls.batch.table import join
from distcls.errors import UsageError
from distcls.files import atomic_path, digest, remove_stale_parts, sync_folder, writable, write_json

ENDING = ".parts"
IDENTITY = "identity.json"
_OURS = re.compile(r"\.?(identity\.json|\d{8}\.[\w.]+|whole\.[\w.]+)(\..*\.part)?")

Identity = dict[str, Any]
"""Plain values by what they are called to the user; equal ones give equal rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What is known of one finished part."""

    rows: int
    errors: int
    abstained: int
    first_error: str
    """Name and reason of the first bad image; empty if there is none."""
    picked: list[list[Any]]
    """What `Gallery` has chosen of it."""
    files: dict[str, str]
    """SHA-256 of each file, by its name."""


class Parts:
    """The folder beside an output; `opened` makes one."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = folder_of(out)
        self.records: list[PartRecord] = []
        """Of the finished parts, in order, without a gap."""

    @property
    def rows(self) -> int:
        """Rows that are finished."""
        return sum(record.rows for record in self.records)

    def path(self, number: int, ending: str) -> Path:
        """Where the rows of part `number` are kept, by ending: .csv, .features.parquet."""
        return self.folder / name_of(number, ending)

    def files(self, ending: str) -> list[Path]:
        """The finished files of an ending, in order."""
        return [self.path(number, ending) for number in range(len(self.records))]

    def begin(self, identity: Identity) -> None:
        """Say what the parts are made from; once, before the first is finished."""
        write_json(self.folder / IDENTITY, identity)

    def finish(self, record: PartRecord) -> None:
        """Add the next part, whose files are written, to the finished ones."""
        write_json(self.path(len(self.records), ".json"), dataclasses.asdict(record))
        self.records.append(record)

    def check(self, identity: Identity) -> None:
        """Raise UsageError unless the finished parts are made from the same."""
        begun = begun_with(self.out)
        if not begun:
            raise UsageError(f"{self.folder / IDENTITY} cannot be read; --overwrite starts anew")
        for key in {**begun, **identity}:
            if begun.get(key) != identity.get(key):
                raise UsageError(
                    f"{self.folder}: was begun with {_said(key, begun.get(key))}, now it is "
                    f"{_said(key, identity.get(key))}; --resume needs the same, --overwrite "
                    "starts anew"
                )

    def load(self) -> None:
        """Find the finished parts, and clear away what is none."""
        self.records = []
        while (record := self._read(len(self.records))) is not None:
            self.records.append(record)
        known = {IDENTITY} if self.records else set()
        for number, record in enumerate(self.records):
            known |= {name_of(number, ".json"), *record.files}
        for path in self.folder.iterdir():
            if path.name not in known:
                path.unlink()

    def deliver(self, ending: str, out: Path, names: Sequence[str] = ()) -> None:
        """Make the files of an ending one table and put it at `out`, in one step.

        It is made in the folder, where a run that is killed leaves nothing that stays.
        """
        whole = self.folder / f"whole{ending}"
        with atomic_path(whole) as part:
            join(self.files(ending), part, out.suffix, names)
        with writable(out.parent):
            try:
                whole.replace(out)
            except OSError as error:
                if error.errno != errno.EXDEV:  # another file system
                    raise
                with atomic_path(out) as part:
                    shutil.copyfile(whole, part)
            sync_folder(out.parent)

    def remove(self) -> None:
        """Delete the folder; to anybody who looks it is gone at once."""
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
            record = PartRecord(**json.loads(path.read_text(encoding="utf-8")))
            if all(digest(self.folder / name) == sha for name, sha in record.files.items()):
                return record
        except (OSError, ValueError, TypeError, AttributeError):
            pass
        log.warn(f"{path} and its rows are damaged; predicted again from there")
        return None


def name_of(number: int, ending: str) -> str:
    """The name of a file of a part."""
    return f"{number:08d}{ending}"


def folder_of(out: Path) -> Path:
    """Where the parts of the output `out` are kept."""
    return out.with_name(out.name + ENDING)


def begun_with(out: Path) -> Identity:
    """What an unfinished run of `out` was begun with; empty if there is none that can be read."""
    try:
        found = json.loads((folder_of(out) / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def opened(out: Path, *, resume: bool, overwrite: bool) -> Iterator[Parts]:
    """The parts of `out`, for this process alone until the end of the block.

    Raises UsageError if another run writes them, if there are finished ones and neither `resume`
    nor `overwrite` says what to do with them, or if the folder holds something else.
    """
    parts = Parts(out)
    remove_stale_parts(parts.folder)
    with _claimed(parts.folder, out):
        foreign = [path for path in parts.folder.iterdir() if not _OURS.fullmatch(path.name)]
        if foreign:
            raise UsageError(f"{foreign[0]} is in the way of what --out {out} writes beside it")
        if overwrite:
            for path in parts.folder.iterdir():
                path.unlink()
        parts.load()
        if parts.records and not resume:
            raise UsageError(
                f"{parts.folder} holds {parts.rows:,} rows of a run that did not end; --resume "
                "continues it, --overwrite starts anew"
            )
        try:
            yield parts
        finally:
            if parts.folder.exists() and not parts.records:
                parts.remove()


@contextlib.contextmanager
def _claimed(folder: Path, out: Path) -> Iterator[None]:
    """Make `folder` and hold a lock on it; the system drops it when the process dies."""
    with writable(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"out: another run is writing {out} at this moment") from error
        except OSError:  # some network file systems have no locks
            pass
        if not folder.exists() or folder.stat().st_ino != os.fstat(descriptor).st_ino:
            raise UsageError(f"out: another run has just written {out}")
        yield
    finally:
        os.close(descriptor)


def _said(key: str, value: Any) -> str:
    if value is None:
        return f"no {key}"
    if key in ("inputs", "model"):
        return f"{key} {str(value)[:12]}"
    return f"{key} {value}"
