"""Images in memory: folders of IDX files (MNIST, FashionMNIST, EMNIST), and scikit-learn's digits.

An IDX file is a big-endian header (two zero bytes, the type, the number of dimensions, then each
dimension as a 32-bit integer) and the values. Only type 8, unsigned bytes, is read. torchvision
reads the same format, but needs torch, and takes a damaged or cut file without an error.

Compared is the content, unpacked, because distributors pack it anew. The `.gz` files as first
published have these MD5s (train images, train labels, t10k images, t10k labels):

    mnist          f68b3c2dcbeaaa9fbdd348bbdeb94873  d53e105ee54ea40749a09fcbcd1e9432
                   9fb629c4189551a2d022fa330f9573f3  ec29112dd5afa0611ce80d1b7f02629c
    fashion-mnist  8d4fb7e6c68d591d4c3dfef9ec88bf0d  25c81989df183df01b3e8a0aad5dffbe
                   bef4ecab320f06d8554ea6380940ec79  bb300cfdad3c16e7a12a480ee83cd310
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import re
import zlib
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.data.source import (
    ImageRecord,
    Images,
    ImageSource,
    LabelledImages,
    LabelOptions,
    to_rgb,
)
from distcls.errors import UsageError
from distcls.imaging.reading import BYTES_LIMIT, byte_limit
from distcls.task import Task

NAME = re.compile(r"(.+-)?(train|t10k|test)-(images|labels)[-.]idx([13])-ubyte(\.gz)?")
"""train-images-idx3-ubyte.gz, t10k-labels.idx1-ubyte, emnist-letters-test-images-idx3-ubyte."""

IdxFormat = Literal["auto", "idx", "mnist", "fashion-mnist"]

_CHUNK = 1 << 22
_DEFLATE_LIMIT = 1040
"""No gzip file unpacks to more than 1,032 times its size."""

_PACKED_LIMIT = 64
"""Large files that unpack to more times their size are not unpacked into memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdxFile:
    """One IDX file, read."""

    path: Path
    values: NDArray[np.uint8]
    """[N, height, width] images or [N] labels."""
    md5: str
    """Of the content, unpacked: distributors pack it anew, so packed files differ."""


def find_idx(folder: Path) -> dict[str, Path]:
    """The IDX files of a folder: `train-images`, `train-labels`, `t10k-images`, `t10k-labels`.

    Raises UsageError if there is more than one set. A plain file is preferred to its packed twin.
    """
    found: dict[str, Path] = {}
    prefixes: dict[str, str] = {}
    for path in sorted(folder.iterdir(), reverse=True):
        match = NAME.fullmatch(path.name)
        if match is None or not path.is_file():
            continue
        prefix = match[1] or ""
        role = f"{'train' if match[2] == 'train' else 't10k'}-{match[3]}"
        if prefixes.setdefault(role, prefix) != prefix:
            raise UsageError(
                f"{folder} contains several sets of IDX files ({found[role].name}, {path.name}); "
                "put each set into its own folder"
            )
        found[role] = path
    return found


class IdxSource(ImageSource):
    """The images of a folder of IDX files, training images first; grey, decoded, in memory."""

    def __init__(self, folder: Path, format: IdxFormat = "auto") -> None:
        """Read the files and check them against the published MD5s where they apply.

        `format` is `idx` (any data), `mnist`, `fashion-mnist`, or `auto`: known data if any file
        is. Raises UsageError for missing, damaged or contradictory files.
        """
        self.location = str(folder.resolve())
        files = _read_files(folder)
        self._format = _check_md5(folder, files, format)
        pairs = [
            (split, files[f"{prefix}-images"], files[f"{prefix}-labels"])
            for prefix, split in (("train", "train"), ("t10k", "test"))
            if f"{prefix}-images" in files
        ]
        for _, images, labels in pairs:
            if len(images.values) != len(labels.values):
                raise UsageError(
                    f"{images.path} holds {len(images.values)} images, but {labels.path.name} "
                    f"{len(labels.values)} labels"
                )
        self._images = [images.values for _, images, _ in pairs]
        self._numbers = [labels for _, _, labels in pairs]
        self._splits = [split for split, images, _ in pairs for _ in images.values]
        self._image_ids = [
            f"{split}/{row:05d}" for split, images, _ in pairs for row in range(len(images.values))
        ]

    @property
    def image_ids(self) -> list[str]:
        """See `ImageSource`: train/00000, ..., test/00000, ..."""
        return self._image_ids

    @property
    def encoded(self) -> bool:
        """See `ImageSource`."""
        return False

    def image(self, index: int) -> Images:
        """See `ImageSource`."""
        if self.uniform is not None:
            return to_rgb(self.uniform[index])
        first = len(self._images[0])
        grey = self._images[0][index] if index < first else self._images[1][index - first]
        return to_rgb(grey[..., None])

    @functools.cached_property
    def uniform(self) -> Images | None:
        """See `ImageSource`; None if the test images are of another size."""
        if len({images.shape[1:] for images in self._images}) > 1:
            return None
        return np.concatenate(self._images)[..., None]

    @functools.cached_property
    def true_labels(self) -> list[str | None]:
        """See `ImageSource`."""
        images = self.labelled(LabelOptions())
        return [images.classes[record.label] for record in images.records]

    def state(self) -> str:
        """See `ImageSource`: the files' MD5s of labels and images."""
        images = (hashlib.md5(values.data, usedforsecurity=False) for values in self._images)
        return "".join([*(found.hexdigest() for found in images), *(f.md5 for f in self._numbers)])

    def labelled(self, options: LabelOptions) -> LabelledImages:
        """See `ImageSource`. Raises UsageError, naming file and row, for what is no class."""
        options.require_no_columns(self.location)
        found = sorted({int(value) for file in self._numbers for value in np.unique(file.values)})
        named = options.classes
        classes = named or CLASS_NAMES.get(self._format) or tuple(str(label) for label in found)
        # a label that no image has (EMNIST's letters start at 1) is no class
        start = int(named is not None and found[0] > 0 and found[-1] == len(classes))
        numbers = range(start, start + len(classes)) if named else found
        labels = {number: at for at, number in enumerate(numbers)}
        if start:
            log.say(f"{self.location}: labels start at 1: 1 is {classes[0]!r}")
        records: list[ImageRecord] = []
        for file in self._numbers:
            for row, number in enumerate(file.values.tolist()):
                if number not in labels:
                    raise UsageError(
                        f"{file.path}, row {row}: label {number} is outside the {len(labels)} "
                        "classes"
                    )
                index = len(records)
                records.append(
                    ImageRecord(
                        index=index,
                        image_id=self._image_ids[index],
                        label=labels[number],
                        split=self._splits[index],
                    )
                )
        return LabelledImages(
            source=self,
            format=self._format,
            location=self.location,
            root=None,
            task=Task(classes=classes),
            records=records,
        )


def _read_files(folder: Path) -> dict[str, IdxFile]:
    paths = find_idx(folder)
    for role in ("train-images", "train-labels"):
        if role not in paths:
            raise UsageError(
                f"{folder}: no IDX file {role}-idx{3 if 'images' in role else 1}-ubyte[.gz]"
            )
    if ("t10k-images" in paths) != ("t10k-labels" in paths):
        raise UsageError(
            f"{folder}: t10k images and labels belong together; one of them is missing"
        )
    return {role: read_idx(path, 3 if "images" in role else 1) for role, path in paths.items()}


def read_idx(path: Path, dimensions: int) -> IdxFile:
    """Read one IDX file, packed or not. Raises UsageError if it is damaged or another format."""
    try:
        with _open(path) as handle:
            return _read_stream(path, handle, dimensions)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(
            f"{path}: truncated or damaged gzip file ({error}); fetch it again"
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as handle:
        packed = handle.read(2) == b"\x1f\x8b"  # some unpack and keep the ending
    return cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb")


def _read_stream(path: Path, handle: BinaryIO, dimensions: int) -> IdxFile:
    header = handle.read(4 + 4 * dimensions)
    magic = bytes((0, 0, 8, dimensions))
    if header[:4] != magic or len(header) < 4 + 4 * dimensions:
        raise UsageError(
            f"{path}: starts with {header[:4].hex() or 'nothing'}, an IDX file of "
            f"{'images' if dimensions == 3 else 'labels'} starts with {magic.hex()}"
        )
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
    size = int(np.prod(shape, dtype=object))
    if size == 0:
        raise UsageError(f"{path}: holds no values; its header says {'x'.join(map(str, shape))}")
    if size > path.stat().st_size * _DEFLATE_LIMIT:  # before so much memory is allocated
        raise UsageError(f"{path}: truncated; its header says {size:,} values")
    if size > max(byte_limit(), _PACKED_LIMIT * path.stat().st_size):
        raise UsageError(
            f"{path}: {path.stat().st_size:,} bytes that unpack to {size:,}, more than images do; "
            f"unpack it, or set the environment variable {BYTES_LIMIT}"
        )
    values = np.empty(size, np.uint8)
    md5 = hashlib.md5(header, usedforsecurity=False)
    filled = 0
    while filled < size and (chunk := handle.read(min(_CHUNK, size - filled))):
        values[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        md5.update(chunk)
        filled += len(chunk)
    if filled < size:
        raise UsageError(f"{path}: truncated after {filled:,} of {size:,} values")
    if handle.read(1):
        raise UsageError(f"{path}: longer than the {size:,} values that its header says")
    return IdxFile(path=path, values=values.reshape(shape), md5=md5.hexdigest())


def _check_md5(folder: Path, files: dict[str, IdxFile], format: str) -> str:
    """The data's name, idx if unknown. Raises UsageError if it should be known but is not."""
    if format == "idx":
        return "idx"
    found = format
    if format == "auto":
        known = [
            name
            for name, table in CONTENT_MD5.items()
            if any(file.md5 == table[role] for role, file in files.items())
        ]
        if not known:
            return "idx"
        found = known[0]
    for role, expected in CONTENT_MD5[found].items():
        other = "--format idx accepts other data"
        if role not in files:
            raise UsageError(f"{folder}: {role} of {found} is missing; {other}")
        if files[role].md5 != expected:
            raise UsageError(
                f"{files[role].path}: MD5 of the content is {files[role].md5}, expected "
                f"{expected} ({found}); fetch it again, or {other}"
            )
    return found


CONTENT_MD5 = {
    "mnist": {
        "train-images": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels": "a25bea736e30d166cdddb491f175f624",
        "t10k-images": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion-mnist": {
        "train-images": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}

CLASS_NAMES = {
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}


class DigitsSource(ImageSource):
    """The 1,797 handwritten digits (8x8) that scikit-learn bundles: real data, no download."""

    location = "digits"

    def __init__(self) -> None:
        """Raises UsageError if scikit-learn is not installed."""
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise UsageError(
                "the digits need scikit-learn, which is not installed; pip install 'distcls[train]'"
            ) from error
        bunch = load_digits()
        # the values are counts from 0 to 16
        grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        self._images: Images = grey[..., None]
        self._labels = [int(label) for label in bunch.target]
        self._classes = tuple(str(name) for name in bunch.target_names)

    @functools.cached_property
    def image_ids(self) -> list[str]:
        """See `ImageSource`: digits/0000, digits/0001, ..."""
        return [f"digits/{index:04d}" for index in range(len(self._images))]

    @property
    def encoded(self) -> bool:
        """See `ImageSource`."""
        return False

    def image(self, index: int) -> Images:
        """See `ImageSource`."""
        return to_rgb(self._images[index])

    @property
    def uniform(self) -> Images:
        """See `ImageSource`."""
        return self._images

    @functools.cached_property
    def true_labels(self) -> list[str | None]:
        """See `ImageSource`."""
        return [self._classes[label] for label in self._labels]

    def labelled(self, options: LabelOptions) -> LabelledImages:
        """See `ImageSource`; without splits. Raises UsageError if classes are given."""
        options.require_no_columns(self.location)
        if options.classes is not None:
            raise UsageError("the bundled digits are `digits`, with their own classes")
        records = [
            ImageRecord(index=index, image_id=image_id, label=label)
            for index, (image_id, label) in enumerate(
                zip(self.image_ids, self._labels, strict=True)
            )
        ]
        return LabelledImages(
            source=self,
            format="digits",
            location=self.location,
            root=None,
            task=Task(classes=self._classes),
            records=records,
        )
