"""From what YAML or a flag holds to the type a field asks for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest

from distcls.config.schema import Mismatch, convert

CONVERTS: list[tuple[Any, Any, Any]] = [
    ("3", int, 3),
    (3, int, 3),
    (3.0, int, 3),
    ("1e-3", float, 1e-3),
    (2, float, 2.0),
    (7, str, "7"),
    ("a b", str, "a b"),
    ("x/y", Path, Path("x/y")),
    (True, bool, True),
    ("No", bool, False),
    ("on", bool, True),
    ("null", int | None, None),
    ("None", str | None, None),
    (None, str | None, None),
    ("4", int | None, 4),
    ("1", Literal["auto", 1, 2], 1),
    ("auto", Literal["auto", 1, 2], "auto"),
    (True, Literal["auto", "on", "off"], "on"),
    (False, Literal["auto", "on", "off"], "off"),
    ("224", tuple[int, int], (224, 224)),
    (224, tuple[int, int] | None, (224, 224)),
    ("224x320", tuple[int, int], (224, 320)),
    ("[224, 320]", tuple[int, int], (224, 320)),
    ([224, 320], tuple[int, int], (224, 320)),
    ("0.35,1", tuple[float, float] | None, (0.35, 1.0)),
    ("none", tuple[float, float] | None, None),
    ("a,b,c", tuple[str, ...], ("a", "b", "c")),
    ("[2 epochs, 75%]", tuple[str, ...], ("2 epochs", "75%")),
    ([1, 2, 3], tuple[float, ...], (1.0, 2.0, 3.0)),
    ({"a": 1, 2: "3"}, dict[str, float], {"a": 1.0, "2": 3.0}),
    ("fox=1, T-shirt/top=0.5", dict[str, float], {"fox": 1.0, "T-shirt/top": 0.5}),
    ("1,2", tuple[float, ...] | dict[str, float], (1.0, 2.0)),
]

REFUSED: list[tuple[Any, Any]] = [
    ("three", int),
    ("3.5", int),
    (3.5, int),
    (math.inf, int),
    (10**400, float),
    (True, int),
    (False, float),
    (None, int),
    ([1], int),
    (None, str),
    (True, str),
    ([1], Path),
    ("maybe", bool),
    (1, bool),
    ("3", Literal["auto", 1, 2]),
    (True, Literal["auto", 1, 2]),
    ("1,2,3", tuple[int, int]),
    ([], tuple[int, int]),
    ([1, "b"], tuple[int, int]),
    (True, tuple[int, int]),
    ({"a": 1}, tuple[int, int]),
    ({"a": "b"}, dict[str, float]),
    ({}, dict[str, float]),
    ("a=1,b", dict[str, float]),
    ("=1", dict[str, float]),
    ([1], dict[str, float]),
]


@pytest.mark.parametrize(("raw", "kind", "value"), CONVERTS)
def test_convert(raw: Any, kind: Any, value: Any) -> None:
    result = convert(raw, kind)
    assert result == value
    assert type(result) is type(value)
    if isinstance(value, tuple):
        assert [type(item) for item in result] == [type(item) for item in value]


@pytest.mark.parametrize(("raw", "kind"), REFUSED)
def test_convert_refuses(raw: Any, kind: Any) -> None:
    with pytest.raises(Mismatch):
        convert(raw, kind)


def test_a_field_of_unknown_type_is_our_bug() -> None:
    with pytest.raises(TypeError, match="dict"):
        convert("x", dict)
