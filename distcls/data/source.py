"""`ImageSource`: images by index, with their names, labels and a fingerprint. One class per format.

`prepare`, `predict`, training and evaluation all read images through it. A new format is one file
in `distcls/data/formats/` with a class derived from `ImageSource`, and one line in the table of
`distcls/data/formats/detect.py`.
"""

from __future__ import annotations

import abc
import array
import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.data.columns import ManifestColumns
from distcls.errors import BadValue, UsageError, require
from distcls.imaging import Color, decode
from distcls.task import Task

Images = NDArray[np.uint8]

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
    "testing": "test",
    "holdout": "test",
}
"""Names of splits in sources, in lower case, and their names in distcls."""


class ImageSource(abc.ABC):
    """Images by index, in a fixed order; millions of them in little memory.

    A format has to define `image_ids` and `read`, or `image` where the images are no encoded files
    (then `encoded` is False). All methods may be called concurrently from multiple threads.
    """

    location: str = ""
    """The location of the images, for messages."""
    left_out: Sequence[Rejected] = ()
    """Files that were found where images are searched, and are none, or not the user's."""

    @property
    @abc.abstractmethod
    def image_ids(self) -> Sequence[str]:
        """The images' names in any output, [N]; valid Unicode."""

    @property
    def encoded(self) -> bool:
        """Whether `read` returns encoded image files; False where they are decoded already."""
        return True

    def read(self, index: int) -> bytes:
        """The encoded file of the image at `index`.

        Raises BadImage with the reason if it cannot be read, UsageError if `encoded` is False.
        """
        raise UsageError(f"{self.location or 'this source'}: its images are decoded already")

    def image(self, index: int) -> Images:
        """The decoded image at `index`, uint8 RGB [height, width, 3].

        Raises BadImage with the reason if it cannot be read or decoded.
        """
        return decode(self.read(index))

    def on_background(self, color: Color | None) -> ImageSource:
        """The same images, transparent pixels of encoded files blended with a colour.

        With None alpha is ignored, as `image` does by default. Images that are decoded already, or
        by a function of their own, stay as they are.
        """
        if color is None or not self.encoded:
            return self
        return with_decoder(self, functools.partial(decode, background=color))

    @property
    def true_labels(self) -> Sequence[str | None] | None:
        """The text of each image's label, [N], None where an image has none; None without labels.

        A class name, or the text of `Task.text` for multi-output tasks.
        """
        return None

    @property
    def uniform(self) -> Images | None:
        """All images as one array, uint8 [N, height, width, 1 or 3]; None where there is none."""
        return None

    def rows(self, indices: Sequence[int] | NDArray[np.int64]) -> Images:
        """The images of `uniform` at `indices`, uint8 [n, height, width, 1 or 3].

        Of a file on disk it reads what is there: its mapping into memory would end the process with
        SIGBUS where the file was cut meanwhile. Raises DistclsError then.
        """
        assert self.uniform is not None
        found: Images = self.uniform[np.asarray(indices)]
        return found

    def paths(self) -> Iterator[str] | None:
        """The path of each image's file, links and `..` in its folders resolved; None where the
        image ids alone tell images apart."""
        return None

    def state(self) -> str:
        """A digest of the images' sizes and times, computed without reading their content.

        Empty where nothing is known. Takes seconds for a million files.
        """
        return ""

    def fingerprint(self) -> str:
        """SHA-256 of the names and of the state, hexadecimal; another one means other images."""
        names = self.image_ids if isinstance(self.image_ids, Names) else Names.of(self.image_ids)
        return hashlib.sha256((names.digest() + self.state()).encode()).hexdigest()

    def changed_since(self, time_ns: int, start: int, stop: int) -> bool:
        """Whether the file of an image from `start` to `stop` was written, or its status changed,
        after a time in nanoseconds: no program sets the time of change, so that new content is seen
        that keeps size and modification time. False where no file is known."""
        return False

    def labelled(self, options: LabelOptions) -> LabelledImages:
        """The images with the labels, splits, weights and groups that the source gives them.

        Raises UsageError if the source has no labels, or wrong ones.
        """
        del options
        raise UsageError(
            f"{self.location}: has no labels to train on; expected digits, a folder of IDX files, "
            "a folder with one folder per class, a CSV or Parquet manifest with a label column, or "
            "tar shards with a KEY.cls for each image"
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)


class FunctionSource(ImageSource):
    """Images returned by functions: of arrays in memory, or of a source read in another way."""

    def __init__(
        self,
        image_ids: Sequence[str],
        image: Callable[[int], Images] | None = None,
        *,
        read: Callable[[int], bytes] | None = None,
        true_labels: Sequence[str | None] | None = None,
        uniform: Images | None = None,
        state: Callable[[], str] | None = None,
    ) -> None:
        """`image` decodes the image at an index, `read` returns its file; either may be omitted."""
        self._image_ids = image_ids
        self._image, self._read, self._state = image, read, state
        self._true_labels = true_labels
        self._uniform = uniform

    @property
    def image_ids(self) -> Sequence[str]:
        """See `ImageSource`."""
        return self._image_ids

    @property
    def encoded(self) -> bool:
        """See `ImageSource`."""
        return self._read is not None

    def read(self, index: int) -> bytes:
        """See `ImageSource`."""
        return super().read(index) if self._read is None else self._read(index)

    def image(self, index: int) -> Images:
        """See `ImageSource`."""
        return super().image(index) if self._image is None else self._image(index)

    def on_background(self, color: Color | None) -> ImageSource:
        """See `ImageSource`."""
        return super().on_background(color) if self._image is None else self

    @property
    def true_labels(self) -> Sequence[str | None] | None:
        """See `ImageSource`."""
        return self._true_labels

    @property
    def uniform(self) -> Images | None:
        """See `ImageSource`."""
        return self._uniform

    def state(self) -> str:
        """See `ImageSource`."""
        return "" if self._state is None else self._state()


class JoinedSource(ImageSource):
    """The images of several sources, one after the other, each with a prefix for its ids."""

    def __init__(self, parts: Sequence[tuple[str, ImageSource]]) -> None:
        """An image that occurs again, by its path or its id, is left out, with a warning."""
        self._sources = [source for _, source in parts]
        self._ends = list(itertools.accumulate(map(len, self._sources)))
        names = Names.of(prefix + name for prefix, source in parts for name in source.image_ids)
        first: dict[str, int] = {}
        again: list[int] = []
        for place, key in enumerate(itertools.chain.from_iterable(map(_keys, parts))):
            if first.setdefault(key, place) != place:
                again.append(place)
        self._places = array.array("q", first.values())
        if again:
            count = "1 image is" if len(again) == 1 else f"{len(again):,} images are"
            log.warn(
                f"{count} named again by another input, first {names.printable()[again[0]]}; "
                "each is taken once"
            )
            names = Names.of(names[place] for place in self._places)
        self._image_ids = names.printable()

    @property
    def image_ids(self) -> Sequence[str]:
        """See `ImageSource`."""
        return self._image_ids

    @property
    def encoded(self) -> bool:
        """See `ImageSource`: whether all are."""
        return all(source.encoded for source in self._sources)

    def read(self, index: int) -> bytes:
        """See `ImageSource`."""
        source, place = self._find(index)
        return source.read(place)

    def image(self, index: int) -> Images:
        """See `ImageSource`."""
        source, place = self._find(index)
        return source.image(place)

    @functools.cached_property
    def true_labels(self) -> Sequence[str | None] | None:
        """See `ImageSource`."""
        known = [source.true_labels for source in self._sources]
        if all(labels is None for labels in known):
            return None
        pairs = zip(known, self._sources, strict=True)
        every = [label for labels, source in pairs for label in labels or [None] * len(source)]
        return [every[place] for place in self._places]

    def state(self) -> str:
        """See `ImageSource`."""
        states = (source.state() for source in self._sources)
        return hashlib.sha256("\n".join(states).encode()).hexdigest()

    def changed_since(self, time_ns: int, start: int, stop: int) -> bool:
        """See `ImageSource`."""
        places = map(self._find, range(start, stop))
        return any(part.changed_since(time_ns, at, at + 1) for part, at in places)

    def _find(self, index: int) -> tuple[ImageSource, int]:
        place = self._places[index]
        part = bisect.bisect_right(self._ends, place)
        return self._sources[part], place - (self._ends[part - 1] if part else 0)


def _keys(part: tuple[str, ImageSource]) -> Iterable[str]:
    """By which the images of a joined source are told apart."""
    prefix, source = part
    return source.paths() or (prefix + name for name in source.image_ids)


def real_paths(folder: str, files: Iterable[str]) -> Iterator[str]:
    """`ImageSource.paths` of files below a folder, where a URL is its own path."""
    known: dict[str, str] = {}
    for name in files:
        if "://" in name:
            yield name
            continue
        parent, _, last = name.rpartition("/")
        if parent not in known:
            known[parent] = os.path.realpath(os.path.join(folder, parent))  # noqa: PTH118 - fast
        yield f"{known[parent]}/{last}"


def to_rgb(pixels: Images) -> Images:
    """[..., 1] or [..., 3] to [..., 3]; grey is repeated, as decoding a grey file does."""
    if pixels.shape[-1] == 3:
        return pixels
    return np.repeat(pixels, 3, axis=-1)


def _decoded(source: ImageSource, decoder: Callable[[bytes], Images], index: int) -> Images:
    return decoder(source.read(index))


def with_decoder(source: ImageSource, decoder: Callable[[bytes], Images]) -> ImageSource:
    """The same images, their files decoded by `decoder` instead of `imaging.decode`.

    Raises UsageError, when an image is read, if the source has no encoded files.
    """
    return FunctionSource(
        source.image_ids,
        functools.partial(_decoded, source, decoder),
        read=source.read,
        true_labels=source.true_labels,
        state=source.state,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """The metadata of one image that training needs besides its pixels."""

    index: int
    """Index in the source."""
    image_id: str
    """Unique in the source."""
    label: int
    """Index of the class; multi-output: the first of `labels`, or -1 (see `first_label`)."""
    split: str | None = None
    """The source's own split: train, val or test; None where it has none."""
    path: str | None = None
    """Path of the file below `LabelledImages.root`, or absolute; None if the image is no file."""
    weight: float | None = None
    """Factor of the image's loss in training."""
    group: str | None = None
    """Images of one group (a patient, a scene) stay in one split."""
    labels: tuple[int, ...] | None = None
    """Multi-head: its class in each head; multi-label: the labels that it has."""


class Rejected(NamedTuple):
    """An image, or a file, that does not get into a dataset: a row of rejected.csv."""

    image_id: str
    path: str | None
    """As `ImageRecord.path`."""
    reason: str
    """Why, in a few words that are the same for all of a kind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """A source's images with their labels, as `prepare` splits and writes them."""

    source: ImageSource
    format: str
    """digits, idx, mnist, fashion-mnist, folder, manifest or tar."""
    location: str
    """Where the source was found, absolute; or `digits`."""
    root: Path | None
    """Folder of the records' paths, absolute; None if the images are no files."""
    task: Task
    """The task of the labels, with the class names in label order."""
    records: list[ImageRecord]
    """In the source's order."""
    rejected: Sequence[Rejected] = ()
    """What is left out before any image is read, such as images without a label."""
    columns: ManifestColumns | None = None
    """A manifest's other columns, by the records' `index`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self.task.classes

    def positions(self, record: ImageRecord) -> list[int]:
        """Class indices of an image's labels."""
        if record.labels is None:
            return [record.label]
        return self.task.flat(record.labels)


def first_label(labels: Sequence[int]) -> int:
    """The label that represents multiple ones where one is needed: the first, or -1."""
    return labels[0] if labels else -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How labels are read: the classes, and for manifests the columns."""

    classes: tuple[str, ...] | None = None
    """Class names in label order; other labels are errors. None takes the names that occur."""
    weight_column: str | None = None
    """Column of the weights; None takes `weight` where there is one."""
    label_columns: tuple[str, ...] = ()
    """Multi-head: one column per head."""
    text_column: str | None = None
    """Multi-head: the column of a text, one head per character."""
    labels_column: str | None = None
    """Multi-label: the column of any number of labels."""
    separator: str | None = None
    """Separator of those labels; None is |."""
    splits: tuple[str, ...] = ()
    """Folder trees: the folder of each split, as in train=a,test=b; `none`: all are classes."""
    keep_columns: tuple[str, ...] = ()
    """Other columns that are kept; () keeps all that can be, `none` none."""

    def __post_init__(self) -> None:
        given = self.options
        if len(given) > 1:
            value = getattr(self, given[1])
            raise BadValue(given[1], value, f"null with {given[0]}: they are mutually exclusive")
        plain = [name.strip().lower() for name in self.label_columns]
        differ = len(set(plain)) == len(plain)
        require(differ, "label_columns", self.label_columns, "different columns")
        if self.separator is not None:
            used = self.labels_column is not None
            require(used, "separator", self.separator, "null without labels_column")
            require(self.separator != "", "separator", self.separator, "one character or more")

    @property
    def options(self) -> list[str]:
        """Which of the options for multi-head and multi-label columns are given, at most one."""
        names = ("label_columns", "text_column", "labels_column")
        return [name for name in names if getattr(self, name) not in (None, ())]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the multi-head or multi-label columns; empty for one class per image."""
        one = (self.text_column, self.labels_column)
        return self.label_columns or tuple(name for name in one if name is not None)

    def require_no_columns(self, location: str) -> None:
        """Raise UsageError if a column is named, as only manifests have them."""
        named = {"weight_column": self.weight_column}
        named["keep_columns"] = next(iter(self.keep_columns), None)
        if self.columns:
            named[self.options[0]] = self.columns[0]
        for option, column in named.items():
            if column is not None:
                raise UsageError(
                    f"{option}: {column!r} is a column of a manifest, but {location} is not one"
                )


FEW_BAD = 10
"""Unreadable images that end no command by default, whatever their fraction."""


def most_bad(fraction: float | None, default: float, images: int) -> int:
    """How many of the images may be unreadable: by the fraction given, else by the default one."""
    if fraction is None:
        return max(FEW_BAD, most_bad(default, default, images))
    return math.floor(fraction * images + 1e-6)  # 0.29 times 100 is 28.999999999999996


def require_fraction(field: str, fraction: float | None) -> None:
    """Raise BadValue for what is no fraction, unless none is given."""
    require(fraction is None or 0 <= fraction <= 1, field, fraction, "at least 0 and at most 1")


TIMEOUT = 30.0
"""Seconds that one attempt to fetch an object may take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """How a location is opened: for URLs, and for manifests."""

    timeout: float = TIMEOUT
    """Seconds that one attempt to fetch an object may take."""
    path_column: str | None = None
    """Column of the images; None takes the first of the usual names."""
    label_column: str | None = None
    """Column of the classes; None takes the first of the usual names."""
    root: Path | None = None
    """Folder that relative paths start from; None is the manifest's."""

    def require_none_named(self, location: str) -> None:
        """Raise UsageError if anything is given that only manifests have."""
        for name in ("path_column", "label_column", "root"):
            value = getattr(self, name)
            if value is not None:
                raise UsageError(
                    f"{name}: {str(value)!r} is for a manifest, but {location} is not one"
                )


_UNKNOWN = (-1, -1)
"""Size and time of a file whose status cannot be read."""


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


def any_changed_since(time_ns: int, paths: Iterable[str]) -> bool:
    """Whether a file was written, or its status changed, after a time in nanoseconds."""
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # gone, or a name that no file can have
            if os.stat(path).st_ctime_ns > time_ns:  # noqa: PTH116 - half the time of Path's
                return True
    return False


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names from a file: a JSON list whatever the file's ending, or one name per line.

    Blank lines and blanks around names are dropped. Raises UsageError for a file that cannot be
    read, for anything but names, and for a name that occurs twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = _json_list(text, path) if text.lstrip()[:1] == "[" else None
        if names is None:
            names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"classes: {path} cannot be read: {reason}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"classes: {path}: expected names, a JSON list of text or one per line")
    names = [name.strip() for name in names if name.strip()]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UsageError(
            f"classes: {path}: {repeated[0]!r} occurs twice, expected names, each once"
        )
    return tuple(names)


def _json_list(text: str, path: Path) -> object:
    """The list of a text that begins with a bracket; None if that is part of a name, as `[UNK]`."""
    try:
        return json.loads(text)
    except ValueError:
        if path.suffix == ".json" or not re.match(r"\s*\[\s*[^\s\"\]]", text):
            raise
        return None


_NUMBER = re.compile(r"[+-]?[0-9]{1,400}(\.[0-9]{1,400})?")
"""Longer ones are names: Python refuses to convert them."""


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct names sorted: as numbers if all are (2 before 10, 2.0 too), else by code point."""
    distinct = set(names)
    if all(map(_NUMBER.fullmatch, distinct)):
        # not as floats, which cannot tell long numbers apart
        return tuple(sorted(distinct, key=lambda name: (Fraction(name), name)))
    return tuple(sorted(distinct))


def whole_numbers(names: Iterable[str]) -> dict[str, str]:
    """What labels such as 2.0 are called as whole numbers: 2. Empty if any label is none.

    Tables that were read with gaps in a column of integers have their labels so.
    """
    distinct = set(names)
    parts = {name: name.partition(".") for name in distinct if _NUMBER.fullmatch(name)}
    whole = len(parts) == len(distinct) and not any(
        rest.strip("0") for _, _, rest in parts.values()
    )
    if not whole or not any(dot for _, dot, _ in parts.values()):
        return {}
    return {name: number for name, (number, _, _) in parts.items()}


_MISSING = frozenset(
    ("", "nan", "NaN", "-nan", "-NaN", "NA", "<NA>", "N/A", "n/a", "#N/A", "#NA", "null", "NULL")
) | {"None"}
"""The texts that pandas takes for a missing value; `none` in lower case is a class."""


def is_missing(label: str, classes: Iterable[str] | None = None) -> bool:
    """Whether a label's text stands for a missing one; a name of `classes` never does."""
    return label in _MISSING and (classes is None or label not in classes)


BLOCK = 1 << 13
"""Names that are handled at a time where there may be millions."""


NO_TEXT = "its name is not UTF-8"
"""Reason of a bad image."""


def is_text(name: str) -> bool:
    """Whether a name is UTF-8, and can be written to a table."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_text(name: str) -> str:
    """A name with bytes that are not UTF-8 as \\x.., as `Names.printable` gives it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def require_text(location: str, classes: Iterable[str]) -> None:
    """Raise UsageError for names that cannot be written to a file."""
    if not is_text("".join((location, *classes))):
        raise UsageError(f"{location!r}: names of folders and classes must be UTF-8")


class Names(Sequence[str]):
    """Many names in one piece of memory: a million takes 8 MB and their letters.

    A list of Python strings takes some 100 bytes for each. Names are stored as bytes, so that a
    file name which is not UTF-8 stays what it is. (PyArrow's string array refuses such names.)
    """

    def __init__(self, letters: bytes, ends: array.array[int], errors: str) -> None:
        self._letters = letters
        self._ends = ends
        self._errors = errors

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Gather names; lone surrogates represent bytes that are not UTF-8, as in `os.fsdecode`."""
        left = iter(names)
        return cls.of_blocks(iter(lambda: list(itertools.islice(left, BLOCK)), []))

    @classmethod
    def of_blocks(cls, blocks: Iterable[list[str]]) -> Names:
        """The same from batches of names."""
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


class TextColumn(Sequence[str | None]):
    """A column of text with few distinct values, each stored once: a million takes 4 MB."""

    def __init__(self) -> None:
        self._code_of: dict[str | None, int] = {}
        self._values: list[str | None] = []
        self._codes = array.array("i")

    def extend(self, values: Iterable[str | None]) -> None:
        """Append values."""
        code_of = self._code_of
        for value in values:
            if value not in code_of:
                code_of[value] = len(self._values)
                self._values.append(value)
            self._codes.append(code_of[value])

    def __len__(self) -> int:
        return len(self._codes)

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[str | None]: ...
    def __getitem__(self, index: int | slice) -> str | list[str | None] | None:
        if isinstance(index, slice):
            return [self._values[code] for code in self._codes[index]]
        return self._values[self._codes[index]]
