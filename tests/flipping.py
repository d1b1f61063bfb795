"""Flips single bits of a file and counts those that its reader refuses, or that have no effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from distcls.errors import DistclsError

STRIDE = 97
"""One bit of every so many bytes is flipped, each time the next one."""


class Flips(NamedTuple):
    """How many flips there were, and what became of them."""

    tried: int
    refused: int
    without_effect: int


def flip(path: Path, read: Callable[[], Any], *, stride: int = STRIDE, first: int = 0) -> Flips:
    """Flip one bit at every `stride`-th place and read; put the file back.

    What `read` returns has to be all that the file can change. Fails for a flip that changes it,
    for a refusal of more than one line, and for anything raised that is no DistclsError.
    """
    data = path.read_bytes()
    right, refused, same = read(), 0, 0
    places = range(first % stride, len(data), stride)
    try:
        for number, place in enumerate(places):
            path.write_bytes(flipped(data, place, number % 8))
            try:
                found = read()
            except DistclsError as error:
                text = str(error)
                assert "\n" not in text, f"{path.name}, byte {place}: {text}"
                assert len(text) < 1000, f"{path.name}, byte {place}: {text}"
                refused += 1
            else:
                assert found == right, f"{path.name}, byte {place}, bit {number % 8}: taken"
                same += 1
    finally:
        path.write_bytes(data)
    return Flips(len(places), refused, same)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    """The same bytes but for one bit."""
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
