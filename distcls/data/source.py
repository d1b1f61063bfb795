"""Images to predict, by index: names, a way to load each, and a digest of them all."""

from __future__ import annotations

import array
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray

from distcls.errors import UsageError
from distcls.imaging import decode
from distcls.task import Task

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What sources call their splits, in lower case, and what they are called here."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageRecord:
    """One image of a source: a file at `path`, or `pixels` that are there already."""

    image_id: str
    """Unique in the source."""
    label: int
    """Index into the source's classes; of several answers the first, or -1."""
    split: str | None = None
    """The source's own split: train, val or test; None where it has none."""
    path: str | None = None
    """Below the source's root, or absolute."""
    pixels: NDArray[np.uint8] | None = None
    """Grey [height, width]."""
    weight: float | None = None
    """How much the image counts in training."""
    group: str | None = None
    """Images of one group (a patient, a scene) stay in one split."""
    labels: tuple[int, ...] | None = None
    """Where an image has several answers: its class in each head, or the labels it is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledSource:
    """A source as it was found: all of its images, in its own order."""

    kind: str
    """digits, idx, mnist, fashion-mnist, folder or manifest."""
    location: str
    """Where it was found, absolute; or `digits`."""
    root: Path | None
    """Folder of the records' paths, absolute; None if the images are no files."""
    task: Task
    """What its labels answer, with the class names in label order."""
    records: list[ImageRecord]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self.task.classes

    def positions(self, record: ImageRecord) -> list[int]:
        """Where an image's answers stand among the classes."""
        if record.labels is None:
            return [record.label]
        return self.task.flat(record.labels)


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names from a file: a JSON list, or one name a line. Raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"classes {path}: cannot be read: {reason}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"classes {path}: expected a list of names")
    names = [name for name in names if name.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"classes {path}: {twice[0]!r} stands there more than once")
    return tuple(names)


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct names sorted: as numbers if all are (2 before 10), else by code point."""
    distinct = set(names)
    if all(name.isascii() and name.isdigit() for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


Images = NDArray[np.uint8]

BLOCK = 1 << 13
"""Names that are handled at a time where there may be millions."""


class Names(Sequence[str]):
    """Many names in one piece of memory: a million takes 8 MB and their letters.

    A list of Python strings takes some 100 bytes for each. Names are kept as bytes, so that a file
    name which is not UTF-8 stays what it is.
    """

    def __init__(self, letters: bytes, ends: array.array[int], errors: str) -> None:
        self._letters = letters
        self._ends = ends
        self._errors = errors

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Gather names; lone surrogates stand for bytes that are not UTF-8, as in `os.fsdecode`."""
        left = iter(names)
        return cls.of_blocks(iter(lambda: list(itertools.islice(left, BLOCK)), []))

    @classmethod
    def of_blocks(cls, blocks: Iterable[list[str]]) -> Names:
        """The same from names that come many at a time."""
        builder = NamesBuilder()
        for block in blocks:
            builder.extend(block)
        return builder.names()

    def mentions(self, text: str) -> bool:
        """Whether any name may hold `text`: never False where one does, and fast."""
        return text.encode() in self._letters

    def printable(self) -> Names:
        """The same names as valid Unicode: bytes that are not UTF-8 appear as \\x.."""
        return Names(self._letters, self._ends, "backslashreplace")

    def digest(self) -> str:
        """SHA-256 of all names in their order, hexadecimal."""
        total = hashlib.sha256(self._letters)
        total.update(self._ends)
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # counts from the end, too, and raises IndexError
        start = self._ends[place - 1] if place else 0
        return self._letters[start : self._ends[place]].decode("utf-8", self._errors)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends:
            yield self._letters[start:end].decode("utf-8", self._errors)
            start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(
            own == given for own, given in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


class NamesBuilder:
    """Names that are still coming."""

    def __init__(self) -> None:
        self._letters = bytearray()
        self._ends = array.array("q")

    def extend(self, names: list[str]) -> None:
        """Add the next ones."""
        together = "".join(names)
        if together.isascii():  # as most are: half the time
            lengths, letters = map(len, names), together.encode()
        else:
            encoded = [name.encode("utf-8", "surrogateescape") for name in names]
            lengths, letters = map(len, encoded), b"".join(encoded)
        ends = itertools.accumulate(lengths, initial=len(self._letters))
        self._ends.extend(itertools.islice(ends, 1, None))
        self._letters += letters

    def names(self) -> Names:
        """All of them."""
        return Names(bytes(self._letters), self._ends, "surrogateescape")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Images by index, in the order in which they are answered."""

    image_ids: Sequence[str]
    """Their names in the output."""
    load: Callable[[int], Images]
    """Decodes one: index to uint8 RGB [h, w, 3]. Raises BadImage; called from many threads."""
    read: Callable[[int], bytes] | None = None
    """The file of one as it is, not decoded, where there is one. Raises BadImage."""
    truths: Sequence[str | None] | None = None
    """Their true classes, where known."""
    uniform: Images | None = None
    """All of them as one array [N, H, W, 1 or 3], where there is such a one."""
    state: Callable[[], str] | None = None
    """Digest of what the images are now, as far as it is known without reading them: their sizes
    and times. Takes seconds for a million files."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def digest(self) -> str:
        """SHA-256 of the names and of the state, hexadecimal."""
        names = self.image_ids if isinstance(self.image_ids, Names) else Names.of(self.image_ids)
        state = self.state() if self.state is not None else ""
        return hashlib.sha256((names.digest() + state).encode()).hexdigest()


def from_encoded(
    image_ids: Sequence[str],
    read: Callable[[int], bytes],
    *,
    truths: Sequence[str | None] | None = None,
    state: Callable[[], str] | None = None,
) -> ImageSource:
    """Images of which the files can be read."""

    def load(index: int) -> Images:
        return decode(read(index))

    return ImageSource(image_ids=image_ids, load=load, read=read, truths=truths, state=state)


class LabelledSplit(Protocol):
    """What is used of a dataset's split (see `distcls.data.dataset.Split`)."""

    @property
    def image_ids(self) -> list[str]:
        """Names."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class indices, [N]; of several answers [N, heads] or [N, labels]."""

    @property
    def task(self) -> Task:
        """What they are answers to."""

    @property
    def uniform(self) -> Images | None:
        """All images as one array, where possible."""

    def image(self, index: int) -> Images:
        """One image."""


def from_split(
    split: LabelledSplit, classes: Sequence[str], state: Callable[[], str] | None = None
) -> ImageSource:
    """The images of a dataset's split; of several answers the truths are texts."""
    task = split.task
    single = [classes[label] for label in split.labels] if task.single else None
    return ImageSource(
        image_ids=split.image_ids,
        load=split.image,
        truths=task.texts(split.labels) if single is None else single,
        uniform=split.uniform,
        state=state,
    )
