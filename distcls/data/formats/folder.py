"""Image files on this machine: folder trees, class-per-folder trees, globs and single files.

One walk finds the images, for `prepare` as for `predict`: by their endings, and where an ending
says nothing by the first bytes; through links, in the order of their paths. Hidden entries, what
archives, desktops and storage systems leave behind, and pictures that distcls drew are no images of
the user's; they are left out and counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from distcls import log
from distcls.data.formats.layout import LOOSE, find_layout
from distcls.data.source import (
    ImageRecord,
    ImageSource,
    LabelledImages,
    LabelOptions,
    Names,
    Rejected,
    any_changed_since,
    natural_order,
    real_paths,
    state_of,
)
from distcls.errors import UsageError
from distcls.imaging.decode import SUFFIXES, looks_like_image
from distcls.imaging.reading import read_file
from distcls.stored import regular_descriptor
from distcls.task import Task

JUNK_FOLDERS = frozenset(("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"))
"""Folders that archives, NAS systems and file systems make; their files are no data."""

_OTHERS = """
    txt json jsonl csv tsv xml yaml yml toml ini cfg md rst html log py pyc ipynb sh m npy npz
    mat h5 hdf5 pkl pickle parquet arrow zip tar gz tgz bz2 xz 7z rar cls onnx pt pth pdf svg
    safetensors doc docx xls xlsx mp4 avi mov mkv webm mp3 wav db lock part url
"""
OTHER_SUFFIXES = frozenset(f".{ending}" for ending in _OTHERS.split())
"""Endings of files that are not looked into: they are no images whatever they hold."""

HEAD = 256
"""Bytes that are read of a file to see what it is."""
FEW = 1000
"""In folders of at most so many PNGs each is looked at, whether distcls drew it; in others those
with the name of a table, as `predict --show` writes them."""
OWN_PICTURE = b"Software\0distcls"
"""What `distcls.plotting` writes into the first text chunk of its PNGs."""


_ENDING = re.compile(r"\.[a-z][a-z0-9_]{0,9}")


def is_hidden(path: str) -> bool:
    """Whether a relative path leads through a hidden or junk entry, such as `a/._b.jpg`."""
    return any(name.startswith(".") or name in JUNK_FOLDERS for name in path.split("/"))


def is_image_name(name: str) -> bool:
    """Whether a file's name has the ending of an image."""
    return ending_of_name(name) in SUFFIXES


def ending_of_name(name: str) -> str:
    """The ending of a file's name in lower case, with its dot; empty where it has none."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - 10 times Path's speed


@dataclasses.dataclass(kw_only=True)
class LeftOut:
    """Counts what a search for images leaves out, and prints a line about it."""

    hidden_images: int = 0
    hidden_folders: int = 0
    circles: int = 0
    pictures: int = 0
    first: str = ""
    endings: Counter[str] = dataclasses.field(default_factory=Counter)
    """Files that are no images, by ending."""
    first_other: str = ""
    rows: list[Rejected] = dataclasses.field(default_factory=list)
    """Those that might have been images."""

    def add(self, counter: str, path: str) -> None:
        """Count one entry."""
        setattr(self, counter, getattr(self, counter) + 1)
        self.first = self.first or path
        if counter == "hidden_images":
            self.rows.append(Rejected(path, path, "hidden file"))
        if counter == "pictures":
            self.rows.append(Rejected(path, path, "picture drawn by distcls"))

    def add_other(self, path: str, *, examined: bool = False) -> None:
        """Count a file that is not an image: by its ending, or by its `examined` content."""
        ending = ending_of_name(path)
        if not _ENDING.fullmatch(ending):  # such as .0001, another one for each file
            ending = "other ending" if ending else "no ending"
        self.endings[ending] += 1
        self.first_other = self.first_other or path
        if examined:
            reason = f"no image by its content ({ending})"
            self.rows.append(Rejected(path, path, reason))

    def say(self, where: str) -> None:
        """Print a line for what is left out, and one for the files that are not images."""
        texts = (
            (self.hidden_images, "hidden image", "hidden images"),
            (self.hidden_folders, "hidden folder", "hidden folders"),
            (self.circles, "link to its own parent folder", "links to their own parent folders"),
            (self.pictures, "picture drawn by distcls", "pictures drawn by distcls"),
        )
        counts = ", ".join(log.counted(*each) for each in texts if each[0])
        if counts:
            log.say(f"{where}: left out {counts}, first {self.first}")
        if self.endings:
            number, kinds = sum(self.endings.values()), by_ending(self.endings)
            plural = "files that are not images" if number > 1 else "file that is not an image"
            log.say(f"{where}: left out {number:,} {plural} ({kinds}), first {self.first_other}")


def by_ending(endings: Mapping[str, int], most: int = 8) -> str:
    """Counts of endings as text, the largest first: `12 .txt, 1 no ending`."""
    ranked = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {ending or 'no ending'}" for ending, count in ranked[:most]]
    rest = sum(count for _, count in ranked[most:])
    return ", ".join(parts + [f"{rest:,} others"] * bool(rest))


class _Search:
    """A search for the images below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[str] = []
        self.left_out = LeftOut()
        self._tables: set[str] = set()
        """Tables in the folder that is searched, without their endings."""
        self._waiting: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(folder),))]

    def run(self) -> None:
        """Search; `found` is sorted then. Raises UsageError if a folder cannot be listed."""
        while self._waiting:
            self._search_one(*self._waiting.pop())
        self.found.sort()

    def _search_one(self, prefix: str, ancestors: tuple[str, ...]) -> None:
        found: list[str] = []
        self._tables.clear()
        with list_folder(self.folder / prefix) as entries:
            for entry in entries:
                name = entry.name
                if is_image_name(name) and not name.startswith(".") and not _is_folder(entry):
                    found.append(name)
                elif _is_folder(entry):
                    self._add_folder(entry, prefix + name, ancestors)
                else:
                    self._add_other(entry, prefix, found)
        own = self._own_pictures(prefix, found)
        self.found += [prefix + name for name in found if name not in own]

    def _add_folder(self, entry: os.DirEntry[str], path: str, ancestors: tuple[str, ...]) -> None:
        real = os.path.realpath(entry.path) if entry.is_symlink() else ""
        real = real or os.path.join(ancestors[-1], entry.name)  # noqa: PTH118 - fast
        if entry.name.startswith(".") or entry.name in JUNK_FOLDERS:
            self.left_out.add("hidden_folders", path)
        elif real in ancestors:
            self.left_out.add("circles", path)
        else:
            self._waiting.append((path + "/", (*ancestors, real)))

    def _add_other(self, entry: os.DirEntry[str], prefix: str, found: list[str]) -> None:
        """A file without an image's ending, or a hidden one."""
        name, path = entry.name, prefix + entry.name
        if name.startswith("."):
            if is_image_name(name):
                self.left_out.add("hidden_images", path)
        elif ending_of_name(name) in OTHER_SUFFIXES:
            if name.endswith((".csv", ".jsonl", ".parquet")):
                self._tables.add(name[: name.rindex(".")])
            self.left_out.add_other(path)
        elif looks_like_image(_head(entry)):
            found.append(name)
        else:
            self.left_out.add_other(path, examined=True)

    def _own_pictures(self, prefix: str, found: Sequence[str]) -> set[str]:
        """Which images of a folder distcls drew; of many those beside a table are looked at."""
        drawn = [name for name in found if name.endswith(".png")]
        if len(drawn) > FEW:
            drawn = [name for name in drawn if name[:-4] in self._tables]
        folder = self.folder / prefix
        own = {name for name in drawn if OWN_PICTURE in _read_head(f"{folder}/{name}")}
        for name in sorted(own):
            self.left_out.add("pictures", prefix + name)
        return own


def _head(entry: os.DirEntry[str]) -> bytes:
    """The first bytes of a regular file; nothing of anything else: a pipe would wait."""
    try:
        return _read_head(entry.path) if entry.is_file() else b""
    except OSError:
        return b""


def _read_head(path: str) -> bytes:
    try:
        handle = regular_descriptor(path)
        try:
            return os.read(handle, HEAD)
        finally:
            os.close(handle)
    except OSError:  # reading it as an image fails with the reason
        return b""


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

    def paths(self) -> Iterator[str]:
        """See `ImageSource`."""
        return real_paths(str(self.folder), self.files)

    def state(self) -> str:
        """See `ImageSource`."""
        return state_of(f"{self.folder}/{name}" for name in self.files)

    def changed_since(self, time_ns: int, start: int, stop: int) -> bool:
        """See `ImageSource`."""
        names = self.files[start:stop]
        return any_changed_since(time_ns, (f"{self.folder}/{name}" for name in names))


class FolderSource(FileSource):
    """All images below a folder; their class is the folder right below it, or below its splits."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError if there is no image."""
        search = _Search(folder)
        search.run()
        search.left_out.say(str(folder))
        if not search.found:
            endings = ", ".join(sorted(SUFFIXES))
            hint = f"; tar shards are named as {folder}/*.tar" if any(folder.glob("*.tar")) else ""
            raise UsageError(f"{folder}: no images in this folder (searched for {endings}){hint}")
        super().__init__(folder, search.found)
        self.left_out = search.left_out.rows

    def labelled(self, options: LabelOptions) -> LabelledImages:
        """See `ImageSource`: one folder per class, at the top or in each of the split folders.

        Raises UsageError if no image lies in a class folder, if one lies in a folder of no class
        given, and where it is not clear which folders are splits.
        """
        options.require_no_columns(self.location)
        layout = find_layout(self.folder, self.files, options, _subfolders)
        folders = {name for top in layout.tops for name in _subfolders(self.folder / top)}
        classes = options.classes or natural_order(folders)
        labels = {name: label for label, name in enumerate(classes)}
        records: list[ImageRecord] = []
        rejected: list[Rejected] = []
        for index, path in enumerate(self.files):
            top, name = layout.place(path)
            if top is None or not name:
                reason = layout.reason(path, top)
                rejected.append(Rejected(self.image_ids[index], path, reason))
            elif name not in labels:
                folder = self.folder / top / name
                raise UsageError(f"{folder}: {name!r} is not one of the {len(classes)} classes")
            else:
                record = ImageRecord(
                    index=index,
                    image_id=path,
                    path=path,
                    label=labels[name],
                    split=layout.tops[top],
                )
                records.append(record)
        self._check_found(records, rejected)
        root = self.folder.resolve()
        return LabelledImages(
            source=self,
            format="folder",
            location=str(root),
            root=root,
            task=Task(classes=classes),
            records=records,
            rejected=rejected,
        )

    def _check_found(self, records: list[ImageRecord], rejected: list[Rejected]) -> None:
        if not records:
            raise UsageError(
                f"{self.folder}: its images are not in class folders; use one folder per class, or "
                "give a manifest"
            )
        outside = Counter(row.reason for row in rejected if row.reason != LOOSE)
        for reason, count in outside.items():
            log.warn(f"{self.folder}: left out {log.counted(count, 'image')} {reason}")
        if loose := [row for row in rejected if row.reason == LOOSE]:
            images = "1 image is" if len(loose) == 1 else f"{len(loose):,} images are"
            log.warn(
                f"{images} not in a class folder and left out, first "
                f"{self.folder / str(loose[0].path)}"
            )


def complete_paths(folder: str, paths: Names, location: str) -> Names:
    """Paths below `folder` with their files' endings, and slashes for Windows' backslashes.

    Only paths without a file are changed, and where exactly one file fits; it is said how many.
    `paths` itself if there are none.
    """
    missing = {index: path for index, path in enumerate(paths) if _is_incomplete(folder, path)}
    slashed = {index: path.replace("\\", "/") for index, path in missing.items()}
    turned = {i: path for i, path in slashed.items() if os.path.isfile(_below(folder, path))}  # noqa: PTH113 - fast
    wanted: dict[str, dict[str, list[str]]] = {}
    for index, path in slashed.items():
        if index not in turned:
            parent, name = _divided(path)
            wanted.setdefault(parent, {})[name] = []
    for parent, stems in wanted.items():
        _find_stems(_below(folder, parent), stems)
    found, several = {**turned}, []
    for index in slashed.keys() - turned.keys():
        parent, name = _divided(slashed[index])
        fitting = wanted[parent][name]
        if len(fitting) == 1:
            found[index] = parent + fitting[0]
        elif fitting:
            several.append(index)
    if several:
        log.warn(
            f"{location}: {len(several):,} paths without an ending match several files, first "
            f"{missing[min(several)]!r}"
        )
    if not found:
        return paths
    first = min(found)
    log.say(
        f"{location}: {len(found):,} paths are completed, first {missing[first]!r} is "
        f"{found[first]}"
    )
    return Names.of(found.get(index, path) for index, path in enumerate(paths))


def _is_incomplete(folder: str, path: str) -> bool:
    """Whether a path has no image's ending, or a backslash, and there is no such file."""
    if (is_image_name(path) and "\\" not in path) or "://" in path or "\0" in path:
        return False
    return not os.path.lexists(_below(folder, path))


def _divided(path: str) -> tuple[str, str]:
    """The folder with its slash, and the name."""
    parent, slash, name = path.rpartition("/")
    return parent + slash, name


def _below(folder: str, path: str) -> str:
    return os.path.join(folder, path)  # noqa: PTH118 - `path` may be absolute; fast


def _find_stems(folder: str, stems: dict[str, list[str]]) -> None:
    """Add to each of `stems` the images in `folder` of that name and any ending."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            stem, ending = os.path.splitext(entry.name)  # noqa: PTH122 - fast
            if stem in stems and ending.lower() in SUFFIXES:
                stems[stem].append(entry.name)


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders below, sorted, without hidden ones."""
    with list_folder(folder) as entries:
        return sorted(e.name for e in entries if _is_folder(e) and not is_hidden(e.name))


def matching_files(pattern: str) -> tuple[Path, list[str]]:
    """The files that match a glob, sorted, relative to the part of it without wildcards.

    As in a shell, hidden entries match only where the pattern names them. Brackets of a pattern
    that matches nothing are tried as part of the names. Raises UsageError if there is none.
    """
    base, files = _matching(pattern, glob.has_magic)
    if not files and "[" in pattern:
        base, files = _matching(pattern.replace("[", "[[]"), lambda part: bool(_WILD.search(part)))
        if files:
            log.say(f"{pattern}: matches nothing; its brackets are taken literally")
    if not files:
        hint = "; [...] stands for one of its characters" if "[" in pattern else ""
        raise UsageError(f"{pattern}: no file matches{hint}")
    return base, files


_WILD = re.compile(r"[*?]")


def _matching(pattern: str, is_wild: Callable[[str], bool]) -> tuple[Path, list[str]]:
    fixed = itertools.takewhile(lambda part: not is_wild(part), Path(pattern).parts[:-1])
    base = Path(
        *(part.replace("[[]", "[") if is_wild is not glob.has_magic else part for part in fixed)
    )
    found = (Path(name) for name in glob.iglob(pattern, recursive=True))  # noqa: PTH207 - takes absolute patterns
    below = (file.relative_to(base) for file in found if file.is_file())
    return base, sorted(
        file.as_posix() for file in below if not JUNK_FOLDERS.intersection(file.parts)
    )
