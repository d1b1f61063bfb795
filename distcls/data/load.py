"""Every image of a source decoded once, in order, on all cores, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from distcls.cores import available_cores
from distcls.data.sources.source import Record
from distcls.errors import BadImage
from distcls.imaging import decode_file

Loaded = NDArray[np.uint8] | BadImage


def load_all(
    records: Sequence[Record], root: Path | None, copies: Sequence[Path] | None
) -> Iterator[Loaded]:
    """Yield each record's image, grey [height, width] or RGB [height, width, 3], or what is wrong.

    With `copies` each image is also written there as PNG. Raises OSError if one cannot be.
    """
    if copies is None and all(record.pixels is not None for record in records):
        yield from (load(record, root, None) for record in records)
        return
    workers = min(available_cores(), 16)
    places: Sequence[Path | None] = copies or [None] * len(records)
    tasks = iter(zip(records, places, strict=True))
    with ThreadPoolExecutor(workers) as pool:  # OpenCV decodes without holding the GIL
        waiting: deque[Future[Loaded]] = deque()
        try:
            for record, copy in islice(tasks, 2 * workers):
                waiting.append(pool.submit(load, record, root, copy))
            while waiting:
                loaded = waiting.popleft().result()
                for record, copy in islice(tasks, 1):
                    waiting.append(pool.submit(load, record, root, copy))
                yield loaded
        finally:
            pool.shutdown(cancel_futures=True)


def load(record: Record, root: Path | None, copy: Path | None) -> Loaded:
    """One image, and its copy as PNG; a bad one is returned, not raised."""
    try:
        record.image_id.encode()
    except UnicodeEncodeError:
        return BadImage("its name is not UTF-8")
    pixels = record.pixels
    if pixels is None:
        try:
            pixels = decode_file((root or Path()) / (record.path or ""))
        except BadImage as error:
            return error
    if copy is not None:
        write_png(copy, pixels)
    return pixels


def write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write uint8 [height, width] or RGB [height, width, 3]. Raises OSError if it cannot be."""
    ordered = pixels if pixels.ndim == 2 else pixels[..., ::-1]
    _, data = cv2.imencode(".png", np.ascontiguousarray(ordered))
    path.write_bytes(data.tobytes())
