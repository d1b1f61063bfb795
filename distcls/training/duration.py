"""Durations, such as '100 steps', '2 epochs' or '5%', in optimiser steps."""

from __future__ import annotations

import re

from distcls.errors import BadValue

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(%|epochs?|steps?)")
EXPECTED = "a duration: '100 steps', '2 epochs' or '5%'"


def require_duration(field: str, text: str, *, above_zero: bool = False) -> None:
    """Raise BadValue for `field` unless `text` is a duration."""
    match = DURATION.fullmatch(text.strip())
    if match is None:
        raise BadValue(field, text, EXPECTED)
    if above_zero and float(match[1]) == 0:
        raise BadValue(field, text, "a duration above 0")


def duration_in_steps(text: str, steps_per_epoch: int, total_steps: int) -> int:
    """'100 steps', '2 epochs' or '5%' in optimiser steps. Every duration comes through here."""
    match = DURATION.fullmatch(text.strip())
    if match is None:
        raise BadValue("duration", text, EXPECTED)
    amount, unit = float(match[1]), match[2]
    scale = {"%": total_steps / 100, "e": steps_per_epoch, "s": 1}[unit[0]]
    return round(amount * scale)
