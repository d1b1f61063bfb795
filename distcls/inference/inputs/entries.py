"""Paths and URLs, mixed: what manifests and lists are made of."""

from __future__ import annotations

import array
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload
from urllib.parse import quote, urlsplit

from distcls.errors import BadImage
from distcls.imaging.decode import read_file
from distcls.inference.inputs.files import state_of
from distcls.inference.inputs.remote import SCHEMES, Fetcher, filesystem, is_url
from distcls.inference.inputs.source import Names


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
