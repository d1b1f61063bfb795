"""File names made from class names and image ids, which may hold anything."""

from __future__ import annotations

import re
from collections.abc import Iterable

_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*\ud800-\udfff]')
_LONGEST = 150  # characters; file systems take 255 bytes


def safe_names(names: Iterable[str]) -> list[str]:
    """A file name for each name, in order, distinct also where upper and lower case are one.

    >>> safe_names(["T-shirt/top", "T-shirt_top", ".."])
    ['T-shirt_top', 'T-shirt_top~2', '_.']
    """
    used: dict[str, int] = {}
    safe = []
    for name in names:
        plain = _shorten(_UNSAFE.sub("_", name).rstrip(". "))
        plain = "_" + plain[1:] if plain[:1] in ("", ".") else plain
        candidate = plain
        while candidate.casefold() in used:
            used[plain.casefold()] += 1
            candidate = f"{plain}~{used[plain.casefold()]}"
        used[candidate.casefold()] = 1
        safe.append(candidate)
    return safe


def _shorten(name: str) -> str:
    """The end of a long name, which is what tells files apart."""
    short = name[-_LONGEST:]
    while len(short.encode()) > 200:
        short = short[1:]
    return short
