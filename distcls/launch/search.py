"""`python -m launch.search --config C --data D --out DIR --grid lr=1e-3,3e-3`: the best values.

Grid search, or with --random N random search: every combination is trained by itself, one after the
other, in DIR/NNN-VALUES, and DIR/search.csv has a row for each. All other options are those of
`distcls train`. The same command with --resume auto goes on where a search was stopped or killed:
finished trials are kept, one that was under way goes on from its last state, and those that failed
are tried again.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from distcls import log
from distcls.cli import run
from distcls.config import build, dump_yaml, flatten, leaves, parse, repeated
from distcls.config.load import Given
from distcls.config.schema import members
from distcls.data.dataset import Dataset
from distcls.errors import DistclsError, Stopped, UsageError, did_you_mean, require
from distcls.files import require_writable, write_text
from distcls.training.config import TrainConfig
from distcls.training.signals import StopSignals

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


TABLE, LOCK = "search.csv", ".lock"
FIGURES = ("best_score", "best_epoch", "seconds", "exit_code", "error")
LAUNCHER = Path(__file__).parent / "two_cpu_processes.yaml"
"""Starts any number of processes on one machine, on GPUs where there are some."""
SAVING = "120"
"""Seconds that the launcher gives its processes to save when it is told to stop."""
LOOK_EVERY = 0.5
"""Seconds between two looks at whether the search has been told to stop."""

Row = dict[str, str]


def require_same_search(folder: Path, trials: list[Trial], resume: str) -> None:
    """Raise UsageError if `folder` holds anything but the beginning of this search."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / LOCK).exists():
        raise UsageError(f"{folder} holds other files; choose another --out")
    if resume == "none":
        raise UsageError(
            f"{folder} holds a search already; choose another --out, or continue it with "
            "--resume auto"
        )
    recipes = {trial.recipe: trial for trial in trials}
    for path in sorted(folder.glob("[0-9][0-9][0-9]*-*.yaml")):
        if path not in recipes:
            raise UsageError(
                f"{path.stem}: in {folder}, but not among these trials; a continued search keeps "
                "its values"
            )
        before, now = (
            flatten(yaml.safe_load(text))
            for text in (path.read_text(encoding="utf-8"), dump_yaml(recipes[path].config))
        )
        for key in {**now, **before}:
            if before.get(key) != now.get(key):
                raise UsageError(
                    f"{key}: {now.get(key)!r} given, but {path} was written with "
                    f"{before.get(key)!r}; a continued search keeps its config"
                )


@contextlib.contextmanager
def locked(folder: Path, signals: StopSignals) -> Iterator[int]:
    """Hold the folder for one search; yields a descriptor for its trials to hold it with.

    Where a search was killed and its last trial goes on, this waits for the trial to end. Raises
    Stopped if it is told to stop meanwhile.
    """
    require_writable(folder)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        waits = False
        while not _lock(descriptor):
            if not waits:
                log.say(f"{folder}: another search, or a trial of one, is at work; waiting for it")
            waits = True
            if signals.received is not None:
                raise Stopped(f"stopped by {signals.received.name} before the first trial")
            time.sleep(LOOK_EVERY)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        pass
    return True


def run_trials(folder: Path, trials: list[Trial], signals: StopSignals) -> dict[str, Row]:
    """Train what is not finished yet; the table's rows by name.

    The table is written after each trial. One that fails gets its row, and the next one begins.
    Raises Stopped when a signal has ended the trial under way and its state is saved.
    """
    with locked(folder, signals) as lock:
        rows = read_table(folder)
        for trial in trials:
            what = f"trial {trial.number} of {len(trials)}, {_words(trial)}"
            if rows.get(trial.name, {}).get("exit_code") == "0":
                log.say(f"{what}: finished before, {rows[trial.name]['best_score']}")
                continue
            if signals.received is not None:
                raise Stopped(f"stopped by {signals.received.name}; --resume auto continues")
            log.say(f"{what}: see {trial.log}")
            figures = run_trial(trial, signals, lock)
            rows[trial.name] = {"trial": trial.name, **trial.values, **figures}
            write_table(folder, [rows[each.name] for each in trials if each.name in rows])
            if figures["exit_code"] == "0":
                log.say(f"{what}: {figures['best_score']} in epoch {figures['best_epoch']}")
            else:
                log.warn(f"{what} failed: {figures['error']}")
    return rows


def run_trial(trial: Trial, signals: StopSignals, lock: int) -> Row:
    """Train one; its figures for the table. Raises Stopped if it was told to stop and did."""
    write_text(trial.recipe, dump_yaml(trial.config))
    began = time.monotonic()
    with trial.log.open("ab") as said, tempfile.TemporaryFile() as answer:
        start = said.tell()
        process = subprocess.Popen(
            command(trial),
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=said,
            # Ctrl-C in a terminal reaches the search, which passes one signal on
            start_new_session=True,
            pass_fds=(lock,),
            env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SAVING, **os.environ},
        )
        code = _wait(process, signals)
        result = _result(answer)
    if code != 0 and (signals.received is not None or code == Stopped.exit_code):
        cause = signals.received.name if signals.received else "a signal to its trial"
        raise Stopped(f"stopped by {cause} in {trial.name}; --resume auto continues")
    return {
        "best_score": str(result.get("best_score", "nan")) if code == 0 else "",
        "best_epoch": str(result.get("best_epoch", "")) if code == 0 else "",
        "seconds": f"{result.get('seconds', time.monotonic() - began):.1f}",
        "exit_code": str(code),
        "error": "" if code == 0 else _reason(trial.log, start, code),
    }


def command(trial: Trial) -> list[str]:
    """What a user would type to train it."""
    call = ["-m", "distcls.train", "--config", str(trial.recipe)]
    processes = trial.config.processes or 1
    if processes > 1:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCHER)]
        call = [*launcher, "--num_processes", str(processes), *call]
    return [sys.executable, *call]


def _wait(process: subprocess.Popen[bytes], signals: StopSignals) -> int:
    """Its exit code; a signal to stop is passed on once."""
    asked = False
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(LOOK_EVERY)
            if signals.received is not None and not asked:
                process.terminate()
                asked = True
    finally:  # a second Ctrl-C leaves from here
        if process.poll() is None:
            process.terminate()


def _result(answer: IO[bytes]) -> dict[str, Any]:
    """The JSON object that a finished run has printed last."""
    answer.seek(0)
    lines = [line for line in answer.read().splitlines() if line.startswith(b"{")]
    return dict(json.loads(lines[-1])) if lines else {}


def _reason(path: Path, start: int, code: int) -> str:
    """Why a trial failed: its error, else its last word."""
    with path.open("rb") as handle:
        handle.seek(start)
        said = handle.read().decode(errors="replace").splitlines()
    errors = [line.partition("error: ")[2] for line in said if "error: " in line]
    last = [line.strip() for line in said if line.strip()]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return (errors or last or ["it said nothing"])[-1]


def _words(trial: Trial) -> str:
    return ", ".join(f"{key} {value}" for key, value in trial.values.items())


def read_table(folder: Path) -> dict[str, Row]:
    """The rows of an earlier search by name; none if there was none."""
    path = folder / TABLE
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as handle:
        return {row["trial"]: row for row in csv.DictReader(handle)}


def write_table(folder: Path, rows: list[Row]) -> None:
    """Write search.csv atomically: trial, its values, its figures."""
    keys = [key for key in rows[0] if key not in ("trial", *FIGURES)]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["trial", *keys, *FIGURES], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / TABLE, table.getvalue())


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
    from distcls.models.registry import resolve  # the libraries' lists of names

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
