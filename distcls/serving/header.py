"""The size of an image from the first bytes of its file, without a library that decodes.

An estimate for the queue: what the decoder finds is what counts.
"""

from __future__ import annotations

import functools
import os

from distcls.serving.work import Buffer

PIXELS_A_BYTE = 8
"""Of a file whose header is not understood; JPEGs of photographs have 4 to 10."""
_NO_SIZE = frozenset((0xC4, 0xC8, 0xCC))
"""JPEG markers between SOF0 and SOF15 that are none."""


def pixels_of(data: Buffer) -> int:
    """Width times height of an encoded image, as its header says; 0 above what is decoded, as such
    a file costs nothing but its header."""
    head = bytes(data[:64])
    size: tuple[int, int] | None = None
    if head.startswith(b"\x89PNG") and len(head) >= 24:
        size = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    elif head.startswith(b"\xff\xd8"):
        size = _jpeg(data)
    elif head.startswith(b"GIF8") and len(head) >= 10:
        size = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    elif head[:2] == b"BM" and len(head) >= 26:
        width, height = (
            int.from_bytes(head[at : at + 4], "little", signed=True) for at in (18, 22)
        )
        size = abs(width), abs(height)
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP" and len(head) >= 30:
        size = _webp(head)
    pixels = PIXELS_A_BYTE * len(data) if size is None else size[0] * size[1]
    return pixels if pixels <= _decoded_limit() else 0


@functools.cache
def _decoded_limit() -> int:
    """The limit of the decoder, which checks what the environment says."""
    text = os.environ.get("DISTCLS_MAX_PIXELS", "").replace("_", "")
    return int(text) if text.isdecimal() else 100_000_000


def _jpeg(data: Buffer) -> tuple[int, int] | None:
    """The size in the first frame header; segments before it are stepped over."""
    at = 2
    for _ in range(200):
        part = bytes(data[at : at + 9])
        if len(part) < 9 or part[0] != 0xFF:
            return None
        if part[1] == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= part[1] <= 0xCF and part[1] not in _NO_SIZE:
            return int.from_bytes(part[7:9], "big"), int.from_bytes(part[5:7], "big")
        else:
            at += 2 + int.from_bytes(part[2:4], "big")
    return None


def _webp(head: bytes) -> tuple[int, int] | None:
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if head[12:16] == b"VP8 ":
        width, height = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))
        return width & 0x3FFF, height & 0x3FFF
    return None
