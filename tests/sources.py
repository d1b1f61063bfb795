"""Sources for tests: class-per-folder trees and IDX folders of real digits, manifests, records."""

from __future__ import annotations

import csv
import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from distcls.data.source import ImageRecord

Images = NDArray[np.uint8]

labels = st.lists(st.integers(0, 5), min_size=1, max_size=80)
"""Labels of some images, for `records`."""


def records(found: list[int], groups: list[int | None] | None = None) -> list[ImageRecord]:
    """A record for each label, in the group of that number if there is one."""
    return [
        ImageRecord(
            index=index,
            image_id=str(index),
            label=label,
            group=None if groups is None or groups[index] is None else f"g{groups[index]}",
        )
        for index, label in enumerate(found)
    ]


def write_manifest(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    """Write a manifest, CSV or Parquet by the ending; the first row holds the columns' names."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerows(rows)
    else:
        columns = {name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])}
        pq.write_table(pa.table(columns), path)
    return path


def digits(count: int) -> tuple[Images, NDArray[np.int64]]:
    """The first digits, grey [count, 8, 8] and their labels."""
    bunch = load_digits()
    images = np.rint(bunch.images[:count] * (255 / 16)).astype(np.uint8)
    return images, bunch.target[:count].astype(np.int64)


def tree(root: Path, count: int = 60, *, classes: int = 10, split: str = "") -> Path:
    """ROOT/[SPLIT/]CLASS/NNNN.png for the digits of the first `classes` classes."""
    for index, (image, label) in enumerate(zip(*digits(count), strict=True)):
        if label < classes:
            put(root / split / str(label) / f"{index:04d}.png", image)
    return root


def put(path: Path, image: Images) -> Path:
    """Write an image, grey or RGB, in the format of the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix if path.suffix != ".jpeg" else ".jpg"
    done, data = cv2.imencode(suffix, image if image.ndim == 2 else image[..., ::-1].copy())
    assert done
    path.write_bytes(data.tobytes())
    return path


def idx_bytes(values: Images) -> bytes:
    """An IDX file of unsigned bytes, any number of dimensions."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.tobytes()


def idx_folder(
    folder: Path, count: int = 100, test: int = 40, *, dot: bool = False, packed: bool = True
) -> Path:
    """Digits as the four files of MNIST; `dot`: names as some distributors have them."""
    folder.mkdir(parents=True)
    images, labels = digits(count + test)
    parts = [("train", slice(0, count))] + [("t10k", slice(count, count + test))] * bool(test)
    for prefix, rows in parts:
        for what, values in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
            name = f"{prefix}-{what}-ubyte"
            name = name.replace("-idx", ".idx") if dot else name
            data = idx_bytes(values[rows])
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    return folder
