"""Writing a pack: decoded images one after the other, streamed to disk."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 24


class PackWriter:
    """Appends images to a file; grey while all are grey, RGB from the first coloured one on.

    Gives up, and removes the file, once it would hold more than `most_bytes` or `most_pixels`.
    """

    def __init__(
        self, path: Path, *, most_bytes: float = math.inf, most_pixels: float = math.inf
    ) -> None:
        self.channels = 1
        self.shapes: list[tuple[int, int]] = []
        """Height and width of each image, in the order they were added."""
        self._path = path
        self._most_bytes = most_bytes
        self._most_pixels = most_pixels
        self.pixels = 0
        """Height times width, summed over the images."""
        self._file = path.open("wb")
        self._abandoned = False

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def abandoned(self) -> bool:
        """Whether the images turned out too many or too large to be packed."""
        return self._abandoned

    @property
    def size(self) -> int:
        """Bytes of the pack."""
        return self.pixels * self.channels

    def add(self, pixels: NDArray[np.uint8]) -> None:
        """Append one image, [height, width] or RGB [height, width, 3]."""
        if self._abandoned:
            return
        if self.channels == 1 and pixels.ndim == 3:
            if is_grey(pixels):
                pixels = pixels[..., 0]
            else:
                self._widen()
        elif self.channels == 3 and pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=-1)
        self.shapes.append((pixels.shape[0], pixels.shape[1]))
        self.pixels += pixels.shape[0] * pixels.shape[1]
        if self.size > self._most_bytes or self.pixels > self._most_pixels:
            self.abandon()
        else:
            self._file.write(np.ascontiguousarray(pixels).data)

    def offsets(self) -> list[int]:
        """Where each image starts, in bytes."""
        sizes = [height * width * self.channels for height, width in self.shapes]
        return [0, *np.cumsum(sizes, dtype=np.int64).tolist()][: len(sizes)]

    def abandon(self) -> None:
        """Remove the file; what is added later is passed over."""
        self._abandoned = True
        self._file.close()
        self._path.unlink()

    def _widen(self) -> None:
        """Turn what is written from grey to RGB."""
        self.channels = 3
        self._file.close()
        wide = self._path.with_name(self._path.name + ".rgb")
        with self._path.open("rb") as grey, wide.open("wb") as out:
            while chunk := grey.read(_CHUNK):
                out.write(np.repeat(np.frombuffer(chunk, np.uint8), 3).data)
        wide.replace(self._path)
        self._file = self._path.open("ab")


def is_grey(pixels: NDArray[np.uint8]) -> bool:
    """Whether the three channels of [height, width, 3] are equal."""
    red = pixels[..., 0]
    return bool((red == pixels[..., 1]).all() and (red == pixels[..., 2]).all())
