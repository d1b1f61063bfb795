"""Sources for tests, made of real handwritten digits: class-per-folder trees and IDX folders."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Images = NDArray[np.uint8]


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
