"""The web page of the server, from plain files of the package, and PNGs for it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from importlib import resources

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}


def load_pages() -> Mapping[str, tuple[bytes, str, Mapping[str, str]]]:
    """Content, type and headers of the page's files, by path."""
    folder = resources.files("distcls.serving") / "page"
    return {
        path: ((folder / name).read_bytes(), kind, _HEADERS)
        for path, (name, kind) in _FILES.items()
    }


HTML_HEADERS: Mapping[str, str] = _HEADERS
"""Headers of every HTML page: it loads nothing from elsewhere and stands in no frame."""


def png(pixels: bytes | memoryview, height: int, width: int) -> bytes:
    """A PNG of uint8 RGB [height, width, 3]: exact pixels, without a library that decodes."""
    row = width * 3
    lines = b"".join(b"\0" + bytes(pixels[at : at + row]) for at in range(0, height * row, row))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
