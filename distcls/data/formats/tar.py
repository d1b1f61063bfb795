"""Tar shards as WebDataset lays them out: KEY.jpg, with KEY.cls beside it where the class is known.

Nothing is unpacked. The headers are read once, from one to the next; after that each image is read
in its place, in the order of the shard, so that the disk is read from front to end.

Format: https://www.gnu.org/software/tar/manual/html_node/Standard.html; the class file's content
is a number or a name (https://github.com/webdataset/webdataset).
"""

from __future__ import annotations

import array
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

from distcls.data.formats.folder import state_of
from distcls.data.source import ImageSource, Names, NamesBuilder, from_encoded
from distcls.errors import BadImage, UsageError
from distcls.imaging.decode import SUFFIXES

SECTOR = 512
_BRACES = re.compile(r"\{([^{}]*)\}")


class Member(NamedTuple):
    """A file in a shard."""

    name: str
    offset: int
    size: int


class Shards:
    """The images of some shards, by index."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises UsageError for what is no whole tar file, or if there is no image in any."""
        self._paths = list(paths)
        self._shard = array.array("i")
        self._offset = array.array("q")
        self._size = array.array("q")
        self._class_offset = array.array("q")
        self._class_size = array.array("q")
        names = NamesBuilder()
        distinct = len({path.stem for path in paths}) == len(paths)
        for number, path in enumerate(self._paths):
            shard = path.stem if distinct else str(path.with_suffix(""))
            names.extend(self._index(number, path, shard))
        self.names: Names = names.names()
        if not len(self.names):
            endings = ", ".join(sorted(SUFFIXES))
            raise UsageError(f"{paths[0]}: no images in {_count(paths)} (searched for {endings})")

    def read(self, index: int) -> bytes:
        """The file of one. Raises BadImage."""
        return self._read(self._shard[index], self._offset[index], self._size[index])

    def truth(self, index: int) -> str | None:
        """What the class file says: a number or a name."""
        if self._class_size[index] < 0:
            return None
        place = self._shard[index], self._class_offset[index], self._class_size[index]
        return self._read(*place).decode("utf-8", "replace").strip() or None

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        try:
            with self._paths[shard].open("rb", buffering=0) as handle:
                handle.seek(offset)
                data = handle.read(size)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise BadImage("cannot be read: the shard has become shorter")
        return data

    def _index(self, number: int, path: Path, shard: str) -> list[str]:
        """Add the images of a shard; their names, SHARD/KEY."""
        members = [(*_split(member.name), member) for member in members_of(path)]
        classes = {key: member for key, ending, member in members if ending == ".cls"}
        names: list[str] = []
        used: set[str] = set()
        for key, ending, member in members:
            if ending not in SUFFIXES:
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


class _Truths(Sequence[str | None]):
    """True classes, read when they are asked for."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards.names)

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[str | None]: ...
    def __getitem__(self, index: int | slice) -> str | list[str | None] | None:
        if isinstance(index, slice):
            return [self._shards.truth(place) for place in range(*index.indices(len(self)))]
        return self._shards.truth(index)


def from_shards(paths: Sequence[Path]) -> ImageSource:
    """The images of tar shards, one after the other. Raises UsageError as `Shards` does."""
    shards = Shards(paths)
    return from_encoded(
        shards.names.printable(),
        shards.read,
        truths=_Truths(shards),
        state=lambda: state_of(map(str, paths)),
    )


def expand_braces(text: str) -> list[str]:
    """`shard-{000..003}.tar` or `{a,b}.tar` as the names it stands for, like a shell does."""
    found = _BRACES.search(text)
    if found is None:
        return [text]
    head, tail = text[: found.start()], text[found.end() :]
    first, dots, last = found[1].partition("..")
    if dots and first.isdecimal() and last.isdecimal():
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        choices = [f"{number:0{width}d}" for number in numbers]
    else:
        choices = found[1].split(",")
    return [whole for choice in choices for whole in expand_braces(head + choice + tail)]


def members_of(path: Path) -> Iterator[Member]:
    """The regular files of a tar file, in order.

    Raises UsageError if it is none, damaged, or cut: without its end mark it is not whole.
    """
    try:
        with path.open("rb", buffering=0) as handle:
            yield from _members(handle, path, path.stat().st_size)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def _members(handle: io.FileIO, path: Path, length: int) -> Iterator[Member]:
    at = 0
    longer: dict[str, str] = {}  # what a header of its own says of the member that follows
    while True:
        handle.seek(at)
        header = handle.read(SECTOR)
        if header == bytes(SECTOR):
            return
        own = _checked_size(header)
        if own is None and at == 0:
            hint = "; it is compressed, gunzip it" if header.startswith(b"\x1f\x8b") else ""
            raise UsageError(f"{path}: not a tar file{hint}")
        size = int(longer.pop("size", own or 0))
        if len(header) < SECTOR or at + SECTOR + size > length:
            raise UsageError(f"{path}: ends in the middle at byte {length:,}; was it cut?")
        if own is None:
            raise UsageError(f"{path}: damaged at byte {at:,}")
        kind, start = header[156:157], at + SECTOR
        if kind == b"x":
            longer |= _pax(handle.read(size))
        elif kind == b"L":
            longer["path"] = _text(handle.read(size))
        elif kind in (b"0", b"\0", b"7"):
            yield Member(longer.pop("path", "") or _name(header), start, size)
        if kind not in (b"x", b"L", b"g"):
            longer = {}
        at = start + -(-size // SECTOR) * SECTOR


def _checked_size(header: bytes) -> int | None:
    """Size of the member that a header describes; None if its checksum is wrong."""
    try:
        given = int(header[148:156].strip(b" \0") or b"-", 8)
        if given != sum(header[:148]) + 8 * ord(" ") + sum(header[156:SECTOR]):
            return None
        field = header[124:136]
        if field[0] & 0x80:  # GNU: more than 8 GB, as a binary number
            return int.from_bytes(field[1:], "big")
        return int(field.strip(b" \0") or b"0", 8)
    except (ValueError, IndexError):
        return None


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax(content: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE`, of which the path and the size matter here."""
    found: dict[str, str] = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            break
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path" or (key == b"size" and value.isdigit()):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return found


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _split(name: str) -> tuple[str, str]:
    """A member's name without its last ending, and that; of ./a/b.JPG, a/b and .jpg."""
    name = name.removeprefix("./")
    stem, dot, ending = name.rpartition(".")
    if not stem or stem.endswith("/") or "/" in ending:
        return name, ""
    return stem, dot + ending.lower()


def _count(paths: Sequence[Path]) -> str:
    return f"{len(paths)} shard" + "s" * (len(paths) != 1)
