"""What a URL stands for: one image, a manifest, a glob, or everything below a folder or prefix."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from distcls.errors import BadImage, DistclsError, UsageError
from distcls.imaging.decode import SUFFIXES
from distcls.inference.inputs.manifest import ENDINGS, from_manifest
from distcls.inference.inputs.remote import Fetcher, filesystem_of, read
from distcls.inference.inputs.source import Names, Source, from_encoded

DEEPEST = 64
"""Folders below each other; a web server may make up any number of them."""

_TAGS = ("size", "ETag", "etag", "LastModified", "updated", "mtime")
"""What the stores call that which changes with an object."""

Listed = tuple[str, str]
"""URL of an object, and what the store says of its state."""


def from_url(url: str, timeout: float) -> Source:
    """The images that a URL stands for.

    Raises UsageError if there is none or the kind is not read from afar, DistclsError if the store
    does not answer.
    """
    filesystem_of(url)
    web = url.startswith("http")
    plain = url.partition("?")[0] if web else url  # a query is no part of the name
    base, _, last = plain.rpartition("/")
    ending = last[last.rfind(".") :].lower() if "." in last else ""
    magic = _magic(url, web)
    if magic is not None:
        root = url[:magic].rpartition("/")[0]
        return _from_listing(url, root, _matching(url, root, web), timeout, web=web)
    if ending in SUFFIXES:
        return _from_listing(url, base, [(url, "")], timeout, web=web)
    if ending in ENDINGS:
        return from_manifest(plain, base, timeout, _manifest(url, timeout))
    if ending == ".tar":
        raise UsageError(f"{url}: tar shards are read from disks; copy them here first")
    root = url.rstrip("/")
    found = (item for item in _walk(root, web) if _is_image(item[0]))
    return _from_listing(url, root, found, timeout, web=web)


def _manifest(url: str, timeout: float) -> bytes:
    try:
        return read(url, timeout)
    except BadImage as error:  # what `read` says of any object
        raise DistclsError(f"{url}: {error}") from error


def _from_listing(
    url: str, root: str, listed: Iterable[Listed], timeout: float, *, web: bool
) -> Source:
    try:
        objects = sorted(listed, key=lambda item: unquote(item[0]) if web else item[0])
    except FileNotFoundError as error:
        raise UsageError(f"{url}: there is nothing") from error
    except DistclsError:
        raise
    except Exception as error:  # each library has a tree of errors of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DistclsError(f"{url}: cannot be listed: {reason}") from error
    if not objects:
        endings = ", ".join(sorted(SUFFIXES))
        raise UsageError(f"{url}: no images there (searched for {endings})")
    urls = Names.of(name for name, _ in objects)
    below = (name[len(root) + 1 :].partition("?" if web else "\0")[0] for name, _ in objects)
    fetcher = Fetcher(lambda index: urls[index], len(urls), timeout)

    tags = hashlib.sha256("\n".join(tag for _, tag in objects).encode()).hexdigest()
    return from_encoded(
        Names.of(unquote(name) if web else name for name in below).printable(),
        fetcher.get,
        state=lambda: tags,
    )


def _matching(pattern: str, root: str, web: bool) -> Iterator[Listed]:
    """The objects that a glob means; as in a shell, * stays within a folder and ** does not."""
    from fsspec.utils import glob_translate

    matches = re.compile(glob_translate(pattern)).match
    depth = None if "**" in pattern else pattern[len(root) :].count("/")
    for url, tag in _walk(root, web, depth):
        if matches(unquote(url) if web else url):
            yield url, tag


def _walk(root: str, web: bool, depth: int | None = None) -> Iterator[Listed]:
    """All objects below a URL, at most `depth` folders deep.

    Not by fsspec's own `find`, which passes over folders that cannot be listed without a word.
    """
    system, scheme = filesystem_of(root), urlsplit(root).scheme
    folders, seen = [(root, 1)], {root}
    while folders:
        folder, level = folders.pop()
        for info in system.ls(folder, detail=True, refresh=True):
            name = str(info["name"]) if web else f"{scheme}://{info['name']}"
            if info["type"] != "directory":
                yield name, _tag(info)
            elif depth is None or level < depth:
                if level == DEEPEST:
                    raise DistclsError(f"{folder}: more than {DEEPEST} folders deep; a circle?")
                below = name.rstrip("/")
                if below.startswith(root + "/") and below not in seen:
                    seen.add(below)
                    folders.append((below, level + 1))


def _tag(info: dict[str, Any]) -> str:
    return " ".join(f"{info[key]}" for key in _TAGS if info.get(key) is not None)


def _is_image(url: str) -> bool:
    return url[url.rfind(".") :].lower() in SUFFIXES


def _magic(url: str, web: bool) -> int | None:
    """Where the wildcards of a glob begin; None if there are none.

    Of http a question mark begins a query, and brackets may be part of the host.
    """
    start = len("".join(urlsplit(url)[:2])) + len("://")
    found = [place for mark in ("*[" if web else "*[?") if (place := url.find(mark, start)) >= 0]
    return min(found, default=None)
