"""Images behind http://, https://, s3:// and gs://, read through fsspec.

An object that cannot be read is an error of that image, after three more attempts; so is one that
is larger than DISTCLS_MAX_BYTES, unpacked if the server has packed it. Objects are prefetched, 16
at a time: one response takes longer than one decoding. fsspec fetches one object or a whole list;
prefetching in order, in bounded memory, with a time limit and retries, is done here.

Credentials, endpoints and the like are read from the libraries' default locations; any option of
a file system can be set by FSSPEC_S3_ANON=true and the like (fsspec's documentation, "config").
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from distcls.data.formats.folder import LeftOut, is_hidden, is_image_name
from distcls.data.source import (
    ImageSource,
    LabelledImages,
    LabelOptions,
    Names,
    real_paths,
    state_of,
)
from distcls.errors import BadImage, DistclsError, UsageError, did_you_mean
from distcls.imaging.decode import SUFFIXES
from distcls.imaging.reading import byte_limit, read_file, require_bytes

SCHEMES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
"""What can be read, and the library that reads it."""

BACKOFF = (0.5, 1.0, 2.0)
"""Seconds before each further attempt."""

CONCURRENT = 16
"""Objects fetched at a time."""

PREFETCH = 64
"""Objects prefetched beyond the one that is requested, fewer where they are large."""

LARGE_BYTES, LARGE_AT_A_TIME = 1 << 24, 4
"""Answers of a web server that are larger are received four at a time."""
LISTING_TIMEOUT = 300.0
"""Seconds that one folder's listing may take, however steadily it comes."""

_TRANSIENT = (408, 425, 429)
"""Statuses below 500 after which another attempt makes sense."""


def is_url(text: str) -> bool:
    """Whether an input is a URL and not a path."""
    return "://" in text


@functools.cache
def filesystem(scheme: str, timeout: float | None = None) -> Any:
    """fsspec's file system of a scheme; nothing is connected yet.

    With http, `timeout` are the seconds that a server may be silent. Raises UsageError for an
    unknown scheme or a library that is missing.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"unknown scheme {scheme + '://'!r}{did_you_mean(scheme, SCHEMES)}")
    try:
        import fsspec

        if SCHEMES[scheme] == "aiohttp":
            opened = functools.partial(_open_session, timeout)
            return fsspec.filesystem(scheme, get_client=opened)
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise UsageError(
            f"{scheme}:// needs fsspec and {SCHEMES[scheme]}, which are not installed; pip install "
            '"distcls[remote]"'
        ) from error


def filesystem_of(url: str, timeout: float | None = None) -> Any:
    """The file system that a URL belongs to; raises as `filesystem` does."""
    return filesystem(urlsplit(url).scheme.lower(), timeout)


async def _open_session(silence: float | None, **options: Any) -> Any:
    """An aiohttp session whose answers are bounded, also where they are packed."""
    import asyncio

    import aiohttp

    turn = asyncio.Semaphore(LARGE_AT_A_TIME)

    class BoundedResponse(aiohttp.ClientResponse):
        """A response whose body is no larger than an image may be."""

        async def read(self) -> bytes:
            """Read the body, once. Raises BadImage if it is too large."""
            if self._body is None:
                self._body = await _bounded(self, turn)
            return self._body

    total = None if silence is None else max(silence, LISTING_TIMEOUT)
    limits = aiohttp.ClientTimeout(total=total, sock_connect=silence, sock_read=silence)
    given = {"timeout": limits, **options, "response_class": BoundedResponse}
    return aiohttp.ClientSession(**given)


async def _bounded(response: Any, turn: Any) -> bytes:
    parts: list[bytes] = []
    size = 0
    async with contextlib.AsyncExitStack() as large:
        async for part in response.content.iter_any():
            if size <= LARGE_BYTES < size + len(part):
                await large.enter_async_context(turn)
            parts.append(part)
            size += len(part)
            try:
                require_bytes(size)
            except BadImage:
                response.close()
                raise
    return b"".join(parts)


def read(url: str, timeout: float) -> bytes:
    """The object behind a URL. Raises BadImage, saying why, after all attempts have failed."""
    for wait in (*BACKOFF, None):
        try:
            return _read_once(url, timeout)
        except BadImage:  # too large
            raise
        except Exception as error:  # each library has a tree of errors of its own
            reason = _reason(error, timeout)
            if wait is None or _final(error):
                raise BadImage(f"cannot be fetched: {reason}") from error
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _read_once(url: str, timeout: float) -> bytes:
    from fsspec.asyn import sync

    system = filesystem_of(url, timeout)
    place = system._strip_protocol(url)
    # `cat_file` itself knows no time limit; this is what it does, with one
    data = bytes(sync(system.loop, system._cat_file, place, timeout=timeout))
    require_bytes(len(data))
    return data


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


class Prefetcher:
    """Objects by index, prefetched for the threads that request them, in bounded memory."""

    def __init__(self, url_of: Callable[[int], str | None], count: int, timeout: float) -> None:
        """`url_of` gives the URL at an index below `count`, or None if there is none to fetch.

        It must not be a method of what holds the prefetcher: a cycle of references would keep the
        threads until the garbage collector passes.
        """
        self._url_of = url_of
        self._count = count
        self._timeout = timeout
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[bytes]] = {}
        self._next = 0
        # a command that ends recognises them by this name, and does not wait for a slow server
        self._pool = ThreadPoolExecutor(CONCURRENT, thread_name_prefix="distcls-fetch")

    def get(self, index: int) -> bytes:
        """The object at an index; each index is to be requested once. Raises BadImage."""
        with self._lock:
            self._submit(index)
            future = self._waiting.pop(index, None)
        if future is not None:
            try:
                return future.result()
            finally:
                del future  # a cycle too: its exception, the traceback, this frame
        url = self._url_of(index)
        assert url is not None
        return read(url, self._timeout)

    def _submit(self, index: int) -> None:
        if index > self._next + 64 * PREFETCH:  # begins in the middle
            self._next = index
        until = min(self._count, index + (1 if self._is_full() else PREFETCH))
        for place in range(self._next, until):
            url = self._url_of(place)
            if url is not None:
                self._waiting[place] = self._pool.submit(read, url, self._timeout)
        self._next = max(self._next, until)

    def __reduce__(self) -> tuple[Any, ...]:
        return Prefetcher, (self._url_of, self._count, self._timeout)

    def _is_full(self) -> bool:
        """Whether what has been fetched and not requested yet takes as much as an image may."""
        done = (future for future in self._waiting.values() if future.done())
        sizes = (len(each.result()) for each in done if each.exception() is None)
        return sum(sizes) > byte_limit()

    def __del__(self) -> None:
        pool = getattr(self, "_pool", None)  # modules are gone where the interpreter ends
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


class ListedSource(ImageSource):
    """Images by paths or URLs; relative ones are below `base`, a folder or a URL."""

    def __init__(
        self, base: str, files: Names, timeout: float, image_ids: Names | None = None
    ) -> None:
        """`image_ids` None takes the paths. Raises UsageError if a URL's library is missing."""
        self.base = base
        self.files = files
        self._image_ids = files.printable() if image_ids is None else image_ids
        self._url_of = functools.partial(_url_of, base, files)
        self._prefetcher = Prefetcher(self._url_of, len(files), timeout)
        schemes = {urlsplit(base).scheme}
        if files.mentions("://"):
            schemes |= {_scheme(name) for name in files if is_url(name)}
        for scheme in sorted(schemes & SCHEMES.keys()):  # bad URLs are errors of their own rows
            filesystem(scheme)

    @property
    def image_ids(self) -> Sequence[str]:
        """See `ImageSource`."""
        return self._image_ids

    def read(self, index: int) -> bytes:
        """See `ImageSource`."""
        url = self._url_of(index)
        if url is None:
            return read_file(Path(self.base, self.files[index]))
        if _scheme(url) not in SCHEMES:
            raise BadImage(f"cannot be fetched: expected a path, or {', '.join(SCHEMES)}")
        return self._prefetcher.get(index)

    def paths(self) -> Iterator[str] | None:
        """See `ImageSource`."""
        return None if is_url(self.base) else real_paths(self.base, self.files)

    def state(self) -> str:
        """See `ImageSource`; of the files alone, not of the URLs."""
        if is_url(self.base):
            return ""
        local = (name for name in self.files if not is_url(name))
        return state_of(os.path.join(self.base, name) for name in local)  # noqa: PTH118 - fast


def _url_of(base: str, files: Names, index: int) -> str | None:
    name = files[index]
    if is_url(name):
        return name
    if not is_url(base):
        return None
    web = base.startswith("http")  # other stores take names as they are
    return f"{base}/{quote(name) if web else name}"


def _scheme(url: str) -> str:
    try:
        return urlsplit(url).scheme
    except ValueError:  # such as http://[::1/x.jpg
        return ""


DEEPEST = 64
"""Folders below each other; a web server may make up any number of them."""

_TAGS = ("size", "ETag", "etag", "LastModified", "updated", "mtime")
"""Keys of the stores' listings whose values change with an object."""

Listed = tuple[str, str]
"""URL of an object, and its state in the store's listing."""


class RemoteSource(ImageSource):
    """The images behind a URL: an object, a glob, or all images below a folder, sorted."""

    def __init__(self, url: str, timeout: float) -> None:
        """Raises UsageError if there is none, DistclsError if the store does not respond."""
        self.location = url
        web = url.startswith("http")
        root, listed = _listed(url, web, timeout)
        objects = _sorted(url, listed, web, timeout)
        urls = Names.of(name for name, _ in objects)
        below = (name[len(root) + 1 :].partition("?" if web else "\0")[0] for name, _ in objects)
        names = Names.of(unquote(name) if web else name for name in below)
        self._image_ids = names.printable()
        self._state = hashlib.sha256("\n".join(tag for _, tag in objects).encode()).hexdigest()
        self._prefetcher = Prefetcher(lambda index: urls[index], len(urls), timeout)

    @property
    def image_ids(self) -> Sequence[str]:
        """See `ImageSource`: the part of the URL below the folder, unquoted."""
        return self._image_ids

    def read(self, index: int) -> bytes:
        """See `ImageSource`."""
        return self._prefetcher.get(index)

    def state(self) -> str:
        """See `ImageSource`: sizes, times and tags as the store's listing has them."""
        return self._state

    def labelled(self, options: LabelOptions) -> LabelledImages:
        """Raises UsageError: a dataset is written from local files."""
        raise UsageError(
            f"{self.location}: a dataset is prepared from local files; copy them here first"
        )


def ending_of(url: str) -> str:
    """The ending of the object's name, in lower case; a query is no part of it."""
    last = _without_query(url).rpartition("/")[2]
    return last[last.rfind(".") :].lower() if "." in last else ""


def folder_of(url: str) -> str:
    """The URL of the folder that an object lies in."""
    return _without_query(url).rpartition("/")[0]


def _without_query(url: str) -> str:
    return url.partition("?")[0] if url.startswith("http") else url


def is_pattern(url: str) -> bool:
    """Whether a URL is a glob."""
    return _magic(url, url.startswith("http")) is not None


def _listed(url: str, web: bool, timeout: float) -> tuple[str, Iterable[Listed]]:
    """The folder that names are relative to, and the objects that a URL means."""
    magic = _magic(url, web)
    if magic is not None:
        root = url[:magic].rpartition("/")[0]
        return root, _matching(url, root, web, timeout)
    if ending_of(url) in SUFFIXES:
        return folder_of(url), [(url, "")]
    root = url.rstrip("/")
    return root, _images_below(url, root, web, timeout)


def _images_below(url: str, root: str, web: bool, timeout: float) -> Iterator[Listed]:
    left_out = LeftOut()
    for name, tag in _walk(root, web, timeout):
        if not is_image_name(name):
            left_out.add_other(name)  # by its ending: the first bytes cost a request each
            continue
        if is_hidden(name[len(root) + 1 :]):
            left_out.add("hidden_images", name)
        else:
            yield name, tag
    left_out.say(url)


def _sorted(url: str, listed: Iterable[Listed], web: bool, timeout: float) -> list[Listed]:
    try:
        objects = sorted(listed, key=lambda item: unquote(item[0]) if web else item[0])
    except FileNotFoundError as error:
        raise UsageError(f"{url}: nothing found") from error
    except BadImage as error:  # what a listing that is too large is said to be
        raise DistclsError(f"{url}: cannot be listed: {error}") from error
    except DistclsError:
        raise
    except Exception as error:  # each library has a tree of errors of its own
        reason = _reason(error, timeout)
        raise DistclsError(f"{url}: cannot be listed: {reason}") from error
    if not objects:
        endings = ", ".join(sorted(SUFFIXES))
        raise UsageError(f"{url}: no images there (searched for {endings})")
    return objects


def _matching(pattern: str, root: str, web: bool, timeout: float) -> Iterator[Listed]:
    """The objects that a glob means; as in a shell, * stays within a folder and ** does not."""
    from fsspec.utils import glob_translate

    matches = re.compile(glob_translate(pattern)).match
    depth = None if "**" in pattern else pattern[len(root) :].count("/")
    hidden = "/." in pattern[len(root) :]
    for url, tag in _walk(root, web, timeout, depth):
        below = url[len(root) + 1 :]
        if matches(unquote(url) if web else url) and (hidden or not is_hidden(below)):
            yield url, tag


def _walk(root: str, web: bool, timeout: float, depth: int | None = None) -> Iterator[Listed]:
    """All objects below a URL, at most `depth` folders deep.

    Not by fsspec's own `find`, which silently skips folders that cannot be listed.
    """
    system, scheme = filesystem_of(root, timeout), urlsplit(root).scheme
    folders, seen = [(root, 1)], {root}
    while folders:
        folder, level = folders.pop()
        for info in system.ls(folder, detail=True, refresh=True):
            name = str(info["name"]) if web else f"{scheme}://{info['name']}"
            if info["type"] != "directory":
                yield name, _tag(info)
            elif depth is None or level < depth:
                if level == DEEPEST:
                    raise DistclsError(
                        f"{folder}: more than {DEEPEST} folders deep; do links form a cycle?"
                    )
                below = name.rstrip("/")
                if below.startswith(root + "/") and below not in seen:
                    seen.add(below)
                    folders.append((below, level + 1))


def _tag(info: dict[str, Any]) -> str:
    return " ".join(f"{info[key]}" for key in _TAGS if info.get(key) is not None)


def _magic(url: str, web: bool) -> int | None:
    """Index of the first wildcard of a glob; None if there is none.

    Of http a question mark begins a query, and brackets may be part of the host.
    """
    start = len("".join(urlsplit(url)[:2])) + len("://")
    found = [place for mark in ("*[" if web else "*[?") if (place := url.find(mark, start)) >= 0]
    return min(found, default=None)
