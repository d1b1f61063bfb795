"""Images behind http://, https://, s3:// and gs://, read through fsspec.

An object that cannot be read is an error of that image, after three more attempts. Several are on
their way at a time, ahead of the threads that decode: one answer takes longer than one decoding.

Credentials, endpoints and the like are taken from where the libraries look for them; any option of
a file system can be set by FSSPEC_S3_ANON=true and the like (fsspec's documentation, "config").
"""

from __future__ import annotations

import array
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload
from urllib.parse import quote, urlsplit

from distcls.data.formats.folder import state_of
from distcls.data.source import Names
from distcls.errors import BadImage, UsageError, did_you_mean
from distcls.imaging.decode import read_file

SCHEMES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
"""What can be read, and the library that reads it."""

BACKOFF = (0.5, 1.0, 2.0)
"""Seconds before each further attempt."""

AT_ONCE = 16
"""Objects on their way at a time."""

AHEAD = 64
"""Objects fetched ahead of the one that is asked for."""

_TRANSIENT = (408, 425, 429)
"""Statuses below 500 after which another attempt makes sense."""


def is_url(text: str) -> bool:
    """Whether an input is a URL and not a path."""
    return "://" in text


@functools.cache
def filesystem(scheme: str) -> Any:
    """fsspec's file system of a scheme; nothing is connected yet.

    Raises UsageError for an unknown scheme or a library that is missing.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"unknown scheme {scheme + '://'!r}{did_you_mean(scheme, SCHEMES)}")
    try:
        import fsspec

        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise UsageError(
            f"{scheme}:// needs fsspec and {SCHEMES[scheme]}, which are not installed; pip install "
            '"distcls[remote]"'
        ) from error


def filesystem_of(url: str) -> Any:
    """The file system that a URL belongs to; raises as `filesystem` does."""
    return filesystem(urlsplit(url).scheme.lower())


def read(url: str, timeout: float) -> bytes:
    """The object behind a URL. Raises BadImage, saying why, after all attempts have failed."""
    for wait in (*BACKOFF, None):
        try:
            return _read_once(url, timeout)
        except Exception as error:  # each library has a tree of errors of its own
            reason = _reason(error, timeout)
            if wait is None or _final(error):
                raise BadImage(f"cannot be fetched: {reason}") from error
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _read_once(url: str, timeout: float) -> bytes:
    from fsspec.asyn import sync

    system = filesystem_of(url)
    place = system._strip_protocol(url)
    # `cat_file` itself knows no time limit; this is what it does, with one
    return bytes(sync(system.loop, system._cat_file, place, timeout=timeout))


def _final(error: Exception) -> bool:
    """Whether another attempt would end the same."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _TRANSIENT
    return isinstance(error, FileNotFoundError | PermissionError | UsageError)


def _reason(error: Exception, timeout: float) -> str:
    if isinstance(error, TimeoutError):  # asyncio's, which fsspec's own is one of
        return f"no whole answer within {timeout:g} s"
    if isinstance(error, FileNotFoundError):
        return "not found"
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    if isinstance(status, int):
        return f"{status} {message or ''}".strip()
    return (str(error) or type(error).__name__).splitlines()[0]


class Fetcher:
    """Objects by index, fetched ahead of the threads that ask for them, in bounded memory."""

    def __init__(self, url_of: Callable[[int], str | None], count: int, timeout: float) -> None:
        """`url_of` gives the URL at an index below `count`, or None if there is none to fetch."""
        self._url_of = url_of
        self._count = count
        self._timeout = timeout
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[bytes]] = {}
        self._next = 0
        # by this name a command that ends knows them, and does not wait for a slow server
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="distcls-fetch")

    def get(self, index: int) -> bytes:
        """The object at an index, each asked for once. Raises BadImage."""
        with self._lock:
            self._order(index)
            future = self._waiting.pop(index, None)
        if future is not None:
            return future.result()
        url = self._url_of(index)
        assert url is not None
        return read(url, self._timeout)

    def _order(self, index: int) -> None:
        if index > self._next + 64 * AHEAD:  # begins in the middle
            self._next = index
        until = min(self._count, index + AHEAD)
        for place in range(self._next, until):
            url = self._url_of(place)
            if url is not None:
                self._waiting[place] = self._pool.submit(read, url, self._timeout)
        self._next = max(self._next, until)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            self._pool.shutdown(wait=False, cancel_futures=True)


class Entries:
    """Images by paths or URLs; what is relative is below `base`, a folder or a URL."""

    def __init__(self, base: str, names: Names, timeout: float) -> None:
        """Raises UsageError if a library that a URL needs is missing."""
        self._base = base
        self._names = names
        self._fetcher = Fetcher(self._url, len(names), timeout)
        schemes = {urlsplit(base).scheme}
        if names.mentions("://"):
            schemes |= {urlsplit(name).scheme for name in names if is_url(name)}
        for scheme in sorted(schemes & SCHEMES.keys()):  # others are errors of their own rows
            filesystem(scheme)

    def read(self, index: int) -> bytes:
        """The file of one. Raises BadImage."""
        url = self._url(index)
        if url is None:
            return read_file(self._path(index))
        if urlsplit(url).scheme not in SCHEMES:
            raise BadImage(f"cannot be fetched: expected a path, or {', '.join(SCHEMES)}")
        return self._fetcher.get(index)

    def state(self) -> str:
        """Digest of the sizes and times of those that are files."""
        if is_url(self._base):
            return ""
        local = (name for name in self._names if not is_url(name))
        return state_of(os.path.join(self._base, name) for name in local)  # noqa: PTH118 - fast

    def _url(self, index: int) -> str | None:
        name = self._names[index]
        if is_url(name):
            return name
        if not is_url(self._base):
            return None
        web = self._base.startswith("http")  # other stores take names as they are
        return f"{self._base}/{quote(name) if web else name}"

    def _path(self, index: int) -> Path:
        return Path(self._base, self._names[index])


class Truths(Sequence[str | None]):
    """True classes, each name kept once: a million takes 4 MB."""

    def __init__(self) -> None:
        self._codes_of: dict[str | None, int] = {}
        self._known: list[str | None] = []
        self._codes = array.array("i")

    def extend(self, truths: Iterable[str | None]) -> None:
        """Add the next."""
        known = self._codes_of
        for truth in truths:
            if truth not in known:
                known[truth] = len(self._known)
                self._known.append(truth)
            self._codes.append(known[truth])

    def __len__(self) -> int:
        return len(self._codes)

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[str | None]: ...
    def __getitem__(self, index: int | slice) -> str | list[str | None] | None:
        if isinstance(index, slice):
            return [self._known[code] for code in self._codes[index]]
        return self._known[self._codes[index]]
