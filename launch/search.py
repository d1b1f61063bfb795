"""`python -m launch.search --config C --data D --out DIR --grid lr=1e-3,3e-3`: the best values.

Grid search, or with --random N random search: every combination is trained by itself, one after the
other, in DIR/NNN-VALUES, and DIR/search.csv has a row for each. All other options are those of
`distcls train`. The same command with --resume auto goes on where a search was stopped or killed:
finished trials are kept, one that was under way goes on from its last state, and those that failed
are tried again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence

from distcls import log
from distcls.config import parse, repeated
from distcls.data.dataset import Dataset
from distcls.door import run
from distcls.errors import DistclsError, UsageError, require
from distcls.training.config import TrainConfig
from distcls.training.signals import StopSignals
from launch.trial_runs import TABLE, Row, require_same_search, run_trials
from launch.trials import Trial, plan

ABOUT = "Train with every combination of values, or with random ones; all else as distcls train."
OWN = ("grid", "range", "random")
"""Keys that a trial does not have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig(TrainConfig):
    """A training run's keys, which all trials share, and those that are searched."""

    grid: tuple[str, ...] = repeated()
    """Key and the values to try, such as `lr=1e-3,3e-3`; `;` stands between values that hold
    commas. Once for each key."""
    range: tuple[str, ...] = repeated()
    """With random: key and the range to draw from, such as `lr=1e-4..1e-2`; all orders of magnitude
    are equally likely. Once for each key."""
    random: int | None = None
    """Draw so many combinations by `seed` instead of training all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        random = self.random
        require(bool(self.grid or self.range), "grid", self.grid, "KEY=VALUE,VALUE at least once")
        require(random is None or random >= 1, "random", random, "at least 1, or null")
        fits = not self.range or random is not None
        require(fits, "range", self.range, "none without --random N, the number of draws")
        resume = self.resume
        require(resume in ("none", "auto"), "resume", resume, "none or auto: a search has no file")


def main(arguments: Sequence[str]) -> None:
    """Parse, search, print the ranking."""
    prog = "python -m launch.search"
    config = parse(SearchConfig, arguments, prog=prog, about=ABOUT, config=True)
    log.set_quiet(config.quiet)
    if log.world_size() > 1:
        raise UsageError("processes: start the search in one; --processes is how many trials get")
    trials = plan(config, config.grid, config.range, random=config.random, own=OWN)
    check(trials)
    require_same_search(config.out, trials, config.resume)
    with StopSignals() as signals:
        rows = run_trials(config.out, trials, signals)
    ranked = ranking(trials, rows)
    failed = len(trials) - len(ranked)
    if config.json:
        best = ranked[0] if ranked else None
        print(json.dumps({"best": best, "trials": [rows[trial.name] for trial in trials]}))
    else:
        print("\n".join(table(config.monitor.metric, trials, ranked)))
    log.say(f"wrote {config.out / TABLE}")
    if not ranked:
        raise DistclsError(f"all {failed} trials failed; {config.out / TABLE} says why")
    if failed:
        log.warn(f"{failed} of {len(trials)} trials failed; {config.out / TABLE} says why")


def check(trials: list[Trial]) -> None:
    """Raise UsageError for networks and datasets that are not there, before the first trial."""
    from distcls.models.names import resolve  # the libraries' lists of names

    for name in dict.fromkeys(trial.config.model.name for trial in trials):
        resolve(name)
    for data in dict.fromkeys(trial.config.data for trial in trials):
        Dataset.open(data)


def ranking(trials: list[Trial], rows: dict[str, Row]) -> list[Row]:
    """The rows of finished trials, best first; of equal ones the earlier, no number last."""
    finished = [rows[trial.name] for trial in trials if rows[trial.name]["exit_code"] == "0"]
    sign = -1 if trials[0].config.monitor.resolved_mode == "max" else 1

    def place(row: Row) -> float:
        score = float(row["best_score"])
        return math.inf if math.isnan(score) else sign * score

    return sorted(finished, key=place)


def table(metric: str, trials: list[Trial], ranked: list[Row]) -> list[str]:
    """The ranking for people, a line a trial."""
    keys = list(trials[0].values)
    cells = [["rank", metric, "epoch", "seconds", *keys]]
    for place, row in enumerate(ranked, 1):
        score = f"{float(row['best_score']):.5f}"
        values = [row[key] for key in keys]
        cells.append([str(place), score, row["best_epoch"], row["seconds"], *values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


if __name__ == "__main__":
    run(main)
