"""What the folder of a search says of its trials; read as the untrusted files they are."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls import stored
from distcls.errors import UsageError, plain
from distcls.evaluation.metrics import METRICS
from distcls.files import read_bounded
from distcls.launch.search import FIGURES, SETTINGS
from distcls.model_card import SEARCH_TABLE
from distcls.report.runs import CONFIG, HISTORY, read_config, read_history

MOST_BYTES = 1 << 24
"""Of a table."""
MOST_TRIALS = 10_000
MOST_KEYS = 100
LEAST_TO_TELL = 6
"""Trials with a score below which nothing is said of the keys."""
ENOUGH = 20
"""Finished trials from which the others, trained for less, are left out."""
LEVELS = 3
"""Groups of equal size that a number with more than `LEVELS` values is divided into."""
MOST_PAIRED, MORE = 8, 0.1
"""Keys of which two are looked at together, and by how much their share has to exceed the sum."""
DRAWS = 999
"""Permutations of the scores that a key is compared with."""

_number = stored.nothing_or(stored.number(nan=True))
_row = stored.record(
    {
        "trial": stored.FILE_NAME,
        "state": stored.one_of("complete", "pruned", "failed"),
        "best_score": _number,
        "std": _number,
        "best_epoch": stored.text(2000, r"[\d ]*", "epochs"),
        "seconds": stored.nothing_or(stored.number(0, 1e12)),
        "exit_code": stored.text(20),
        "error": stored.text(),
        "values": stored.mapping(stored.text(1000), MOST_KEYS),
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One row of the table, and the epochs of its run."""

    name: str
    """Of its folder; its number comes first."""
    values: dict[str, str]
    state: str
    """complete, pruned or failed."""
    score: float
    """Of its best epoch; not a number for one that failed."""
    std: float | None
    """Of the scores of its folds."""
    best_epoch: str
    """One for each fold."""
    seconds: float | None
    error: str
    folds: tuple[dict[int, float], ...]
    """The score of each epoch, of each fold that has begun; one of a trial without folds."""

    @property
    def number(self) -> str:
        """As its folder is numbered."""
        return self.name.partition("-")[0][:12]

    @property
    def epochs(self) -> int:
        """Epochs trained, in all folds."""
        return sum(map(len, self.folds))

    @functools.cached_property
    def curve(self) -> dict[int, float]:
        """The score of each epoch, the mean of the folds that have it."""
        known = sorted({epoch for fold in self.folds for epoch in fold})
        return {
            epoch: statistics.fmean(fold[epoch] for fold in self.folds if epoch in fold)
            for epoch in known
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trials:
    """A search: its settings, and its trials from the best to the failed ones."""

    folder: Path
    settings: dict[str, Any]
    """Dotted keys of its config; empty where it is not there."""
    metric: str
    """That the trials are ranked by, as in the history's `val_` columns."""
    greatest: bool
    """Whether the greatest is the best."""
    keys: tuple[str, ...]
    trials: tuple[Trial, ...]
    """Complete ones from the best on, then pruned ones, then failed ones."""
    unfinished: int
    """Trials that were begun and have no row: under way, or stopped."""

    def of_state(self, state: str) -> list[Trial]:
        """Those that ended so, in order."""
        return [trial for trial in self.trials if trial.state == state]

    @property
    def scored(self) -> list[Trial]:
        """Those with a score that is a number."""
        return [trial for trial in self.trials if math.isfinite(trial.score)]


def is_search(path: Path) -> bool:
    """Whether this is the folder of a search that has a first result."""
    return path.is_dir() and (path / SEARCH_TABLE).is_file()


def read_trials(folder: Path) -> Trials:
    """Read table, settings and histories of a search. Raises UsageError for a damaged table."""
    rows = _read_table(folder / SEARCH_TABLE)
    names = {str(row["trial"]) for row in rows}
    settings = read_config(folder / SETTINGS)
    if not settings and rows:  # of a version that did not write them
        settings = read_config(folder / f"{rows[0]['trial']}.yaml")
    metric = str(settings.get("monitor.metric") or "top1")
    greatest = _greatest(metric, settings.get("monitor.mode"))
    metric = METRICS.short(metric)
    trials = [_trial(folder, row, f"val_{metric}") for row in rows]
    begun = {path.stem for path in folder.glob("[0-9]*.yaml")}
    return Trials(
        folder=folder,
        settings=settings,
        metric=metric,
        greatest=greatest,
        keys=tuple(rows[0]["values"]) if rows else (),
        trials=tuple(ranked(trials, greatest)),
        unfinished=len(begun - names),
    )


def ranked(trials: Sequence[Trial], greatest: bool) -> list[Trial]:
    """Complete ones from the best on, pruned ones from the best on, failed ones; of equals the
    earlier first."""
    states = ("complete", "pruned", "failed")

    def rank(trial: Trial) -> tuple[int, float]:
        score = -trial.score if greatest else trial.score
        return states.index(trial.state), math.inf if math.isnan(score) else score

    return sorted(trials, key=rank)


def _greatest(metric: str, mode: object) -> bool:
    """A metric of the user's own is not imported for it: greatest, as by default."""
    if mode in ("min", "max"):
        return mode == "max"
    known = metric in METRICS.names()
    return not known or bool(METRICS.find(metric).defaults.get("higher_is_better", True))


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        text = read_bounded(path, MOST_BYTES).decode("utf-8")
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        head = lines[0] if lines else []
        keys = head[1 : -len(FIGURES)]
        listed = head[:1] == ["trial"] and tuple(head[-len(FIGURES) :]) == FIGURES
        stored.require_fit(
            listed, "its first line", head[:20], "trial, keys, " + ", ".join(FIGURES)
        )
        stored.names(MOST_KEYS)(keys, "its keys")
        stored.each(stored.each(stored.text(), len(head), len(head)), MOST_TRIALS)(
            lines[1:], "its rows"
        )
        rows = [_fields(head, keys, cells) for cells in lines[1:]]
        for place, row in enumerate(rows, 1):
            _row(row, f"row {place}")
        stored.names(MOST_TRIALS)([row["trial"] for row in rows], "its trials")
    except (OSError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"{path}: not the table of a search: {reason}") from error
    return rows


def _fields(head: Sequence[str], keys: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = dict(zip(head, cells, strict=True))
    values = {key: row.pop(key) for key in keys}
    for name in ("best_score", "std", "seconds"):
        row[name] = float(row[name]) if row[name] else None
    return {**row, "values": values}


def _trial(folder: Path, row: Mapping[str, Any], column: str) -> Trial:
    run = folder / row["trial"]
    parts = [run] if (run / HISTORY).is_file() else _folds(run)
    score = math.nan if row["best_score"] is None else row["best_score"]
    return Trial(
        name=row["trial"],
        values=row["values"],
        state=row["state"],
        score=math.nan if row["state"] == "failed" else score,
        std=row["std"],
        best_epoch=row["best_epoch"],
        seconds=row["seconds"],
        error=row["error"],
        folds=tuple(scores for part in parts if (scores := _scores(part / HISTORY, column))),
    )


def _folds(run: Path) -> list[Path]:
    found = [part for part in run.glob("fold*") if re.fullmatch(r"fold\d{1,4}", part.name)]
    return sorted(found, key=lambda part: int(part.name[4:]))


def _scores(path: Path, column: str) -> dict[int, float]:
    rows = read_history(path)
    return {int(row["epoch"]): row[column] for row in rows if column in row}


def trial_of(run: Path) -> tuple[Trials, Trial] | None:
    """The search that a run directory is a trial of, or a fold of one, and the trial.

    Raises UsageError for a damaged table.
    """
    run = run.resolve()
    for folder, name in ((run.parent, run.name), (run.parent.parent, run.parent.name)):
        if is_search(folder) and (run / CONFIG).is_file():
            search = read_trials(folder)
            return next(((search, each) for each in search.trials if each.name == name), None)
    return None


# what the trials say of a key


def numbers(trials: Sequence[Trial], key: str) -> list[float] | None:
    """The values of a key as numbers; None if one is none."""
    try:
        found = [float(trial.values[key]) for trial in trials]
    except ValueError:
        return None
    return found if all(map(math.isfinite, found)) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Influence:
    """How far the scores go with the values of one key, or of two together."""

    keys: tuple[str, ...]
    share: float
    """Of the variance of the scores' ranks, 0 to 1, less what as many groups have by chance."""
    p: float
    """Fraction of random assignments of the scores with as large a share."""


def influences(search: Trials) -> list[Influence]:
    """Of each key with more than one value, and of two that say more together than each alone (the
    right learning rate depends on the optimiser), the greatest share first; none of few trials.

    The Kruskal-Wallis statistic by permutation, as an adjusted share of the variance of ranks.
    Where few have finished, pruned trials take part with the score that they had reached.
    """
    finished = [trial for trial in search.scored if trial.state == "complete"]
    trials = finished if len(finished) >= ENOUGH else search.scored
    if len(trials) < LEAST_TO_TELL:
        return []
    scores = np.array([trial.score for trial in trials])
    ranks = np.array([(scores < each).sum() + (scores == each).sum() / 2 for each in scores])
    groups = {key: _groups(trials, key) for key in search.keys}
    groups = {key: each for key, each in groups.items() if 1 < _count(each) < len(trials)}
    found = {key: _influence((key,), each, ranks) for key, each in groups.items()}
    both = []
    for first, second in itertools.combinations(list(groups)[:MOST_PAIRED], 2):
        pair = groups[first] * (groups[second].max() + 1) + groups[second]
        if 2 * _count(pair) <= len(trials):
            together = _influence((first, second), pair, ranks)
            if together.share > found[first].share + found[second].share + MORE:
                both.append(together)
    return sorted([*found.values(), *both], key=lambda each: -each.share)


def _count(groups: NDArray[np.int64]) -> int:
    return len(np.unique(groups))


def _groups(trials: Sequence[Trial], key: str) -> NDArray[np.int64]:
    """The group of each trial, [trials]: its value, or which third of the values it is in."""
    known = numbers(trials, key)
    if known is None or len(set(known)) <= LEVELS:
        return np.unique([trial.values[key] for trial in trials], return_inverse=True)[1]
    bounds = np.quantile(known, np.arange(1, LEVELS) / LEVELS)
    return np.searchsorted(bounds, known, side="left")


def _influence(
    keys: tuple[str, ...], groups: NDArray[np.int64], ranks: NDArray[np.float64]
) -> Influence:
    sizes = np.bincount(groups)
    used, centred = sizes > 0, ranks - ranks.mean()
    total = float((centred**2).sum()) or 1.0

    def share(values: NDArray[np.float64]) -> float:
        sums = np.bincount(groups, values, len(sizes))[used]
        return float((sums**2 / sizes[used]).sum()) / total

    random = np.random.default_rng(0)
    own = share(centred)
    as_large = sum(share(random.permutation(centred)) >= own - 1e-12 for _ in range(DRAWS))
    count, number = len(ranks), int(used.sum())
    adjusted = 1 - (1 - own) * (count - 1) / max(1, count - number)
    return Influence(keys=keys, share=max(0.0, adjusted), p=(1 + as_large) / (1 + DRAWS))


def at_an_end(search: Trials, key: str) -> str:
    """`lowest` or `highest` if the best trial has such a value of the key, among three or more."""
    best = search.of_state("complete")[:1]
    known = numbers(search.scored, key)
    if not best or known is None or len(set(known)) < 3:
        return ""
    own, low, high = float(best[0].values[key]), min(known), max(known)
    if own == 0:
        return ""  # which switches something off
    spaced = sorted(set(known))
    log_wide = low > 0 and len(spaced) > LEVELS
    near = 0.05 * (math.log(high / low) if log_wide else high - low)
    if log_wide:
        own, low, high = math.log(own), math.log(low), math.log(high)
    return "lowest" if own <= low + near else "highest" if own >= high - near else ""


def named(trial: Trial) -> str:
    """Its values in words."""
    return ", ".join(f"{plain(key)} {plain(value)}" for key, value in trial.values.items())
