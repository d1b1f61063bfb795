"""From what YAML or a flag holds to the type a field asks for."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any, Literal

from distcls.config.schema import members


class Mismatch(Exception):
    """The raw value does not fit the type."""


def convert(raw: Any, kind: Any) -> Any:
    """Turn `raw` (a YAML value, or the text of a flag) into `kind`.

    Text is read generously, since flags know nothing else and YAML reads `1e-3` as text. Raises
    Mismatch if no alternative of `kind` takes it.
    """
    # null first: text would take the word `null` of a flag for a value
    for member in sorted(members(kind), key=lambda member: member is not type(None)):
        try:
            return _convert_one(raw, member)
        except Mismatch:
            continue
    raise Mismatch


def _convert_one(raw: Any, kind: Any) -> Any:
    if kind is type(None):
        if raw is None or (isinstance(raw, str) and raw.lower() in ("none", "null", "")):
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
    try:
        number = kind(raw)
    except (ValueError, OverflowError) as error:
        raise Mismatch from error
    if isinstance(raw, float) and number != raw:  # int(0.5) would cut silently
        raise Mismatch
    return number


def _text(raw: Any) -> str:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float | Path):
        raise Mismatch
    return str(raw)


def _tuple(raw: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(raw, str):
        between = r"\s*,\s*" if kinds[0] is str else r"[,x\s]+"  # texts hold spaces: `2 epochs`
        raw = [part for part in re.split(between, raw.strip("[]() ")) if part]
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        raw = [raw]
    if not isinstance(raw, list | tuple):
        raise Mismatch
    if kinds[-1] is Ellipsis:
        return tuple(convert(item, kinds[0]) for item in raw)
    if len(raw) == 1 and len(set(kinds)) == 1:
        raw = list(raw) * len(kinds)  # `size: 224` stands for 224 by 224
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
