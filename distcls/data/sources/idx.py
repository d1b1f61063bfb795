"""Folders of IDX files, the format of MNIST and FashionMNIST (yann.lecun.com/exdb/mnist).

An IDX file is a big-endian header (two zero bytes, the type, the number of dimensions, then each
dimension as a 32-bit integer) and the values. Only type 8, unsigned bytes, is read.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import re
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from distcls.data.sources.known import CLASS_NAMES, CONTENT_MD5
from distcls.data.sources.source import Record, Source
from distcls.errors import UsageError

NAME = re.compile(r"(.+-)?(train|t10k|test)-(images|labels)[-.]idx([13])-ubyte(\.gz)?")
"""train-images-idx3-ubyte.gz, t10k-labels.idx1-ubyte, emnist-letters-test-images-idx3-ubyte."""

_CHUNK = 1 << 22
_DEFLATE_LIMIT = 1040
"""No gzip file unpacks to more than 1,032 times its size."""


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

    Raises UsageError if there is more than one set. A plain file wins over its packed twin.
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
                f"{folder} holds more than one set of IDX files ({found[role].name}, {path.name}); "
                "put each into a folder of its own"
            )
        found[role] = path
    return found


def read_idx_folder(folder: Path, form: str, names: tuple[str, ...] | None) -> Source:
    """Read a folder of IDX files and check it against the published MD5s where they apply.

    `form` is `idx` (any data), `mnist`, `fashion-mnist`, or `auto`: known data if any file is.
    Raises UsageError for missing, damaged or contradictory files.
    """
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
    files = {role: read_idx(path, 3 if "images" in role else 1) for role, path in paths.items()}
    kind = _check_md5(folder, files, form)
    found = sorted(
        {int(v) for role, f in files.items() if "labels" in role for v in set(f.values.tolist())}
    )
    classes = names or CLASS_NAMES.get(kind) or tuple(str(label) for label in found)
    # a label that no image has (EMNIST's letters start at 1) is no class
    index = {label: i for i, label in enumerate(range(len(classes)) if names else found)}
    records: list[Record] = []
    for prefix, split in (("train", "train"), ("t10k", "test")):
        if f"{prefix}-images" in files:
            records += _records(files[f"{prefix}-images"], files[f"{prefix}-labels"], split, index)
    return Source(
        kind=kind, location=str(folder.resolve()), root=None, classes=classes, records=records
    )


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
    if size > path.stat().st_size * _DEFLATE_LIMIT:  # before so much memory is asked for
        raise UsageError(f"{path}: truncated; its header promises {size:,} values")
    values = np.empty(size, np.uint8)
    md5 = hashlib.md5(header, usedforsecurity=False)
    filled = 0
    while filled < size and (chunk := handle.read(min(_CHUNK, size - filled))):
        values[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        md5.update(chunk)
        filled += len(chunk)
    if filled < size:
        raise UsageError(f"{path}: truncated: {filled:,} of {size:,} values are there")
    if handle.read(1):
        raise UsageError(f"{path}: longer than the {size:,} values that its header promises")
    return IdxFile(path=path, values=values.reshape(shape), md5=md5.hexdigest())


def _check_md5(folder: Path, files: dict[str, IdxFile], form: str) -> str:
    """The kind of data this is. Raises UsageError if it should be known data but is not."""
    if form == "idx":
        return "idx"
    kind = form
    if form == "auto":
        known = [
            name
            for name, table in CONTENT_MD5.items()
            if any(file.md5 == table[role] for role, file in files.items())
        ]
        if not known:
            return "idx"
        kind = known[0]
    for role, expected in CONTENT_MD5[kind].items():
        other = "--format idx accepts other data"
        if role not in files:
            raise UsageError(f"{folder}: {role} of {kind} is missing; {other}")
        if files[role].md5 != expected:
            raise UsageError(
                f"{files[role].path}: MD5 of the content is {files[role].md5}, expected "
                f"{expected} ({kind}); fetch it again, or {other}"
            )
    return kind


def _records(images: IdxFile, labels: IdxFile, split: str, index: dict[int, int]) -> list[Record]:
    if len(images.values) != len(labels.values):
        raise UsageError(
            f"{images.path} holds {len(images.values)} images, but {labels.path.name} "
            f"{len(labels.values)} labels"
        )
    records = []
    for row, (image, label) in enumerate(zip(images.values, labels.values.tolist(), strict=True)):
        if label not in index:
            raise UsageError(
                f"{labels.path}, row {row}: label {label} is outside the {len(index)} classes"
            )
        image_id = f"{split}/{row:05d}"
        records.append(Record(image_id=image_id, label=index[label], split=split, pixels=image))
    return records
