"""Errors meant for the person at the keyboard.

    DistclsError          the run failed                      exit code 1
    ├── UsageError        wrong usage or input                exit code 2
    │   └── BadValue      one field of a config is wrong      exit code 2
    ├── BadImage          one image cannot be decoded         its caller goes on
    └── Stopped           a signal stopped it; resume it      exit code 75

A command prints such an error as one line. Every other exception is a bug of ours and keeps its
traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DistclsError(Exception):
    """Something the user has to know about; its text is the whole message."""

    exit_code = 1


class UsageError(DistclsError):
    """The command, its options or its input are wrong."""

    exit_code = 2


class BadValue(UsageError):
    """One field of a dataclass holds a value it cannot hold.

    Raised by a dataclass that checks itself, which does not know under which key of which file it
    stands; whoever builds it adds that (see `distcls.config.load`).
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}: {value!r} is not valid, expected {expected}")
        self.field = field
        self.value = value
        self.expected = expected


class BadImage(DistclsError):
    """An image that cannot be used; the text is the reason, the caller knows the name."""


class Stopped(DistclsError):
    """A signal ended the run after it was saved; it can be resumed."""

    exit_code = 75


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """Raise BadValue for `field` unless `condition` holds."""
    if not condition:
        raise BadValue(field, value, expected)


def did_you_mean(name: str, choices: Iterable[str], most: int = 12) -> str:
    """A clause that helps after an unknown name: the nearest choice, or the choices if few."""
    known = list(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    clause = f"; did you mean {near[0]!r}?" if near else ""
    if known and (len(known) <= most or not near):
        shown = ", ".join(known[:most]) + (", ..." if len(known) > most else "")
        clause += f" (choices: {shown})"
    return clause
