"""Checks of labels that need no pixel: class names that mean one class."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping


def plain_name(name: str) -> str:
    """A class name without what is easily mistyped: case, blanks, Unicode form.

    >>> plain_name(" Cafe\\u0301  au lait") == plain_name("CAF\\u00c9 au lait")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def same_names(classes: Iterable[str]) -> list[list[str]]:
    """The class names that differ in case, blanks or Unicode form alone, together."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        groups[plain_name(name)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def conflicts(labels: Mapping[str, object], digests: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Pairs of image ids with the same pixels and different labels: a later one and the first."""
    first: dict[bytes, str] = {}
    found = []
    for name, digest in digests.items():
        other = first.setdefault(digest, name)
        if labels[name] != labels[other]:
            found.append((name, other))
    return found
