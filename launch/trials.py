"""The trials of a search: which values are combined, and the whole config of each."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from distcls.config import build, dump_yaml, flatten, leaves
from distcls.config.load import Given
from distcls.config.schema import members
from distcls.errors import UsageError, did_you_mean
from distcls.training.config import TrainConfig

RESERVED = {
    "out": "each trial has a folder of its own",
    "resume": "trials are resumed with the search",
    "processes": "it changes how a trial is run, not what it learns",
    "json": "it changes what is printed",
    "quiet": "it changes what is printed",
    "monitor.metric": "trials are ranked by one metric",
    "monitor.mode": "trials are ranked by one metric",
}
"""Keys that cannot be searched, and why."""
NAME_LETTERS = 80
"""Of a trial's values in the name of its folder."""
TRIES = 1000
"""Draws for each trial before there are too few different ones."""

Values = dict[str, str]
"""Keys and values as on the command line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a search."""

    number: int
    """Counted from 1."""
    values: Values
    config: TrainConfig
    """Of the run; its `out` is the trial's own folder."""

    @property
    def name(self) -> str:
        """Of its folder: `002-lr=0.003-mixup=0.2`."""
        return self.config.out.name

    @property
    def recipe(self) -> Path:
        """The config as a file beside the folder, which the run is started with."""
        return self.config.out.with_name(self.name + ".yaml")

    @property
    def log(self) -> Path:
        """What the run said."""
        return self.config.out.with_name(self.name + ".log")


def plan(
    base: TrainConfig,
    grid: Sequence[str],
    ranges: Sequence[str],
    *,
    random: int | None,
    own: Sequence[str] = (),
) -> list[Trial]:
    """All trials: each combination of the grid's values, or `random` drawn ones.

    `base` may be a TrainConfig with more keys, `own`. Every config is built here: raises UsageError
    for keys and values that are not valid, and for those that contradict each other.
    """
    choices = read_grid(grid)
    spans = read_ranges(ranges, set(choices))
    combinations = _all(choices) if random is None else _drawn(choices, spans, random, base.seed)
    tree = flatten(yaml.safe_load(dump_yaml(base)))
    known = {key: Given(value, "config") for key, value in tree.items() if key not in own}
    return [_trial(number, values, known, base.out) for number, values in combinations]


def read_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """`lr=1e-3,3e-3` as a key and its values, which `;` separates where they hold commas."""
    found: dict[str, list[str]] = {}
    for text in texts:
        key, values = _key_and_rest("grid", text, "KEY=VALUE,VALUE", found)
        parts = [part.strip() for part in values.split(";" if ";" in values else ",")]
        if "" in parts:
            raise UsageError(f"grid: {text!r} is not valid, expected KEY=VALUE,VALUE")
        twice = next((part for part in parts if parts.count(part) > 1), None)
        if twice is not None:
            raise UsageError(f"grid: {key}: {twice} stands there twice")
        found[key] = parts
    return found


def read_ranges(texts: Sequence[str], taken: set[str]) -> dict[str, tuple[float, float]]:
    """`lr=1e-4..1e-2` as a key with its lowest and highest value; no key of `taken` again."""
    found: dict[str, tuple[float, float]] = {}
    for text in texts:
        key, rest = _key_and_rest("range", text, "KEY=LOW..HIGH", {*found, *taken})
        low, _, high = rest.partition("..")
        try:
            span = float(low), float(high)
        except ValueError:
            raise UsageError(f"range: {text!r} is not valid, expected KEY=LOW..HIGH") from None
        if not 0 < span[0] < span[1] < math.inf:
            raise UsageError(
                f"range: {text!r} is not valid, expected 0 < LOW < HIGH: the logarithm is drawn"
            )
        if not {int, float} & set(members(_types()[key])):
            raise UsageError(f"range: {key} is no number; give its values with --grid {key}=...")
        found[key] = span
    return found


def _key_and_rest(
    flag: str, text: str, shape: str, taken: Mapping[str, object] | set[str]
) -> tuple[str, str]:
    name, equals, rest = text.partition("=")
    key = name.strip().replace("-", "_")
    if not equals or not key or not rest.strip():
        raise UsageError(f"{flag}: {text!r} is not valid, expected {shape}")
    if key not in _types():
        raise UsageError(f"{flag}: unknown key {key!r}{did_you_mean(key, _types())}")
    if key in RESERVED:
        raise UsageError(f"{flag}: {key} cannot be searched: {RESERVED[key]}")
    if key in taken:
        raise UsageError(f"{flag}: {key} is given twice; name all of its values at once")
    return key, rest


def _types() -> dict[str, object]:
    return {leaf.key: leaf.type for leaf in leaves(TrainConfig)}


def _all(choices: dict[str, list[str]]) -> Iterator[tuple[int, Values]]:
    for number, parts in enumerate(itertools.product(*choices.values()), 1):
        yield number, dict(zip(choices, parts, strict=True))


def _drawn(
    choices: dict[str, list[str]], spans: dict[str, tuple[float, float]], count: int, seed: int
) -> Iterator[tuple[int, Values]]:
    """`count` different combinations; the first ones are the same for any `count`."""
    possible = math.inf if spans else math.prod(map(len, choices.values()))
    if count > possible:
        raise UsageError(
            f"random: {count} of only {possible} combinations; without --random all are trained"
        )
    met: list[Values] = []
    types = _types()
    for attempt in range(TRIES * count):
        rng = np.random.default_rng([seed, attempt])
        values = {key: parts[rng.integers(len(parts))] for key, parts in choices.items()}
        for key, span in spans.items():
            whole = float not in members(types[key])
            values[key] = _log_uniform(rng, *span, whole=whole)
        if values not in met:
            met.append(values)
            yield len(met), values
        if len(met) == count:
            return
    raise UsageError(f"random: {count}, but the ranges hold only about {len(met)} combinations")


def _log_uniform(rng: np.random.Generator, low: float, high: float, *, whole: bool) -> str:
    """A number whose logarithm is uniform, with four digits; within the range all the same."""
    number = math.exp(rng.uniform(math.log(low), math.log(high)))
    if whole:
        return str(min(max(round(number), math.ceil(low)), math.floor(high)))
    return f"{min(max(float(f'{number:.4g}'), low), high):g}"


def _trial(number: int, values: Values, known: dict[str, Given], folder: Path) -> Trial:
    short = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())
    name = f"{number:03d}-" + re.sub(r"[^\w.=+-]+", "_", short)[:NAME_LETTERS]
    chosen = {key: Given(value, f"trial {number:03d}") for key, value in values.items()}
    fixed = {"out": folder / name, "resume": "auto", "json": True, "quiet": False}
    ours = {key: Given(value, "search") for key, value in fixed.items()}
    return Trial(number=number, values=values, config=build(TrainConfig, known, chosen, ours))
