"""Config dataclasses: their leaves, the conversion of raw values, durations, and keys by name."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import os
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal

from distcls.errors import BadValue
from distcls.registry import reference

MISSING = dataclasses.MISSING


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One value of a config: `optim.weight_decay`."""

    key: str
    """Dotted name from the root of the config."""
    type: Any
    """Its resolved annotation."""
    default: Any
    """Its default, or `dataclasses.MISSING`."""
    owner: type
    """The dataclass that has the field."""
    positional: bool = False
    """Whether it is a positional argument on the command line, not a flag."""
    repeated: bool = False
    """Whether its flag is repeated, once for each of its texts."""
    bare: str | None = None
    """The value of its flag when given without one."""

    @property
    def doc(self) -> str:
        """The docstring under the field; 15 ms for the first, as it is read from the source."""
        return field_docs(self.owner).get(self.key.rpartition(".")[2], "")


def leaves(cls: type, prefix: str = "") -> list[Leaf]:
    """All leaves of a dataclass, nested dataclasses opened, in the order they are written."""
    found: list[Leaf] = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            found += leaves(typing.cast(type, kind), key + ".")
            continue
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        told: dict[str, Any] = {"bare": "true"} if kind is bool else {}
        found.append(Leaf(key=key, type=kind, default=default, owner=cls, **told, **field.metadata))
    return found


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The string written under each field of a dataclass, its base classes' included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        body = typing.cast(ast.ClassDef, tree.body[0]).body
        for node, below in itertools.pairwise(body):
            text = below.value if isinstance(below, ast.Expr) else None
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(text, ast.Constant)
                and isinstance(text.value, str)
            ):
                docs[node.target.id] = " ".join(text.value.split())
    return docs


def members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself alone."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def sections(cls: type, prefix: str = "") -> dict[str, str]:
    """The nested dataclasses of a dataclass by key, with the first paragraph of their docstring."""
    found: dict[str, str] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            paragraph = (inspect.getdoc(kind) or "").partition("\n\n")[0]
            found[prefix + name] = " ".join(paragraph.split())
            found |= sections(typing.cast(type, kind), f"{prefix}{name}.")
    return found


def choices(kind: Any) -> tuple[str, ...]:
    """The words that a type allows; of a type that allows others too, those that it names."""
    if kind is bool:
        return ("true", "false")
    literals = [member for member in members(kind) if typing.get_origin(member) is Literal]
    return tuple(str(word) for literal in literals for word in typing.get_args(literal))


def metavar(kind: Any) -> str:
    """A type as a placeholder in help: `PATH`, `INT`, `{auto,on,off}`, `FLOAT|auto`."""
    plain = {int: "INT", float: "FLOAT", bool: "true|false", str: "TEXT", Path: "PATH"}
    words = choices(kind)
    parts = []
    for member in members(kind):
        if typing.get_origin(member) is tuple:
            items = [plain[item] for item in typing.get_args(member) if item is not ...]
            parts.append(",".join(items) if len(items) > 1 else f"{items[0]},...")
        elif typing.get_origin(member) is dict:
            parts.append(f"NAME={plain[typing.get_args(member)[1]]},...")
        elif member in plain:
            parts.append(plain[member])
    if words and not parts:
        return "{" + ",".join(words) + "}"
    return "|".join([*parts, *(words if kind is not bool else ())])


def describe(kind: Any) -> str:
    """A type in words a user reads: 'an integer', 'one of auto, on, off'."""
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    parts = []
    for member in members(kind):
        if member is type(None):
            parts.append("null")
        elif typing.get_origin(member) is Literal:
            parts.append("one of " + ", ".join(map(str, typing.get_args(member))))
        elif typing.get_origin(member) is tuple:
            items = typing.get_args(member)
            count = "a list of" if items[-1] is Ellipsis else f"{len(items)}"
            noun = {int: "integers", float: "numbers"}.get(items[0], "texts")
            parts.append(f"{count} {noun}")
        elif typing.get_origin(member) is dict:
            parts.append("names with a value each, such as a=1,b=2")
        else:
            parts.append(plain.get(member, "a path"))
    return " or ".join(parts)


NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
LARGEST = 1 << 63
"""Integers are below it: whatever counts with them takes no more."""


class Mismatch(Exception):
    """The raw value does not fit the type."""


def convert(raw: Any, kind: Any) -> Any:
    """Turn `raw` (a YAML value, or the text of a flag) into `kind`.

    Text is read generously, since flags know nothing else and YAML reads `1e-3` as text. Raises
    Mismatch if no alternative of `kind` takes it.
    """
    if isinstance(raw, str) and raw in choices(kind) and kind is not bool:
        # before null, which `none` stands for where it is no choice of its own
        kind = next(m for m in members(kind) if raw in choices(m))
    # null first: text would take the word `null` of a flag for a value
    for member in sorted(members(kind), key=lambda member: member is not type(None)):
        try:
            return _convert_one(raw, member)
        except Mismatch:
            continue
    raise Mismatch


def _convert_one(raw: Any, kind: Any) -> Any:
    if kind is type(None):
        if raw is None or (isinstance(raw, str) and raw.lower() in ("none", "null")):
            return None
        raise Mismatch
    if typing.get_origin(kind) is Literal:
        return _literal(raw, typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return _tuple(raw, typing.get_args(kind))
    if typing.get_origin(kind) is dict:
        return _mapping(raw, typing.get_args(kind)[1])
    if kind is bool:
        return _boolean(raw)
    if kind is Path:
        return Path(_text(raw))
    if kind is str:
        return _text(raw)
    if kind in (int, float):
        return _number(raw, kind)
    raise TypeError(f"config fields cannot have the type {kind}")


def _literal(raw: Any, choices: tuple[Any, ...]) -> Any:
    if isinstance(raw, bool):  # YAML 1.1 reads a bare on/off as a boolean
        raw = "on" if raw else "off"
    for choice in choices:
        if str(raw) == str(choice):
            return choice
    raise Mismatch


def _boolean(raw: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.lower() in words:
        return words[raw.lower()]
    raise Mismatch


def _number(raw: Any, kind: type) -> Any:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise Mismatch
    if isinstance(raw, str) and not NUMBER.fullmatch(raw.strip()):
        raise Mismatch  # Python takes 1_0, inf and the digits of other scripts, too
    try:
        number = kind(raw)
    except (ValueError, OverflowError) as error:
        raise Mismatch from error
    if isinstance(raw, float) and number != raw:  # int(0.5) would cut silently
        raise Mismatch
    if not (math.isfinite(number) if kind is float else -LARGEST < number < LARGEST):
        raise Mismatch
    return number


def _text(raw: Any) -> str:
    """A text; of a function, class or object, as Python hands them over, its `reference`.

    An empty one is most likely a variable of the shell that is not set.
    """
    if raw == "" or (isinstance(raw, str) and "\0" in raw):
        raise Mismatch
    if isinstance(raw, os.PathLike):
        return os.fsdecode(raw)
    if isinstance(raw, str | int | float) and not isinstance(raw, bool):
        return str(raw)
    if hasattr(raw, "__dict__"):
        return reference(raw)
    raise Mismatch


def _tuple(raw: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(raw, str):
        between = r"\s*,\s*" if kinds[0] is str else r"\s*[,x]\s*|\s+"  # texts hold spaces
        inside = raw.strip("[]() ")
        if kinds[0] is not str and re.search(r"^x|x$|x\s*x", inside):
            raise Mismatch  # `64x` is half of a size
        raw = [part for part in re.split(between, inside) if part]
    single = isinstance(raw, int | float) and not isinstance(raw, bool)
    if single or (kinds[0] is str and hasattr(raw, "__dict__")):  # a function, class or object
        raw = [raw]
    if not isinstance(raw, list | tuple):
        raise Mismatch
    if kinds[-1] is Ellipsis:
        return tuple(convert(item, kinds[0]) for item in raw)
    if len(raw) == 1 and len(set(kinds)) == 1:
        raw = list(raw) * len(kinds)  # `size: 224` means 224 by 224
    if len(raw) != len(kinds):
        raise Mismatch
    return tuple(convert(item, kind) for item, kind in zip(raw, kinds, strict=True))


def _mapping(raw: Any, kind: Any) -> dict[str, Any]:
    """Names with a value each, from YAML's mapping or from text such as `cat=2,dog=0.5`."""
    if isinstance(raw, str):
        parts = [part.rpartition("=") for part in raw.strip("{} ").split(",")]
        raw = {name.strip(): value.strip() for name, _, value in parts}
    if not isinstance(raw, dict) or not raw or "" in raw:
        raise Mismatch
    return {str(name): convert(value, kind) for name, value in raw.items()}


DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(%|epochs?|steps?)")
MOST = 10**9
"""Epochs or steps of a duration."""
EXPECTED = "a duration: '100 steps', '2 epochs' or '5%'"


def require_duration(field: str, text: str, *, above_zero: bool = False) -> None:
    """Raise BadValue for `field` unless `text` is a duration."""
    match = DURATION.fullmatch(text.strip())
    if match is None:
        raise BadValue(field, text, EXPECTED)
    if above_zero and float(match[1]) == 0:
        raise BadValue(field, text, "a duration above 0")
    most, unit = (100, "%") if match[2] == "%" else (MOST, f" {match[2]}")
    if float(match[1]) > most:
        raise BadValue(field, text, f"a duration of at most {most:,}{unit}")


def duration_in_steps(text: str, steps_per_epoch: int, total_steps: int) -> int:
    """'100 steps', '2 epochs' or '5%' in optimiser steps; the only conversion of durations."""
    match = DURATION.fullmatch(text.strip())
    if match is None:
        raise BadValue("duration", text, EXPECTED)
    amount, unit = float(match[1]), match[2]
    scale = {"%": total_steps / 100, "e": steps_per_epoch, "s": 1}[unit[0]]
    return round(amount * scale)
