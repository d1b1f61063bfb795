"""Keeps libpng, libjpeg and libtiff from writing to standard error, and hears of damaged JPEGs.

They print with `fprintf(stderr, ...)`, which no setting of OpenCV or Pillow reaches. While images
are decoded, C's variable `stderr` therefore is a stream that is buffered: afterwards what these
libraries wrote is dropped, and what anything else wrote goes on to file descriptor 2. That
descriptor, `sys.stderr` and C++'s `std::cerr` are left alone. Needs glibc; elsewhere the lines
still come.

Of a JPEG with a hole libjpeg fills the rest with grey and says so in a line, its only sign; OpenCV
and Pillow return the picture as if it were whole. Such a line does not tell which of the images
that are decoded at that moment it is about: where there were several, each of them is decoded once
more, alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

NOISE = re.compile(
    rb"libpng (?:warning|error): |Corrupt JPEG data|Premature end of JPEG|Warning: unknown JFIF"
    rb"|Invalid SOS parameters|Inconsistent progression|Unknown Adobe color|tempfile\.tif: "
    rb"|TIFF\w*: |[\w.]+: Warning, |[A-Za-z]+\d?(?:Pre)?(?:Decode|Setup)\w*: |JPEGLib: "
)
"""How the lines of the image libraries begin; `tempfile.tif` is Pillow's name for any TIFF."""
DAMAGE = re.compile(
    rb"^(?:Corrupt JPEG data: (?!\d+ extraneous)|Corrupt JPEG data: \d{3,} extraneous"
    rb"|Premature end of JPEG|Inconsistent progression).*",
    re.MULTILINE,
)
"""Lines about a JPEG whose pixels are not all there. A few bytes too many (up to 99) are harmless:
some cameras and editors leave them. Of several lines about a file libjpeg writes the first."""
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
        with self._turn:
            self._wait_for_others()
            self._enter()

    def __exit__(self, *error: object) -> None:
        self._leave()

    def hear(self, decode: Callable[[], T], again: Callable[[], object]) -> tuple[T, str]:
        """What `decode` returns, and what libjpeg says of damage to the image; empty for none.

        `again` decodes the same image once more, to see whether it is about this one.
        """
        with self._turn:
            self._wait_for_others()
            self._enter()
            entered, heard, alone = self._entered, self._heard, self._inside == 1
        try:
            value = decode()
        finally:
            said = self._leave()
        if self._heard == heard:
            return value, ""
        if alone and said and self._entered == entered:
            return value, said
        return value, self._hear_alone(again)

    def _hear_alone(self, again: Callable[[], object]) -> str:
        with self._turn:
            self._wait_for_others()
            self._alone = threading.get_ident()
            try:
                while self._inside:
                    self._turn.wait()
                self._enter()
            except BaseException:
                self._alone = 0
                raise
        try:
            with contextlib.suppress(Exception):
                again()
        finally:
            said = self._leave()
            with self._turn:
                self._alone = 0
                self._turn.notify_all()
        return said

    def _wait_for_others(self) -> None:
        while self._alone:
            self._turn.wait()

    def _enter(self) -> None:
        if not self._inside:
            self._usual = self._stderr.value
            self._stderr.value = self._stream
        self._inside += 1
        self._entered += 1

    def _leave(self) -> str:
        """What was said of a damaged JPEG, whosever it is."""
        with self._turn:
            self._inside -= 1
            if not self._inside:
                self._stderr.value = self._usual
            written, said = self._take()
            self._heard += bool(said)
            if self._alone:
                self._turn.notify_all()
        if written:
            _pass_on(written)
        return said

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

    def _take(self) -> tuple[bytes, str]:
        """What was written, whole lines only while others still decode; and what of damage."""
        if not self._pending(self._stream):
            return b"", ""
        written = ctypes.string_at(self._buffer, self._pending(self._stream))
        found = DAMAGE.search(written)  # a line of this thread is whole, whoever else is writing
        said = "" if found is None else found[0].decode("latin-1")
        # whoever holds the stream, or stopped in the middle of a line, comes by here when it leaves
        if self._libc.ftrylockfile(self._stream):
            return b"", said
        written = ctypes.string_at(self._buffer, self._pending(self._stream))
        whole = not self._inside or written.endswith(b"\n")
        if whole:
            self._purge(self._stream)
        self._libc.funlockfile(self._stream)
        return written if whole else b"", said

    def _reset(self) -> None:
        self._turn = threading.Condition(threading.Lock())
        self._inside = self._entered = self._heard = 0
        self._alone = 0
        """Thread that decodes while no other may; 0 for none."""
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


def hear_damage(decode: Callable[[], T], again: Callable[[], object]) -> tuple[T, str]:
    """`SilentStderr.hear` of this process; hears nothing where there is none."""
    stream = silent_stderr()
    return stream.hear(decode, again) if isinstance(stream, SilentStderr) else (decode(), "")


def _pass_on(written: bytes) -> None:
    """Write the lines that are not of the image libraries to file descriptor 2."""
    rest = b"".join(
        line for line in written.splitlines(True) if line.strip() and not NOISE.match(line)
    )
    if rest:
        with contextlib.suppress(OSError):
            os.write(2, rest)
