"""Dataset directories for tests, written by hand as `distcls.data.dataset` describes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distcls.data.dataset import CLASSES, FORMAT, INFO, MANIFEST, PACK
from distcls.data.integrity import sealed
from distcls.data.writer import manifest_schema
from distcls.files import digest


def write(
    folder: Path,
    images: Sequence[NDArray[np.uint8]],
    labels: Sequence[int],
    classes: Sequence[str],
    *,
    splits: Sequence[str] | None = None,
    packed: bool = True,
    files: bool = False,
) -> Path:
    """Images [h, w, 1 or 3] as a pack, as PNG files, or both; all in `test` unless given."""
    folder.mkdir(parents=True)
    ids = [f"image {index:04d}" for index in range(len(images))]
    paths = [f"{name}.png" for name in ids]
    if files:
        (folder / "files").mkdir()
        for image, path in zip(images, paths, strict=True):
            assert cv2.imwrite(str(folder / "files" / path), image[..., ::-1])
    sizes = [image.size for image in images]
    places = [int(place) for place in np.cumsum([0, *sizes])[:-1]]
    shapes = np.array([image.shape for image in images]).T.tolist()
    nothing = [None] * len(images)
    columns = {
        "image_id": ids,
        "path": paths if files else nothing,
        "label": [int(label) for label in labels],
        "split": list(splits or ["test"] * len(images)),
        "offset": places if packed else nothing,
        "height": shapes[0] if packed else nothing,
        "width": shapes[1] if packed else nothing,
        "channels": shapes[2] if packed else nothing,
    }
    pq.write_table(pa.table(columns, schema=manifest_schema()), folder / MANIFEST)
    if packed:
        (folder / PACK).write_bytes(b"".join(image.tobytes() for image in images))
    info = {
        "format": FORMAT,
        "packed": packed,
        "pack_bytes": sum(sizes) if packed else 0,
        "root": str(folder / "files") if files else None,
    }
    (folder / INFO).write_text(json.dumps(info))
    (folder / CLASSES).write_text(json.dumps(list(classes)))
    return sign(folder)


def sign(folder: Path) -> Path:
    """Give dataset.json the checksums of what now lies beside it, as a forger would."""
    info = json.loads((folder / INFO).read_text())
    there = [name for name in (CLASSES, MANIFEST, PACK) if (folder / name).exists()]
    info["sha256"] = {name: digest(folder / name) for name in there}
    (folder / INFO).write_text(json.dumps(sealed(info, INFO)))
    return folder


def coloured(count: int, size: int = 8, seed: int = 0) -> tuple[NDArray[np.uint8], list[int]]:
    """`count` noisy images, uint8 [count, size, size, 3], and which channel is brightest."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (count, size, size, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, count)
    images[np.arange(count), :, :, labels] += rng.integers(0, 160, (count, 1, 1), dtype=np.uint8)
    return images, labels.tolist()


def write_images(folder: Path, images: NDArray[np.uint8]) -> Path:
    """A new folder of RGB images [N, h, w, 3] as PNG files: 000.png, 001.png, ..."""
    folder.mkdir()
    for index, image in enumerate(images):
        assert cv2.imwrite(str(folder / f"{index:03d}.png"), image[..., ::-1])
    return folder
