"""What a config dataclass holds: its leaves with their types, defaults and docstrings."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from typing import Any, Literal

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
    doc: str
    """The docstring under the field."""
    positional: bool = False
    """Given by place on the command line, not by flag."""
    repeated: bool = False
    """Its flag is given once for each of its texts."""
    bare: str | None = None
    """What its flag means without a value."""


def leaves(cls: type, prefix: str = "") -> list[Leaf]:
    """All leaves of a dataclass, nested dataclasses opened, in the order they are written."""
    found: list[Leaf] = []
    hints = typing.get_type_hints(cls)
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        key, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            found += leaves(typing.cast(type, kind), key + ".")
            continue
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        doc = docs.get(field.name, "")
        told: dict[str, Any] = {"bare": "true"} if kind is bool else {}
        found.append(Leaf(key=key, type=kind, default=default, doc=doc, **told, **field.metadata))
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
