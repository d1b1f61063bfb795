"""What a picture's file says of its parts, checked before a decoder believes it.

Decoders allocate what a length field says, and repeat what a file tells them to repeat: a PNG of 43
bytes can ask for 4 GiB, a JPEG of 141 KB for a minute. Each check walks the markers of the file and
decodes no pixels (measured: 10 us for a JPEG of 500x375, 1 % of decoding it).

Where a format has checksums that its decoder does not compare, they are compared here: those of all
chunks of a PNG up to IEND, and those of Deflate in a TIFF.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from distcls.errors import BadImage

MOST_CHUNKS = 1 << 17
"""PNG chunks of a file; writers make them of 8 KB or more."""
MOST_SEGMENTS = 4096
"""JPEG segments before the first scan; each has up to 64 KB of metadata."""
MOST_JUNK = 1 << 16
"""Bytes that belong to no JPEG segment, such as fill bytes, before the first scan."""
MOST_SCANS = 100
"""JPEG scans, each of which passes over the whole image; encoders write up to 20."""
FEW_PIXELS = 1_000_000_000
"""Pixels that all scans of a file together may pass over without being counted: 0.1 s."""
SCAN_BYTES = 12
"""No scan takes fewer."""

DEFLATE = frozenset((8, 32946))
"""Compressions of TIFF."""
OFFSETS = ((273, 279), (324, 325))
"""Tags of TIFF: where strips are and their bytes; the same of tiles."""
PIECE = 1 << 16
"""Bytes that are inflated at a time, to at most 16 times as many."""

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_IEND = b"IEND"
_ANIMATION = frozenset((b"acTL", b"fcTL", b"fdAT"))
_CHUNK = struct.Struct(">I4s")
_SOS, _EOI = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)
"""A marker after the first scan, where a zero byte follows an FF that is data."""
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))
"""JPEG markers without a length."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers of a frame header, which has the number of components."""
_SEVERAL_SCANS = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
"""Of these the progressive ones."""


def check_structure(data: bytes) -> None:
    """Raise BadImage, saying why, for a file whose decoding would take unbounded memory or time.

    A file that passes may still be damaged, or no image at all.
    """
    if data.startswith(_JPEG):
        _check_jpeg(data)
    elif data.startswith(_PNG):
        _check_png(data)


def _check_png(data: bytes) -> None:
    """Chunks of a length, a name, the content and a checksum, up to IEND."""
    at, end, read = 8, len(data) - 8, _CHUNK.unpack_from
    for _ in range(MOST_CHUNKS):
        if at > end:
            return
        length, name = read(data, at)
        if at + 12 + length > len(data):
            raise BadImage(
                f"corrupt or truncated: its chunk at byte {at:,} has {length:,} bytes, the file "
                f"{len(data):,}"
            )
        stop = at + 8 + length
        if zlib.crc32(memoryview(data)[at + 4 : stop]) != int.from_bytes(
            data[stop : stop + 4], "big"
        ):
            raise BadImage(f"corrupt: its chunk at byte {at:,} has another checksum than it says")
        if name == _IEND:
            return
        at += 12 + length
    raise BadImage(f"corrupt: more than {MOST_CHUNKS:,} PNG chunks")


def default_image(data: bytes) -> bytes:
    """An animated PNG that has passed `check_structure` without its animation; others as they are.

    Decoders differ in what they show of one: its first frame, or the image for programs that know
    no animation, which need not be the same.
    """
    if not data.startswith(_PNG) or b"acTL" not in data:
        return data
    parts, at, end = [_PNG], 8, len(data) - 8
    while at <= end:
        length, name = _CHUNK.unpack_from(data, at)
        if name not in _ANIMATION:
            parts.append(data[at : at + 12 + length])
        at += 12 + length
        if name == _IEND:
            break
    return b"".join(parts)


def deflate_damage(data: bytes, tags: Mapping[int, Any], size: int) -> str:
    """What zlib finds wrong in the strips or tiles of a TIFF with Deflate; empty for nothing.

    libtiff stops at the last pixel and does not see the checksum behind it. No more than `size`
    bytes, those of all pixels, are inflated: what pretends to be more is left to the decoder.
    """
    for place_tag, bytes_tag in OFFSETS:
        for place, length in zip(tags.get(place_tag, ()), tags.get(bytes_tag, ()), strict=False):
            inflating = zlib.decompressobj()
            for at in range(place, place + length, PIECE):
                piece = data[at : min(at + PIECE, place + length)]
                try:
                    while piece and size >= 0:
                        size -= len(inflating.decompress(piece, 16 * PIECE))
                        piece = inflating.unconsumed_tail
                except zlib.error as error:
                    return f"its Deflate data: {error}"
                if inflating.eof or size < 0 or at >= len(data):
                    break
            if size < 0:
                return ""
            if length and not inflating.eof:
                return "its Deflate data end early"
    return ""


def _check_jpeg(data: bytes) -> None:
    """Segments of a marker, a length and the content, up to the first scan."""
    at, junk, frame, components, pixels = 2, 0, 0, 0, 0
    for _ in range(MOST_SEGMENTS):
        found, skipped = _next_marker(data, at, junk)
        junk += skipped
        if found < 0 or data[found] == _EOI:
            return
        marker, at = data[found], found + 1
        if marker in _ALONE:
            continue
        if marker in _FRAMES:
            frame, components = marker, int.from_bytes(data[at + 7 : at + 8], "big")
            sides = data[at + 3 : at + 5], data[at + 5 : at + 7]
            pixels = math.prod(int.from_bytes(side, "big") for side in sides)
        elif marker == _SOS:
            parts = int.from_bytes(data[at + 2 : at + 3], "big")
            several = frame in _SEVERAL_SCANS or parts < components
            if several and pixels * len(data) > FEW_PIXELS * SCAN_BYTES:
                _check_scans(data, at)
            return
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    raise BadImage(f"corrupt: more than {MOST_SEGMENTS:,} JPEG segments before the first scan")


def _next_marker(data: bytes, at: int, junk: int) -> tuple[int, int]:
    """Where the next marker's code is, -1 for nowhere, and how many bytes belong to nothing."""
    start = at
    while True:
        found = data.find(b"\xff", at)
        if found < 0 or found + 1 >= len(data):
            return -1, 0
        if junk + found - start > MOST_JUNK:
            raise BadImage(f"corrupt: more than {MOST_JUNK:,} bytes between its JPEG segments")
        if 0 < data[found + 1] < 0xFF:
            return found + 1, found - start
        at = found + 1  # a fill byte, or no marker


def _check_scans(data: bytes, first: int) -> None:
    """Count up to the end of the picture: what follows it, such as the film of a moving photograph,
    is no scan."""
    scans, at = 1, first
    for _ in range(MOST_SEGMENTS):
        marker = _MARKER.search(data, at)
        if marker is None or data[marker.end() - 1] == _EOI:
            return
        scans += data[marker.end() - 1] == _SOS
        if scans > MOST_SCANS:
            raise BadImage(f"corrupt: more JPEG scans than the {MOST_SCANS} that are decoded")
        at = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    raise BadImage(f"corrupt: more than {MOST_SEGMENTS:,} JPEG segments")
