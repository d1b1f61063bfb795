"""Keeps libpng, libjpeg and libtiff from writing to standard error, a line an image and epoch.

They print with `fprintf(stderr, ...)`, which no setting of OpenCV or Pillow reaches. While images
are decoded, C's variable `stderr` therefore is a stream that is buffered: afterwards what these
libraries wrote is dropped, and what anything else wrote goes on to file descriptor 2. That
descriptor, `sys.stderr` and C++'s `std::cerr` are left alone. Needs glibc; elsewhere the lines
still come.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import threading

NOISE = re.compile(
    rb"libpng (?:warning|error): |Corrupt JPEG data|Premature end of JPEG|Warning: unknown JFIF"
    rb"|Invalid SOS parameters|Inconsistent progression|Unknown Adobe color|tempfile\.tif: "
    rb"|TIFF\w*: |[\w.]+: Warning, "
)
"""How the lines of the image libraries begin; `tempfile.tif` is Pillow's name for any TIFF."""
BUFFER = 1 << 16
_FULLY = 0  # _IOFBF


class SilentStderr:
    """A context manager, entered by any number of threads at a time."""

    def __init__(self) -> None:
        """Raises AttributeError where the C library is not glibc, OSError without memory."""
        libc = ctypes.PyDLL(None)  # keeps the GIL: these calls take no time
        libc.gnu_get_libc_version  # noqa: B018  # elsewhere `stderr` is no variable that can be set
        for name in ("fdopen", "fopen", "malloc"):
            getattr(libc, name).restype = ctypes.c_void_p
        self._libc, self._pending, self._purge = libc, libc["__fpending"], libc["__fpurge"]
        self._pending.restype = ctypes.c_size_t
        for function in (self._pending, self._purge, libc.ftrylockfile, libc.funlockfile):
            function.argtypes = [ctypes.c_void_p]
        self._stderr = ctypes.c_void_p.in_dll(libc, "stderr")
        self._stream, self._buffer = self._open()
        self._reset()
        os.register_at_fork(after_in_child=self._reset_in_child)

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._usual = self._stderr.value
                self._stderr.value = self._stream
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stderr.value = self._usual
            written = self._take()
        if written:
            _pass_on(written)

    def _open(self) -> tuple[int, int]:
        """A stream to file descriptor 2 that is never flushed, and the address of its buffer."""
        # never closed nor freed: the C library looks at all streams when the process ends
        stream = self._libc.fdopen(2, b"w") or self._libc.fopen(b"/dev/null", b"w")
        buffer = self._libc.malloc(ctypes.c_size_t(BUFFER))
        if not stream or not buffer:
            raise OSError("no stream for the messages of image libraries")
        stream, buffer = ctypes.c_void_p(stream), ctypes.c_void_p(buffer)
        self._libc.setvbuf(stream, buffer, _FULLY, ctypes.c_size_t(BUFFER))
        return int(stream.value or 0), int(buffer.value or 0)

    def _take(self) -> bytes:
        """What was written, whole lines only while others still decode."""
        # whoever holds the stream, or stopped in the middle of a line, comes by here when it leaves
        if not self._pending(self._stream) or self._libc.ftrylockfile(self._stream):
            return b""
        written = ctypes.string_at(self._buffer, self._pending(self._stream))
        whole = not self._inside or written.endswith(b"\n")
        if whole:
            self._purge(self._stream)
        self._libc.funlockfile(self._stream)
        return written if whole else b""

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._usual = self._stderr.value

    def _reset_in_child(self) -> None:
        """After a fork no thread of the parent decodes any more."""
        if self._inside:
            self._stderr.value = self._usual
        self._purge(self._stream)
        self._reset()


@functools.cache
def silent_stderr() -> contextlib.AbstractContextManager[None]:
    """The one of this process; does nothing where C's `stderr` cannot be replaced."""
    try:
        return SilentStderr()
    except (AttributeError, ValueError, OSError):
        return contextlib.nullcontext()


def _pass_on(written: bytes) -> None:
    """Write the lines that are not of the image libraries to file descriptor 2."""
    rest = b"".join(
        line for line in written.splitlines(True) if line.strip() and not NOISE.match(line)
    )
    if rest:
        with contextlib.suppress(OSError):
            os.write(2, rest)
