"""The space of a search: its keys and values, what optuna is given, and the config of every trial.

optuna takes values of any type; here every config is built, and its network and dataset looked up,
before the first trial is started.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from distcls import log
from distcls.config import build, dump_yaml, flatten, leaves, repeated
from distcls.config.load import RENAMED, Given
from distcls.config.schema import members
from distcls.data.dataset import Dataset, is_dataset
from distcls.errors import UsageError, did_you_mean, require
from distcls.files import TEMPLATES
from distcls.system import available_cores
from distcls.training.config import TrainConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

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
HOW = ("out", "resume", "json", "quiet")
"""Keys that may differ in a continued search."""
LOCK = ".lock"
"""File in the folder of a search, which it locks."""
TRIES = 200
"""Draws for each random trial before there are too few different ones."""
MOST_CHECKED = 1000
"""Combinations of a space searched by TPE that are checked before the first trial."""
LAUNCHER = TEMPLATES.find("two_cpu_processes")
"""Starts any number of processes on one machine, on GPUs where there are some."""

Values = dict[str, str]
"""Keys and values as on the command line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig(TrainConfig):
    """The keys of a training run, common to all trials, and those of the search."""

    out: Path = dataclasses.field()
    """Folder of the search, with a run directory for each trial."""
    grid: tuple[str, ...] = repeated()
    """Key and the values to try, such as `lr=1e-3,3e-3`; use `;` between values that contain
    commas. Repeat it for each key."""
    range: tuple[str, ...] = repeated()
    """With random or tpe: key and the range to draw from, log-uniformly, such as `lr=1e-4..1e-2`.
    Repeat it for each key."""
    random: int | None = None
    """Number of random combinations, drawn with `seed`: short for --sampler random --trials N."""
    sampler: Literal["grid", "random", "tpe"] | None = None
    """How values are chosen: grid: all combinations; random: random ones; tpe: near the values of
    the best trials so far (Bergstra et al.: Algorithms for Hyper-Parameter Optimization, 2011);
    default: random with --random, else grid."""
    trials: int | None = None
    """With random or tpe: number of trials."""
    pruner: Literal["none", "median", "hyperband"] = "none"
    """Stops trials early: median stops those whose metric is below the median of at least five
    finished trials at the same epoch, hyperband (Li et al., 2018) all but the best third at epochs
    1, 3, 9 and so on."""
    folds: int | None = None
    """Cross-validation: train each trial on this many dataset directories, named by `{fold}` in
    data: datasets/fold{fold}; the score is the mean."""
    jobs: int = 1
    """Number of trials at a time; each gets an equal share of the cores and GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        count, kind = self.random, self.kind
        require(bool(self.grid or self.range), "grid", self.grid, "KEY=VALUE,VALUE at least once")
        require(count is None or count >= 1, "random", count, "at least 1, or null")
        alone = count is None or (kind == "random" and self.trials is None)
        require(alone, "random", count, "null with another --sampler, or with --trials")
        text = "none without --random N, or --sampler tpe and --trials N"
        require(not self.range or kind != "grid", "range", self.range, text)
        if kind == "grid":
            require(
                self.trials is None,
                "trials",
                self.trials,
                "null with grid, which tries all combinations combinations",
            )
        else:
            known = self.count is not None and self.count >= 1
            require(known, "trials", self.trials, f"at least 1 with {kind}")
        folds, resume = self.folds, self.resume
        require(folds is None or folds >= 2, "folds", folds, "at least 2, or null")
        require(self.jobs >= 1, "jobs", self.jobs, "at least 1")
        require(resume in ("none", "auto"), "resume", resume, "none or auto")

    @property
    def kind(self) -> str:
        """The sampler, as given or by default."""
        return self.sampler or ("grid" if self.random is None else "random")

    @property
    def count(self) -> int | None:
        """Number of trials to draw."""
        return self.random if self.trials is None else self.trials


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One combination of values."""

    number: int
    """Counted from 1."""
    name: str
    """Of its folder: `002-lr=0.003-mixup=0.2`."""
    values: Values
    parameters: dict[str, Any]
    """The values as optuna has them."""
    runs: tuple[TrainConfig, ...]
    """Its training run, or one for each fold; each has an `out` of its own."""


def recipe(config: TrainConfig) -> Path:
    """The config of a run as a file beside its folder, which the run is started with."""
    return config.out.with_name(config.out.name + ".yaml")


def log_of(config: TrainConfig) -> Path:
    """The log of a run."""
    return config.out.with_name(config.out.name + ".log")


def command(config: TrainConfig, jobs: int = 1) -> list[str]:
    """The command line that trains it, as one of `jobs` runs at a time."""
    call = ["-m", "distcls.train", "--config", str(recipe(config))]
    processes = config.processes or 1
    if jobs > 1:
        cores = str(max(1, available_cores() // (jobs * processes)))
        call += [] if config.threads else ["--threads", cores]
        call += [] if config.loader.workers else ["--loader.workers", cores]
    if processes > 1:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCHER)]
        call = [*launcher, "--num_processes", str(processes), *call]
    return [sys.executable, *call]


def gpus_of(slot: int, jobs: int, processes: int) -> str | None:
    """The GPUs of one of `jobs` trials at a time, for CUDA_VISIBLE_DEVICES; None leaves it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    gpus = list(map(str, range(known))) if given is None else [g for g in given.split(",") if g]
    if jobs == 1 or not gpus:
        return None
    own = (gpus[(slot * processes + place) % len(gpus)] for place in range(processes))
    return ",".join(dict.fromkeys(own))


class SearchSpace:
    """The search space, and the config of every trial in it."""

    def __init__(self, config: SearchConfig) -> None:
        """Raises UsageError for keys and values that cannot be searched."""
        self.config = config
        self.choices = read_grid(config.grid)
        self.ranges = read_ranges(config.range, set(self.choices))
        own = {field.name for field in dataclasses.fields(SearchConfig)}
        own -= {field.name for field in dataclasses.fields(TrainConfig)}
        tree = flatten(yaml.safe_load(dump_yaml(config)))
        self._known = {k: Given(value, "config") for k, value in tree.items() if k not in own}

    def settings(self) -> dict[str, Any]:
        """The settings that a continued search must have in common with the one before: all but
        the number of trials, and how they are run."""
        own = {"grid": self.choices, "range": self.ranges, "folds": self.config.folds}
        values = {key: given.value for key, given in self._known.items() if key not in HOW}
        plain: dict[str, Any] = json.loads(json.dumps({**values, **own}))
        return plain

    def require_same(self, before: dict[str, Any] | None) -> None:
        """Raise UsageError unless `settings` are those of the search before, if there was one."""
        now = self.settings()
        before = now if before is None else before
        for key in {**now, **before}:
            if before.get(key) != now.get(key):
                raise UsageError(
                    f"{key}: {now.get(key)!r} given, but the search in {self.config.out} was "
                    f"begun with {before.get(key)!r}; a continued search keeps its config"
                )

    def sampler(self, number: int) -> BaseSampler:
        """Draws the values of one trial from the scores of those before, by `seed` and number: a
        continued search draws what an unbroken one would have drawn."""
        from optuna.samplers import TPESampler

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # optuna 4 calls constant_liar experimental
            return TPESampler(seed=(self.config.seed + number) % 2**32, constant_liar=True)

    def pruner(self) -> BasePruner:
        """Decides by epoch which trials are not worth finishing."""
        from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

        if self.config.pruner == "median":
            return MedianPruner()
        if self.config.pruner == "none":
            return NopPruner()
        epochs, folds = self.config.epochs, self.config.folds or 1
        known = epochs != "auto" and "epochs" not in {*self.choices, *self.ranges}
        return HyperbandPruner(max_resource=epochs * folds if known else "auto")

    def distributions(self) -> dict[str, BaseDistribution]:
        """The space as optuna takes it; ranges are log-uniform."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        found: dict[str, BaseDistribution] = {
            key: CategoricalDistribution(parts) for key, parts in self.choices.items()
        }
        for key, (low, high) in self.ranges.items():
            if _is_whole(key):
                found[key] = IntDistribution(math.ceil(low), math.floor(high), log=True)
            else:
                found[key] = FloatDistribution(low, high, log=True)
        return found

    def corners(self) -> Iterator[dict[str, Any]]:
        """Every combination of the grid's values and of the ends of the ranges."""
        ends = {
            key: (math.ceil(low), math.floor(high)) if _is_whole(key) else (low, high)
            for key, (low, high) in self.ranges.items()
        }
        values = {**self.choices, **ends}
        for parts in itertools.product(*values.values()):
            yield dict(zip(values, parts, strict=True))

    def draw(self, count: int) -> Iterator[dict[str, Any]]:
        """`count` different random combinations; the first ones are the same for any `count`."""
        import optuna

        possible = math.prod(map(len, self.choices.values())) if not self.ranges else math.inf
        if count > possible:
            raise UsageError(
                f"random: {count} of only {possible} combinations; --grid trains all of them"
            )
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(self.config.seed % 2**32))
        space, found = self.distributions(), list[Values]()
        for _ in range(TRIES * count):
            parameters = study.ask(space).params
            values = self.text(parameters)
            if values not in found:
                found.append(values)
                yield parameters
            if len(found) == count:
                return
        raise UsageError(
            f"random: {count}, but the ranges hold only about {len(found)} combinations"
        )

    def trial(self, number: int, parameters: Mapping[str, Any]) -> Trial:
        """The trial with these values. Raises UsageError if its config is not valid."""
        values = self.text(parameters)
        short = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())
        name = f"{number:03d}-" + re.sub(r"[^\w.=+-]+", "_", short)[:NAME_LETTERS]
        source = f"trial {number:03d}"
        chosen = {key: Given(value, source) for key, value in values.items()}
        out, folds = self.config.out / name, self.config.folds
        runs = [self._run(chosen, out)]
        if folds is not None:
            data = str(runs[0].data)
            if "{fold}" not in data:
                raise UsageError(f"data: {data!r} is not valid, expected a path with {{fold}}")
            for fold in range(1, folds + 1):
                path = Given(data.replace("{fold}", str(fold)), source)
                runs.append(self._run({**chosen, "data": path}, out / f"fold{fold}"))
            del runs[0]
        return Trial(
            number=number,
            name=name,
            values=values,
            parameters=dict(parameters),
            runs=tuple(runs),
        )

    def _run(self, chosen: dict[str, Given], out: Path) -> TrainConfig:
        fixed = {"out": out, "resume": "auto", "json": True, "quiet": False}
        ours = {key: Given(value, "search") for key, value in fixed.items()}
        return build(TrainConfig, self._known, chosen, ours)

    def text(self, parameters: Mapping[str, Any]) -> Values:
        """Values as on the command line: real numbers with four digits, inside their range."""
        found = {}
        for key, value in parameters.items():
            found[key] = str(value)
            if key in self.ranges and not _is_whole(key):
                low, high = self.ranges[key]
                found[key] = f"{min(max(float(f'{value:.4g}'), low), high):g}"
        return found


def plan(space: SearchSpace) -> list[Trial]:
    """All trials of a grid or random search; of tpe, whose values depend on the scores, those at
    the corners of its space, to be checked.

    Every config is built here: raises UsageError for values that are not valid, and for those that
    contradict each other.
    """
    kind, count = space.config.kind, space.config.count
    combinations = space.corners() if kind != "random" else space.draw(count or 0)
    if kind == "tpe":
        combinations = itertools.islice(combinations, MOST_CHECKED)
    return [space.trial(number, parts) for number, parts in enumerate(combinations, 1)]


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
            raise UsageError(f"grid: {key}: {twice} is given twice")
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
            raise UsageError(f"range: {key} is not a number; give its values with --grid {key}=...")
        if _is_whole(key) and math.ceil(span[0]) > math.floor(span[1]):
            raise UsageError(f"range: {text!r} holds no whole number")
        found[key] = span
    return found


def _key_and_rest(
    flag: str, text: str, shape: str, taken: Mapping[str, object] | set[str]
) -> tuple[str, str]:
    name, equals, rest = text.partition("=")
    key = name.strip().replace("-", "_")
    if key in RENAMED:
        log.warn(f"{flag}: {key} is now {RENAMED[key]}; the old name will be removed")
        key = RENAMED[key]
    if not equals or not key or not rest.strip():
        raise UsageError(f"{flag}: {text!r} is not valid, expected {shape}")
    if key not in _types():
        raise UsageError(f"{flag}: unknown key {key!r}{did_you_mean(key, _types())}")
    if key in RESERVED:
        raise UsageError(f"{flag}: {key} cannot be searched: {RESERVED[key]}")
    if key in taken:
        raise UsageError(f"{flag}: {key} is given twice; give all of its values at once")
    return key, rest


def _types() -> dict[str, object]:
    return {leaf.key: leaf.type for leaf in leaves(TrainConfig)}


def _is_whole(key: str) -> bool:
    return float not in members(_types()[key])


def check(trials: list[Trial]) -> None:
    """Raise UsageError for networks and datasets that are not there, before the first trial."""
    from distcls.models.registry import resolve  # loads the libraries' lists of names

    configs = [config for trial in trials for config in trial.runs]
    for name in dict.fromkeys(config.model.name for config in configs):
        resolve(name)
    for data in dict.fromkeys(config.data for config in configs):
        if data.exists() and not is_dataset(data):
            raise UsageError(
                f"data: {data} is not a dataset directory; prepare it once for all trials: "
                f"distcls prepare {data} --out datasets/{data.name}"
            )
        Dataset.open(data)


def require_continuable(config: SearchConfig) -> None:
    """Raise UsageError if `out` holds anything but a search that is to be continued."""
    out = config.out
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / LOCK).exists():
        raise UsageError(f"{out} contains other files; choose another --out")
    if config.resume == "none":
        raise UsageError(
            f"{out} already contains a search; choose another --out, or continue it with "
            "--resume auto"
        )
