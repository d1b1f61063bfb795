"""Tar shards as WebDataset lays them out: KEY.jpg, with KEY.cls beside it where the class is known.

Nothing is unpacked: tarfile reads the headers once, after that each image is read in place, in the
order of the shard, so that the disk is read sequentially.

tarfile knows every dialect of headers and takes 20 us for one (measured on 200,000 members; a
custom parser took 6 us, and decoding an image takes 1,000).

The class file's content is a number or a name (https://github.com/webdataset/webdataset). That
library itself only streams; here images are read by index, shuffled and resumed.
"""

from __future__ import annotations

import array
import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

from distcls import log
from distcls.data.formats.folder import OTHER_SUFFIXES, LeftOut, is_hidden
from distcls.data.source import (
    ImageRecord,
    ImageSource,
    LabelledImages,
    LabelOptions,
    Names,
    NamesBuilder,
    natural_order,
    state_of,
)
from distcls.errors import BadImage, UsageError, did_you_mean
from distcls.imaging.decode import SUFFIXES
from distcls.imaging.reading import read_file
from distcls.task import Task

_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)
"""What tarfile raises for damaged headers."""
LONGEST_CLASS = 1 << 16
"""Bytes of a class file."""
MOST_SHARDS = 100_000
"""Names that the braces of a pattern may make."""
MOST_BRACES = 100
_BRACES = re.compile(r"\{([^{}]*)\}")


class Member(NamedTuple):
    """A file in a shard."""

    name: str
    offset: int
    size: int


class TarSource(ImageSource):
    """The images of tar shards, one shard after the other."""

    def __init__(self, paths: Sequence[Path], location: str = "") -> None:
        """Raises UsageError for an incomplete tar file, or if there is no image in any."""
        self.location = location or str(paths[0])
        self._paths = list(paths)
        self._shard = array.array("i")
        self._offset = array.array("q")
        self._size = array.array("q")
        self._class_offset = array.array("q")
        self._class_size = array.array("q")
        self._left_out = LeftOut()
        names = NamesBuilder()
        distinct = len({path.stem for path in paths}) == len(paths)
        for number, path in enumerate(self._paths):
            shard = path.stem if distinct else str(path.with_suffix(""))
            names.extend(self._index(number, path, shard))
        self._left_out.say(self.location)
        self.left_out = self._left_out.rows
        self._names = names.names()
        self._image_ids = self._names.printable()
        if not len(self._names):
            endings = ", ".join(sorted(SUFFIXES))
            raise UsageError(f"{paths[0]}: no images in {_count(paths)} (searched for {endings})")

    @property
    def image_ids(self) -> Names:
        """See `ImageSource`: SHARD/KEY."""
        return self._image_ids

    def read(self, index: int) -> bytes:
        """See `ImageSource`."""
        return self._read(self._shard[index], self._offset[index], self._size[index])

    @property
    def true_labels(self) -> Sequence[str | None]:
        """See `ImageSource`; read from the shards on access."""
        return _ClassFiles(self)

    def state(self) -> str:
        """See `ImageSource`."""
        return state_of(map(str, self._paths))

    def labelled(self, options: LabelOptions) -> LabelledImages:
        """See `ImageSource`. A class is a name, or where `classes` are given also its index.

        Raises UsageError naming the image without a class.
        """
        options.require_no_columns(self.location)
        texts = [self.class_of(index) for index in range(len(self))]
        if None in texts:
            name = self._names[texts.index(None)]
            raise UsageError(
                f"{self.location}: {name!r} has no class, expected a KEY.cls beside it"
            )
        classes = options.classes or natural_order(text for text in texts if text is not None)
        # the numbers count from 0, or from 1 where only that gives each its class
        own = set(texts) <= set(classes)
        start = int(not own and str(len(classes)) in texts and "0" not in texts)
        numbers = range(len(classes)) if options.classes else ()
        labels = {str(start + label): label for label in numbers}
        if labels and start:
            log.say(f"{self.location}: classes are numbered from 1: 1 is {classes[0]!r}")
        labels |= {name: label for label, name in enumerate(classes)}
        records = []
        for index, (image_id, text) in enumerate(zip(self._names, texts, strict=True)):
            if text not in labels:
                hint = did_you_mean(str(text), classes)
                raise UsageError(
                    f"{self.location}: {image_id!r} has the class {text!r}, which is not one of "
                    f"the classes{hint}"
                )
            records.append(ImageRecord(index=index, image_id=image_id, label=labels[text]))
        _check_unique(self.location, records)
        return LabelledImages(
            source=self,
            format="tar",
            location=os.path.abspath(self.location),  # noqa: PTH100 - a pattern is not a path
            root=None,
            task=Task(classes=classes),
            records=records,
        )

    def class_of(self, index: int) -> str | None:
        """The content of an image's class file, a number or a name; None without one."""
        if self._class_size[index] < 0:
            return None
        if self._class_size[index] > LONGEST_CLASS:
            raise UsageError(
                f"{self.location}: {self._image_ids[index]!r} has a class of "
                f"{self._class_size[index]:,} bytes, expected a number or a name"
            )
        place = self._shard[index], self._class_offset[index], self._class_size[index]
        return self._read(*place).decode("utf-8", "replace").strip() or None

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        data = read_file(self._paths[shard], offset, size)
        if len(data) != size:
            raise BadImage("cannot be read: the shard was truncated")
        return data

    def _index(self, number: int, path: Path, shard: str) -> list[str]:
        """Add the images of a shard; their names, SHARD/KEY."""
        members = [(*_split(member.name), member) for member in members_of(path)]
        classes = {key: member for key, ending, member in members if ending == ".cls"}
        names: list[str] = []
        used: set[str] = set()
        for key, ending, member in members:
            if ending not in SUFFIXES:
                if ending not in OTHER_SUFFIXES:
                    self._left_out.add_other(member.name)
                continue
            if is_hidden(key):
                self._left_out.add("hidden_images", f"{shard}/{member.name}")
                continue
            known = classes.get(key)
            self._shard.append(number)
            self._offset.append(member.offset)
            self._size.append(member.size)
            self._class_offset.append(known.offset if known else 0)
            self._class_size.append(known.size if known else -1)
            name = key + ending if key in used else key  # KEY.png beside KEY.jpg
            used.add(key)
            names.append(f"{shard}/{name}")
        return names


class _ClassFiles(Sequence[str | None]):
    """Labels that are read on access: most runs need few of a shard's thousands."""

    def __init__(self, source: TarSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[str | None]: ...
    def __getitem__(self, index: int | slice) -> str | list[str | None] | None:
        if isinstance(index, slice):
            return [self._source.class_of(place) for place in range(*index.indices(len(self)))]
        return self._source.class_of(index)


def _check_unique(location: str, records: Sequence[ImageRecord]) -> None:
    seen: set[str] = set()
    for record in records:
        if record.image_id in seen:
            raise UsageError(
                f"{location}: {record.image_id!r} occurs twice; each image needs its own key"
            )
        seen.add(record.image_id)


def expand_braces(text: str) -> list[str]:
    """`shard-{000..003}.tar` or `{a,b}.tar` expanded to names, as by a shell.

    Raises UsageError for more than 100,000 names or 100 braces.
    """
    names: list[str] = []
    if text.count("{") <= MOST_BRACES:
        names = list(itertools.islice(_expanded(text), MOST_SHARDS + 1))
    if not 0 < len(names) <= MOST_SHARDS:
        raise UsageError(f"{text}: its braces make more than {MOST_SHARDS:,} names")
    return names


def _expanded(text: str) -> Iterator[str]:
    found = _BRACES.search(text)
    if found is None:
        yield text
        return
    head, tail = text[: found.start()], text[found.end() :]
    first, dots, last = found[1].partition("..")
    choices: Iterable[str] = found[1].split(",")
    if dots and first.isdecimal() and last.isdecimal() and max(len(first), len(last)) < 20:
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        choices = (f"{number:0{width}d}" for number in numbers)
    for choice in choices:
        yield from _expanded(head + choice + tail)


def members_of(path: Path) -> Iterator[Member]:
    """The regular files of a tar file, in order.

    Raises UsageError if it is none, damaged, or cut: without its end mark it is not whole.
    """
    try:
        length = path.stat().st_size
        with _open(path) as tar:
            yield from _members(tar, path, length)
            _require_end(tar, path, length)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def _open(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape")
    except _TAR_ERRORS as error:
        with path.open("rb") as handle:
            block = handle.read(tarfile.BLOCKSIZE)
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except _TAR_ERRORS:
            hint = "; it is compressed, gunzip it" if block.startswith(b"\x1f\x8b") else ""
            raise UsageError(f"{path}: not a tar file{hint}") from error
        length = path.stat().st_size  # the first header is whole, what belongs to it is not
        raise _broken(path, length, length) from error


def _members(tar: tarfile.TarFile, path: Path, length: int) -> Iterator[Member]:
    before = -1
    while True:
        try:
            member = tar.next()
        except _TAR_ERRORS as error:
            read = 0 if tar.fileobj is None else tar.fileobj.tell()
            raise _broken(path, length, length if read >= length else tar.offset) from error
        if member is None:
            return
        if member.offset_data + member.size > length:
            raise _broken(path, length, length)
        if tar.offset <= before:  # a negative size: tarfile before 3.11.14 and 3.12.12 goes back
            raise _broken(path, length, member.offset)
        before = tar.offset
        tar.members.clear()  # type: ignore[attr-defined]  # it would hold them all, 1 KB each
        if member.isreg() and not member.issparse():
            yield Member(member.name, member.offset_data, member.size)


def _require_end(tar: tarfile.TarFile, path: Path, length: int) -> None:
    """Raise UsageError unless a block of zeros ends the members: tarfile takes any end for one."""
    with path.open("rb") as handle:
        handle.seek(tar.offset)
        block = handle.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        cut = len(block) < tarfile.BLOCKSIZE
        raise _broken(path, length, length if cut else tar.offset)


def _broken(path: Path, length: int, offset: int) -> UsageError:
    if offset >= length:
        return UsageError(f"{path}: truncated at byte {length:,}")
    return UsageError(f"{path}: damaged at byte {offset:,}")


def _split(name: str) -> tuple[str, str]:
    """A member's name without its last ending, and that; of ./a/b.JPG, a/b and .jpg."""
    name = name.removeprefix("./")
    stem, dot, ending = name.rpartition(".")
    if not stem or stem.endswith("/") or "/" in ending:
        return name, ""
    return stem, dot + ending.lower()


def _count(paths: Sequence[Path]) -> str:
    return f"{len(paths)} shard" + "s" * (len(paths) != 1)
