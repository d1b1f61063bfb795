"""Folders of image files: one folder per class, split folders, plain folders and globs."""

from __future__ import annotations

import glob
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from distcls import log
from distcls.data.source import (
    SPLIT_NAMES,
    ImageRecord,
    ImageSource,
    LabelledSource,
    Names,
    from_encoded,
    natural_order,
)
from distcls.errors import UsageError
from distcls.imaging.decode import SUFFIXES, read_file
from distcls.task import Task


def read_folder(root: Path, names: tuple[str, ...] | None) -> LabelledSource:
    """All images of a tree, found by their endings; the classes in the order of their names.

    Raises UsageError if there are none, or if they do not lie in one folder a class.
    """
    root = root.resolve()
    splits = _split_folders(root)
    tops: list[tuple[Path, str | None]] = [*splits] or [(root, None)]
    strays = [path for top, _ in tops for path in _loose_images(top)]
    if splits:
        strays += _loose_images(root)
    folders = [(f, split) for top, split in tops for f in _subfolders(top)]
    classes = names or natural_order(folder.name for folder, _ in folders)
    index = {name: label for label, name in enumerate(classes)}
    records: list[ImageRecord] = []
    for folder, split in folders:
        files = list(_images(folder))
        if folder.name not in index:
            if not files:
                continue
            raise UsageError(f"{folder}: {folder.name!r} is not one of the {len(classes)} classes")
        label = index[folder.name]
        for path in files:
            name = path.relative_to(root).as_posix()
            records.append(ImageRecord(image_id=name, path=name, label=label, split=split))
    _check_found(root, records, strays)
    return LabelledSource(
        kind="folder", location=str(root), root=root, task=Task(classes=classes), records=records
    )


def _check_found(root: Path, records: list[ImageRecord], strays: list[Path]) -> None:
    if not records and strays:
        raise UsageError(
            f"{root}: its images lie in no class folder; make one a class, or give a manifest"
        )
    if not records:
        endings = ", ".join(sorted(SUFFIXES))
        raise UsageError(f"{root}: no images; looked for files that end in {endings}")
    if strays:
        log.warn(f"{len(strays)} images lie in no class folder and are left out, first {strays[0]}")


def _split_folders(root: Path) -> list[tuple[Path, str]]:
    """The folders of splits, if the tree has them; a class may be called `train` all the same."""
    folders = _subfolders(root)
    named = [(f, SPLIT_NAMES[f.name.lower()]) for f in folders if f.name.lower() in SPLIT_NAMES]
    kinds = {split for _, split in named}
    others = [folder for folder in folders if folder.name.lower() not in SPLIT_NAMES]
    if "train" not in kinds or (others and len(kinds) == 1):
        return []
    if others:
        log.warn(f"{root} has folders of splits; left out: {', '.join(f.name for f in others)}")
    return sorted(named, key=lambda pair: ("train", "val", "test").index(pair[1]))


def _subfolders(folder: Path) -> list[Path]:
    """Folders below, sorted, without hidden ones and what macOS leaves in archives."""
    inside = (path for path in _listed(folder) if path.is_dir())
    return [path for path in inside if not path.name.startswith((".", "__MACOSX"))]


def _loose_images(folder: Path) -> list[Path]:
    return [path for path in _listed(folder) if _is_image(path.name) and path.is_file()]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UsageError(f"{folder}: cannot be listed: {error.strerror}") from error


def _images(folder: Path) -> Iterator[Path]:
    """Images at any depth, in sorted order; links are followed, but no folder twice."""
    seen: set[str] = set()
    for top, below, files in os.walk(folder, followlinks=True, onerror=_cannot_list):
        real = os.path.realpath(top)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield from (Path(top) / name for name in sorted(files) if _is_image(name))


def _cannot_list(error: OSError) -> None:
    raise UsageError(f"{error.filename}: cannot be listed: {error.strerror}") from error


def _is_image(name: str) -> bool:
    # files of the kind ._cat.jpg are what macOS leaves beside cat.jpg
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


_UNKNOWN = (-1, -1)
"""Size and time of a file that cannot be looked up."""


def from_folder(folder: Path) -> ImageSource:
    """All images below a folder, in the order of their paths. UsageError if there is none."""
    files = sorted(_walk(folder))
    if not files:
        endings = ", ".join(sorted(SUFFIXES))
        hint = f"; tar shards are named as {folder}/*.tar" if any(folder.glob("*.tar")) else ""
        raise UsageError(f"{folder}: no images in this folder (searched for {endings}){hint}")
    return from_files(folder, files)


def from_files(folder: Path, files: Iterable[str]) -> ImageSource:
    """Files by their paths below `folder`, which are their names."""
    names = Names.of(files)
    place = str(folder)

    def read(index: int) -> bytes:
        return read_file(Path(place, names[index]))

    return from_encoded(
        names.printable(),
        read,
        state=lambda: state_of(f"{place}/{name}" for name in names),
    )


def matching(pattern: str) -> tuple[Path, list[str]]:
    """The files that match a glob, sorted, relative to the part of it without wildcards.

    Raises UsageError if there is none.
    """
    base = _fixed_part(Path(pattern))
    found = (Path(name) for name in glob.iglob(pattern, recursive=True))  # noqa: PTH207 - takes absolute patterns
    files = sorted(file.relative_to(base).as_posix() for file in found if file.is_file())
    if not files:
        raise UsageError(f"{pattern}: no file matches")
    return base, files


def state_of(paths: Iterable[str]) -> str:
    """SHA-256 of the sizes and modification times of files, hexadecimal."""
    total = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116 - half the time of Path's, a million times
            known = (status.st_size, status.st_mtime_ns)
        except (OSError, ValueError):  # gone, or a name that no file can have
            known = _UNKNOWN
        total.update(struct.pack("<qq", *known))
    return total.hexdigest()


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
        below = Path(place).relative_to(folder).as_posix()
        prefix = "" if below == "." else below + "/"
        for name in names:
            if os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122 - 10 times Path's speed
                yield prefix + name


def _fixed_part(pattern: Path) -> Path:
    fixed = Path()
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed
