"""What kind of source this is, and reading it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from distcls.data.layout import INFO, MANIFEST
from distcls.data.sources import tables
from distcls.data.sources.answers import AnswerColumns
from distcls.data.sources.digits import read_digits
from distcls.data.sources.folders import read_folder
from distcls.data.sources.idx import find_idx, read_idx_folder
from distcls.data.sources.source import Source, read_classes
from distcls.errors import UsageError

Format = Literal["auto", "digits", "idx", "fashion-mnist", "mnist", "folder", "manifest"]
FORMATS = get_args(Format)


def read_source(
    location: str,
    form: Format = "auto",
    classes: Path | None = None,
    weight_column: str | None = None,
    answers: AnswerColumns | None = None,
) -> Source:
    """Find the images of a source; none is decoded yet.

    `digits` is the bundled set, `./digits` a folder. `classes` is a file of class names in label
    order, which labels are then checked against; `weight_column` and `answers` belong to manifests.
    Raises UsageError for anything wrong.
    """
    source = _read(location, form, classes, weight_column, answers)
    named = {"weight_column": weight_column}
    if answers is not None:
        named[answers.options[0]] = answers.names[0]
    for option, column in named.items():
        if column is not None and source.kind != "manifest":
            raise UsageError(
                f"{option}: {column!r} is a column of a manifest, but {location} is none"
            )
    return source


def _read(
    location: str,
    form: Format,
    classes: Path | None,
    weight_column: str | None,
    answers: AnswerColumns | None,
) -> Source:
    if form == "digits" or (form == "auto" and location == "digits"):
        if location != "digits" or classes:
            raise UsageError("the bundled digits are `digits`, with their own classes")
        return read_digits()
    path = Path(location).expanduser()
    if not path.exists():
        raise UsageError(f"{location}: no such file or folder (digits is the bundled data set)")
    kind = form if form != "auto" else _detect(path)
    if path.is_dir() == (kind == "manifest"):
        needed = "a file" if kind == "manifest" else "a folder"
        raise UsageError(f"{location}: --format {kind} needs {needed}")
    names = read_classes(classes) if classes else None
    if kind == "manifest":
        return tables.read_manifest(path, names, weight_column, answers)
    if kind == "folder":
        return read_folder(path, names)
    return read_idx_folder(path, "auto" if form == "auto" else kind, names)


def _detect(path: Path) -> Format:
    if path.is_file():
        if path.suffix.lower() in tables.SUFFIXES:
            return "manifest"
        endings = " or ".join(tables.SUFFIXES)
        raise UsageError(f"{path}: expected digits, a folder, or a manifest ending in {endings}")
    try:
        if (path / INFO).exists() and (path / MANIFEST).exists():
            raise UsageError(f"{path} is a dataset directory already; use it as --data")
        return "idx" if find_idx(path) else "folder"
    except OSError as error:
        raise UsageError(f"{path}: cannot be listed: {error.strerror}") from error
