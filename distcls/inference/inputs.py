"""What to predict: a folder, a glob, one image or a manifest, as one indexed source."""

from __future__ import annotations

import csv
import dataclasses
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distcls.errors import UsageError
from distcls.imaging import decode_file
from distcls.imaging.decode import SUFFIXES
from distcls.targets import Targets

PATH_COLUMNS = ("path", "file", "filename", "image", "image_id")
"""Columns of a manifest that may hold the file's path, the first that is there wins."""

Images = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Images by index, in the order in which they are answered."""

    image_ids: Sequence[str]
    """Their names in the output."""
    load: Callable[[int], Images]
    """Decodes one: index to uint8 RGB [h, w, 3]. Raises BadImage; called from many threads."""
    truths: Sequence[str | None] | None = None
    """Their true classes, where known."""
    uniform: Images | None = None
    """All of them as one array [N, H, W, 1 or 3], where there is such a one."""

    def __len__(self) -> int:
        return len(self.image_ids)


class LabelledSplit(Protocol):
    """What is used of a dataset's split (see `distcls.data.dataset.Split`)."""

    @property
    def image_ids(self) -> list[str]:
        """Names."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class indices, [N]; of several answers [N, heads] or [N, labels]."""

    @property
    def targets(self) -> Targets:
        """What they are answers to."""

    @property
    def uniform(self) -> Images | None:
        """All images as one array, where possible."""

    def image(self, index: int) -> Images:
        """One image."""


def from_split(split: LabelledSplit, classes: Sequence[str]) -> Source:
    """The images of a dataset's split; of several answers the truths are texts."""
    targets = split.targets
    single = [classes[label] for label in split.labels] if targets.single else None
    return Source(
        image_ids=split.image_ids,
        load=split.image,
        truths=targets.texts(split.labels) if single is None else single,
        uniform=split.uniform,
    )


def open_input(text: str) -> Source:
    """Find the images that `text` means; nothing is decoded yet.

    A path's name is its path below the folder, or below the part of the glob without wildcards.
    Raises UsageError if there is nothing, or no image.
    """
    path = Path(text)
    if path.is_dir():
        files = sorted(_walk(path))
        if not files:
            endings = ", ".join(sorted(SUFFIXES))
            raise UsageError(f"{path}: no images in this folder (searched for {endings})")
        return _from_files(path, files)
    if path.suffix.lower() in (".csv", ".parquet") and path.is_file():
        return _from_manifest(path)
    if path.is_file():
        return _from_files(path.parent, [path.name])
    if not glob.has_magic(text):
        raise UsageError(f"{text}: no such file or folder")
    base = _fixed_part(path)
    found = (Path(name) for name in glob.iglob(text, recursive=True))  # noqa: PTH207 - takes absolute patterns
    files = sorted(file.relative_to(base).as_posix() for file in found if file.is_file())
    if not files:
        raise UsageError(f"{text}: no file matches")
    return _from_files(base, files)


def _from_files(folder: Path, files: list[str]) -> Source:
    return Source(
        image_ids=[_printable(name) for name in files],
        load=lambda index: decode_file(folder / files[index]),
    )


def _walk(folder: Path) -> Iterator[str]:
    """Paths of the images below `folder`, relative to it; links are followed, circles are not."""
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        for name in names:
            if os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122 - 10 times Path's speed
                yield Path(place, name).relative_to(folder).as_posix()


def _fixed_part(pattern: Path) -> Path:
    fixed = Path()
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed


def _printable(name: str) -> str:
    """A name as valid Unicode: bytes that are not UTF-8 appear as \\x.."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _from_manifest(path: Path) -> Source:
    columns = _read_csv(path) if path.suffix.lower() == ".csv" else _read_parquet(path)
    name = next((column for column in PATH_COLUMNS if column in columns), None)
    if name is None:
        raise UsageError(
            f"{path}: no column with the images' paths, expected one of {', '.join(PATH_COLUMNS)}"
        )
    files = columns[name]
    if not files:
        raise UsageError(f"{path}: lists no images")
    paths: list[str] = []
    for row, file in enumerate(files, start=1):
        if not file:
            raise UsageError(f"{path}, row {row}: column {name!r} is empty")
        paths.append(file)
    ids = columns.get("image_id", files)
    return Source(
        image_ids=[given or file for given, file in zip(ids, paths, strict=True)],
        load=lambda index: decode_file(path.parent / paths[index]),
        truths=columns.get("label"),
    )


def _read_csv(path: Path) -> dict[str, list[str | None]]:
    """Columns of text. Python's own reader: it takes line breaks in names and guesses no types."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.reader(handle, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    rows = [row for row in rows if row]
    if not rows:
        raise UsageError(f"{path}: is empty, expected a line of column names")
    header, *body = rows
    for number, row in enumerate(body, start=1):
        if len(row) != len(header):
            raise UsageError(f"{path}, row {number}: {len(row)} values, expected {len(header)}")
    return {
        column.strip(): [row[position] or None for row in body]
        for position, column in enumerate(header)
    }


def _read_parquet(path: Path) -> dict[str, list[str | None]]:
    try:
        with pq.ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if name in (*PATH_COLUMNS, "label")]
            table = file.read(columns=wanted)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    return {
        name: [None if value is None else str(value) for value in table.column(name).to_pylist()]
        for name in wanted
    }
