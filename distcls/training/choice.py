"""Sections of the config whose `name` decides which of their other keys are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distcls.errors import did_you_mean, require

Usual = Mapping[str, Mapping[str, Any]]
"""For each name the keys that it reads, with the values they have where the config says null."""


def require_choice(name: str, usual: Usual, what: str) -> None:
    """Raise BadValue unless `name` is one of the choices, naming the nearest."""
    require(name in usual, "name", name, f"a known {what}{did_you_mean(name, usual)}")


def refuse_unread(config: Any, usual: Usual) -> None:
    """Raise BadValue for a key that is given although `config.name` does not read it.

    Keys that stand in no row of `usual` are read whatever the name is.
    """
    own = usual[config.name]
    others = {key: None for row in usual.values() for key in row if key not in own}
    for key in others:
        value = getattr(config, key)
        why = f"null, as {config.name} does not read it (it reads {', '.join(own)})"
        require(value is None, key, value, why)
