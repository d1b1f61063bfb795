"""Image files on this machine: folder trees, class-per-folder trees, globs and single files.

One walk finds the images, for `prepare` as for `predict`: by their endings, through links, in the
order of their paths. Hidden entries and what archives, desktops and storage systems leave behind
are no images of the user's; they are left out and counted.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from distcls import log
from distcls.data.source import (
    SPLIT_NAMES,
    ImageRecord,
    ImageSource,
    LabelledImages,
    LabelOptions,
    Names,
    natural_order,
    state_of,
)
from distcls.errors import UsageError
from distcls.imaging.decode import SUFFIXES, read_file
from distcls.task import Task

JUNK_FOLDERS = frozenset(("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"))
"""Folders that archives, NAS systems and file systems make; their files are no data."""


def is_hidden(path: str) -> bool:
    """Whether a relative path leads through a hidden or junk entry, such as `a/._b.jpg`."""
    return any(name.startswith(".") or name in JUNK_FOLDERS for name in path.split("/"))


def is_image_name(name: str) -> bool:
    """Whether a file's name has the ending of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 - 10 times Path's speed


@dataclasses.dataclass(kw_only=True)
class LeftOut:
    """Counts what a search for images leaves out, and prints one line about it."""

    hidden_images: int = 0
    hidden_folders: int = 0
    circles: int = 0
    first: str = ""

    def add(self, counter: str, path: str) -> None:
        """Count one entry."""
        setattr(self, counter, getattr(self, counter) + 1)
        self.first = self.first or path

    def say(self, where: str) -> None:
        """Print the line, if anything was left out."""
        texts = (
            (self.hidden_images, "hidden images"),
            (self.hidden_folders, "hidden folders"),
            (self.circles, "links back into their own folder"),
        )
        counts = ", ".join(f"{count:,} {text}" for count, text in texts if count)
        if counts:
            log.say(f"{where}: left out {counts}, first {self.first}")


def find_images(folder: Path) -> list[str]:
    """Paths of all images below `folder`, relative to it, sorted.

    Links are followed; a folder that lies in itself is not entered again. Raises UsageError for a
    folder that cannot be listed.
    """
    found: list[str] = []
    left_out = LeftOut()
    root = os.path.realpath(folder)
    waiting: list[tuple[str, tuple[str, ...]]] = [("", (root,))]
    while waiting:
        prefix, ancestors = waiting.pop()
        with list_folder(folder / prefix) as entries:
            for entry in entries:
                name, path = entry.name, prefix + entry.name
                if is_image_name(name) and not name.startswith(".") and not _is_folder(entry):
                    found.append(path)
                elif _is_folder(entry):
                    real = os.path.realpath(entry.path) if entry.is_symlink() else ""
                    real = real or os.path.join(ancestors[-1], name)  # noqa: PTH118 - fast
                    if name.startswith(".") or name in JUNK_FOLDERS:
                        left_out.add("hidden_folders", path)
                    elif real in ancestors:
                        left_out.add("circles", path)
                    else:
                        waiting.append((path + "/", (*ancestors, real)))
                elif is_image_name(name):
                    left_out.add("hidden_images", path)
    left_out.say(str(folder))
    found.sort()
    return found


def list_folder(folder: Path) -> os._ScandirIterator[str]:
    """The entries of a folder, to be closed. Raises UsageError if it cannot be listed."""
    try:
        return os.scandir(folder)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be listed: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: reading it fails with the reason
        return False


class FileSource(ImageSource):
    """Files by their paths below a folder, which are their names."""

    def __init__(self, folder: Path, files: Iterable[str], location: str = "") -> None:
        """`files` are relative to `folder`."""
        self.folder = folder
        self.files = Names.of(files)
        self.location = location or str(folder)
        self._image_ids = self.files.printable()

    @property
    def image_ids(self) -> Sequence[str]:
        """See `ImageSource`."""
        return self._image_ids

    def read(self, index: int) -> bytes:
        """See `ImageSource`."""
        return read_file(self.folder / self.files[index])

    def state(self) -> str:
        """See `ImageSource`."""
        return state_of(f"{self.folder}/{name}" for name in self.files)


class FolderSource(FileSource):
    """All images below a folder; their class is the folder right below it, or below its splits."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError if there is no image."""
        files = find_images(folder)
        if not files:
            endings = ", ".join(sorted(SUFFIXES))
            hint = f"; tar shards are named as {folder}/*.tar" if any(folder.glob("*.tar")) else ""
            raise UsageError(f"{folder}: no images in this folder (searched for {endings}){hint}")
        super().__init__(folder, files)

    def labelled(self, options: LabelOptions) -> LabelledImages:
        """See `ImageSource`: one folder per class, at the top or in each of the split folders.

        Raises UsageError if no image lies in a class folder, or if one lies in a folder of no class
        given.
        """
        options.require_no_columns(self.location)
        splits = _split_folders(self.folder)
        tops: dict[str, str | None] = {**splits} or {"": None}
        folders = {name for top in tops for name in _subfolders(self.folder / top)}
        classes = options.classes or natural_order(folders)
        labels = {name: label for label, name in enumerate(classes)}
        records: list[ImageRecord] = []
        loose: list[str] = []
        for index, path in enumerate(self.files):
            top, name, below = _class_folder(path, splits)
            if below is None:
                loose += [path] * (top in tops or "/" not in path)
            elif name not in labels:
                folder = self.folder / top / name
                raise UsageError(f"{folder}: {name!r} is not one of the {len(classes)} classes")
            else:
                record = ImageRecord(
                    index=index, image_id=path, path=path, label=labels[name], split=tops[top]
                )
                records.append(record)
        self._check_found(records, loose)
        root = self.folder.resolve()
        return LabelledImages(
            source=self,
            format="folder",
            location=str(root),
            root=root,
            task=Task(classes=classes),
            records=records,
        )

    def _check_found(self, records: list[ImageRecord], loose: list[str]) -> None:
        if not records:
            raise UsageError(
                f"{self.folder}: its images lie in no class folder; make one folder per class, or "
                "give a manifest"
            )
        if loose:
            log.warn(
                f"{len(loose)} images lie in no class folder and are left out, first "
                f"{self.folder / loose[0]}"
            )


def _class_folder(path: str, splits: dict[str, str]) -> tuple[str, str, str | None]:
    """The split folder, class folder and rest of an image's path; no rest without a class."""
    top, rest = "", path
    if splits:
        top, _, rest = path.partition("/")
        if top not in splits:
            return top, "", None
    name, slash, below = rest.partition("/")
    return top, name, below if slash else None


def _split_folders(root: Path) -> dict[str, str]:
    """The split of each split folder, if there are any; a class may be called `train` as well."""
    folders = _subfolders(root)
    named = {name: SPLIT_NAMES[name.lower()] for name in folders if name.lower() in SPLIT_NAMES}
    others = [name for name in folders if name not in named]
    splits = set(named.values())
    if splits == {"test"} and not others:
        return named  # a later test set; as a class it would be the only one
    if "train" not in splits or (others and len(splits) == 1):
        return {}
    if others:
        log.warn(f"{root} has folders of splits; left out: {', '.join(others)}")
    return named


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders below, sorted, without hidden ones."""
    with list_folder(folder) as entries:
        return sorted(e.name for e in entries if _is_folder(e) and not is_hidden(e.name))


def matching_files(pattern: str) -> tuple[Path, list[str]]:
    """The files that match a glob, sorted, relative to the part of it without wildcards.

    As in a shell, hidden entries match only where the pattern names them. Raises UsageError if
    there is none.
    """
    base = _fixed_part(Path(pattern))
    found = (Path(name) for name in glob.iglob(pattern, recursive=True))  # noqa: PTH207 - takes absolute patterns
    below = (file.relative_to(base) for file in found if file.is_file())
    files = sorted(file.as_posix() for file in below if not JUNK_FOLDERS.intersection(file.parts))
    if not files:
        raise UsageError(f"{pattern}: no file matches")
    return base, files


def _fixed_part(pattern: Path) -> Path:
    fixed = Path()
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed
