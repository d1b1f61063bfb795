"""`python -m distcls.launch.search --data D --out DIR --grid lr=1e-3,3e-3`: the best values.

Every trial is an ordinary training run in DIR/NNN-VALUES, started as `distcls train` is, and
DIR/search.csv has a row for each; DIR/search.yaml is the config of the search. optuna draws the
values, decides what to prune, and stores the study in DIR/study.journal, from which `--resume auto`
continues: finished and pruned trials stay as they are, one that was under way resumes from its last
state, failed ones are tried again. `distcls report DIR` makes a page of it.

Starting, stopping and resuming trials is written here, as optuna calls a function, where a trial is
processes that have to be signalled, to save and to resume. Its grid sampler shuffles the grid.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distcls import log
from distcls.cli import run
from distcls.config import Command, dump_yaml
from distcls.data.dataset import Dataset
from distcls.errors import DistclsError, Stopped, UsageError
from distcls.files import require_writable, write_text
from distcls.launch.search_space import (
    LOCK,
    SearchConfig,
    SearchSpace,
    Trial,
    check,
    command,
    gpus_of,
    log_of,
    plan,
    recipe,
    require_continuable,
)
from distcls.model_card import SEARCH_TABLE
from distcls.models.config import AUTO, OFFLINE, SMALLEST_PRETRAINED
from distcls.training.config import GROUPS, TrainConfig
from distcls.training.recipe import MOST_EPOCHS
from distcls.training.signals import StopSignals

if TYPE_CHECKING:
    import optuna

COMMAND = Command(
    options=SearchConfig,
    prog="python -m distcls.launch.search",
    about="Train with every combination of values, or with drawn ones; all else as distcls train.",
    examples=(
        "python -m distcls.launch.search --data datasets/photos --out searches/lr "
        "--grid lr=1e-3,3e-3",
        "python -m distcls.launch.search --data datasets/photos --out searches/20 "
        "--range lr=1e-4..1e-2 --random 20",
    ),
    groups={
        "the search": (
            *("data", "out", "grid", "range", "random", "sampler", "trials", "pruner"),
            *("folds", "jobs", "processes", "resume"),
        ),
        **GROUPS,
    },
    config=True,
)
STUDY, SETTINGS = "study.journal", "search.yaml"
FIGURES = ("state", "best_score", "std", "best_epoch", "seconds", "exit_code", "error")
SAVING = "120"
"""Seconds that the launcher gives its processes to save after a signal to stop."""
POLL = 0.2
"""Seconds between two polls of the trials and of the signals."""

Row = dict[str, str]
"""A row of the table: trial, its values, `FIGURES`."""


def main(arguments: Sequence[str]) -> None:
    """Parse, search, print the ranking."""
    config = COMMAND.parse(arguments)
    log.set_quiet(config.quiet)
    if log.world_size() > 1:
        raise UsageError("processes: start the search in one; --processes is how many trials get")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = SearchSpace(config)
    trials = plan(space)
    check(trials)
    require_continuable(config)
    fetch_weights(trials)
    with StopSignals() as signals, locked(config.out, signals) as lock:
        search = Search(space, [] if config.kind == "tpe" else trials, signals, lock)
        write_text(config.out / SETTINGS, dump_yaml(config))
        rows = search.run()
    ranked = ranking(config, rows)
    if config.json:
        log.print_json({"best": ranked[0] if ranked else None, "trials": rows})
    else:
        print("\n".join(table(config, rows)))
    log.say(f"wrote {config.out / SEARCH_TABLE}")
    failed = sum(row["state"] == "failed" for row in rows)
    if not ranked:
        raise DistclsError(f"all {failed} trials failed; {config.out / SEARCH_TABLE} says why")
    if failed:
        log.warn(f"{failed} of {len(rows)} trials failed; {config.out / SEARCH_TABLE} says why")


def fetch_weights(trials: list[Trial]) -> None:
    """Download the published weights that trials start from, or say that there are none.

    Under `model.pretrained: auto` the trials themselves read the cache only: all of one network
    start alike, whether or not a server can be reached meanwhile.
    """
    configs = [each for trial in trials for each in trial.runs if each.model.pretrained is not None]
    unlike = {(each.model, each.input.size, each.data): each for each in configs}
    for config in unlike.values():
        split = Dataset.open(config.data).split("train")
        size = config.input.size
        if size is None and split.uniform is not None:
            size = split.uniform.shape[1:3]
        if config.model.pretrained == AUTO and size and min(size) < SMALLEST_PRETRAINED:
            continue  # from scratch; known without loading torch
        from distcls.training.inputs import choose_weights

        choose_weights(config, split)


@contextlib.contextmanager
def locked(folder: Path, signals: StopSignals) -> Iterator[int]:
    """Hold the folder for one search; yields a descriptor for its trials to hold it with.

    Where a search was killed and its last trials still run, this waits for them to end. Raises
    Stopped if a signal to stop arrives meanwhile.
    """
    require_writable(folder)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        for attempt in itertools.count():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not attempt:
                    log.say(
                        f"{folder}: another search or one of its trials is still running; waiting"
                    )
            except OSError:
                break  # some network file systems have no locks
            if signals.received is not None:
                raise Stopped(f"stopped by {signals.received.name} before the first trial")
            time.sleep(POLL)
        yield descriptor
    finally:
        os.close(descriptor)


def open_study(space: SearchSpace) -> optuna.Study:
    """The study in the search's folder, new or continued; only one process may have it open.

    A journal file rather than SQLite: it loads no SQL packages (start-up 0.24 s of CPU time against
    0.88 s) and needs no fcntl() locks, which network file systems often lack. Trials that were
    under way when a search was killed are marked failed. Raises UsageError if the search was begun
    with another config.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    config = space.config
    path = config.out / STUDY
    # a search killed while writing leaves a lock, which would be waited for 30 s, and half a line
    Path(f"{path}.lock").unlink(missing_ok=True)
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
        study_name="search",
        direction="minimize" if config.monitor.resolved_mode == "min" else "maximize",
        pruner=space.pruner(),
        load_if_exists=True,
    )
    space.require_same(study.user_attrs.get("settings"))
    study.set_user_attr("settings", space.settings())
    for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.ask()  # enqueued by a search that was killed right then
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


class Process:
    """A training run in one or more processes of its own; the last line it prints is JSON."""

    def __init__(self, config: TrainConfig, call: list[str], lock: int, gpus: str | None) -> None:
        self.config = config
        self._stopped, self._reported = False, 0
        self._files = contextlib.ExitStack()
        self._log = self._files.enter_context(log_of(config).open("ab"))
        self._printed = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._began, self._start = time.monotonic(), self._log.tell()
        visible = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
        if config.model.pretrained == AUTO:
            visible[OFFLINE] = "1"  # `fetch_weights` has decided
        self._process = subprocess.Popen(
            call,
            stdin=subprocess.DEVNULL,
            stdout=self._printed,
            stderr=self._log,
            # Ctrl-C in a terminal reaches the search, which passes one signal on
            start_new_session=True,
            pass_fds=(lock,),
            env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SAVING, **os.environ, **visible},
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()  # a second Ctrl-C exits here
        self._files.close()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Have it save and end, by a single SIGTERM."""
        if not self._stopped and self.poll() is None:
            self._process.terminate()
        self._stopped = True

    def scores(self) -> dict[int, float]:
        """The monitored metric of each finished epoch, counted from 1."""
        name = f"val_{self.config.monitor.figure}"
        return {int(row["epoch"]): float(row[name]) for row in self._history()}

    def _history(self) -> list[dict[str, str]]:
        try:
            text = (self.config.out / "history.csv").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return list(csv.DictReader(io.StringIO(text)))

    def new_scores(self) -> Iterator[tuple[int, float]]:
        """Those of the epochs that were not finished at the last call."""
        for epoch, score in self.scores().items():
            if epoch > self._reported:
                self._reported = epoch
                yield epoch, score

    def result(self) -> dict[str, Any]:
        """The best score, its epoch and the seconds: what it printed, or of the epochs so far."""
        self._printed.seek(0)
        lines = [line for line in self._printed.read().splitlines() if line.startswith(b"{")]
        if lines:
            return dict(json.loads(lines[-1]))
        scores = {str(epoch): score for epoch, score in self.scores().items()}
        best = self.config.monitor.best_of(scores, {}) if scores else ""
        # as a run counts them: without the start of its processes, if it got beyond that
        seconds = math.fsum(float(row.get("seconds", 0)) for row in self._history())
        seconds = seconds or time.monotonic() - self._began
        return {"best_score": scores.get(best, math.nan), "best_epoch": best, "seconds": seconds}

    def error(self) -> str:
        """Why it failed: its error, else the last line of its log."""
        code = self.poll() or 0
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        with log_of(self.config).open("rb") as file:
            file.seek(self._start)
            lines = file.read().decode(errors="replace").splitlines()
        errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
        last = [line.strip() for line in lines if line.strip()]
        return (errors or last or ["it printed nothing"])[-1]


class Search:
    """The trials of a study, at most `jobs` of them under way."""

    def __init__(
        self, space: SearchSpace, planned: list[Trial], signals: StopSignals, lock: int
    ) -> None:
        """`planned` holds all trials, or none where each depends on the scores before it.

        Raises UsageError if the folder holds a search of another config.
        """
        from optuna.trial import TrialState

        self.config = space.config
        self._space, self._signals, self._lock = space, signals, lock
        self._distributions = space.distributions()
        self._study = open_study(space)
        self._count = len(planned) or self.config.count or 0
        self._known = {trial.number: trial.parameters for trial in planned}
        self._rows: dict[int, Row] = {}
        self._finished: set[int] = set()
        self._stopped: list[str] = []
        for each in self._study.get_trials(deepcopy=False):
            number = each.user_attrs.get("number")
            if number is None or not each.params:
                continue  # the search was killed before it had values
            self._known[number] = each.params
            if "row" in each.user_attrs:
                self._rows[number] = each.user_attrs["row"]
            if each.state in (TrialState.COMPLETE, TrialState.PRUNED):
                self._finished.add(number)

    def run(self) -> list[Row]:
        """Train all unfinished trials; the table's rows in order.

        The table is written after each trial. One that fails gets its row, and the next one begins.
        Raises Stopped when a signal has ended those under way and their states are saved.
        """
        waiting = [number for number in range(1, self._count + 1) if number not in self._finished]
        for number in sorted(self._finished):
            trial = self._space.trial(number, self._known[number])
            log.say(f"{self._name(trial)}: finished before, {self._rows[number]['best_score']}")
        active: dict[int, Generator[None, None, None]] = {}
        try:
            while active or (waiting and not self._stopping):
                for slot in range(self.config.jobs):
                    if slot not in active and waiting and not self._stopping:
                        active[slot] = self._trial(waiting.pop(0), slot)
                    if slot in active and next(active[slot], False) is False:
                        del active[slot]
                if active:
                    time.sleep(POLL)
        finally:
            for trial_under_way in active.values():
                trial_under_way.close()
        if self._stopped or waiting:
            cause = self._signals.received.name if self._signals.received else "a signal to a trial"
            where = f" in {', '.join(self._stopped)}" if self._stopped else ""
            raise Stopped(f"stopped by {cause}{where}; --resume auto continues")
        return self._table()

    @property
    def _stopping(self) -> bool:
        return self._signals.received is not None or bool(self._stopped)

    def _trial(self, number: int, slot: int) -> Generator[None, None, None]:
        """Train one, or its folds one after the other; yields while it waits for a process."""
        trial, handle = self._suggest(number)
        log.say(f"{self._name(trial)}: see {log_of(trial.runs[0])}")
        results: list[dict[str, Any]] = []
        code, pruned, error = 0, False, ""
        for config in trial.runs:
            write_text(recipe(config), dump_yaml(config))
            call = command(config, self.config.jobs)
            gpus = gpus_of(slot, self.config.jobs, config.processes or 1)
            with Process(config, call, self._lock, gpus) as process:
                while (found := process.poll()) is None:
                    yield
                    pruned = pruned or self._report(handle, process, results)
                    if pruned or self._stopping:
                        process.stop()
                results.append(process.result())
                code, error = found, process.error() if found else ""
            if code or pruned:
                break
        if code and not pruned and (self._stopping or code == Stopped.exit_code):
            self._stopped.append(trial.name)  # its state in the study stays RUNNING
            return
        pruned = pruned and (code != 0 or len(results) < len(trial.runs))
        state = "pruned" if pruned else "failed" if code else "complete"
        row = _row(trial, state, results, code, "" if pruned else error)
        self._finish(number, handle, row)
        self._say(trial, row)

    def _suggest(self, number: int) -> tuple[Trial, optuna.Trial]:
        """The trial of this number: enqueued where its values are known, else drawn."""
        self._study.sampler = self._space.sampler(number)
        if number in self._known:
            self._study.enqueue_trial(self._known[number], user_attrs={"number": number})
        handle = self._study.ask(self._distributions)
        handle.set_user_attr("number", number)
        return self._space.trial(number, handle.params), handle

    def _report(self, handle: optuna.Trial, process: Process, before: list[dict[str, Any]]) -> bool:
        """Report the epochs that are new, as the mean over the folds so far; whether to prune."""
        means = [result["best_score"] for result in before]
        for epoch, score in process.new_scores():
            if math.isfinite(score):  # pruners take percentiles, which NaN would invalidate
                epochs = process.config.epochs
                step = len(before) * (MOST_EPOCHS if epochs == "auto" else epochs) + epoch
                handle.report(statistics.fmean([*means, score]), step)
                if handle.should_prune():
                    return True
        return False

    def _finish(self, number: int, handle: optuna.Trial, row: Row) -> None:
        from optuna.trial import TrialState

        handle.set_user_attr("row", row)
        if row["state"] == "failed":
            self._study.tell(handle, state=TrialState.FAIL)
        elif row["state"] == "pruned" or not math.isfinite(float(row["best_score"])):
            self._study.tell(handle, state=TrialState.PRUNED)  # optuna takes no NaN
        else:
            self._study.tell(handle, float(row["best_score"]))
        self._rows[number] = row
        write_table(self.config.out, self._table())

    def _table(self) -> list[Row]:
        return [self._rows[number] for number in sorted(self._rows)]

    def _name(self, trial: Trial) -> str:
        values = ", ".join(f"{key} {value}" for key, value in trial.values.items())
        return f"trial {trial.number} of {self._count}, {values}"

    def _say(self, trial: Trial, row: Row) -> None:
        if row["state"] == "failed":
            log.warn(f"{self._name(trial)} failed: {row['error']}")
        else:
            ended = ", pruned" if row["state"] == "pruned" else ""
            best = f"{row['best_score']} in epoch {row['best_epoch']}"
            log.say(f"{self._name(trial)}: {best}{ended}")


def _row(trial: Trial, state: str, results: list[dict[str, Any]], code: int, error: str) -> Row:
    scores = [float(result["best_score"]) for result in results]
    seconds = math.fsum(result["seconds"] for result in results)
    scored = state != "failed"
    return {
        "trial": trial.name,
        **trial.values,
        "state": state,
        "best_score": str(statistics.fmean(scores)) if scored else "",
        "std": f"{statistics.stdev(scores):.6g}" if scored and len(scores) > 1 else "",
        "best_epoch": " ".join(str(result["best_epoch"]) for result in results) if scored else "",
        "seconds": f"{seconds:.1f}",
        "exit_code": str(code),
        "error": error,
    }


def write_table(folder: Path, rows: list[Row]) -> None:
    """Write search.csv atomically: trial, its values, its figures."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / SEARCH_TABLE, text.getvalue())


def ranking(config: SearchConfig, rows: list[Row]) -> list[Row]:
    """The rows of complete trials, best first; of equal ones the earlier, no number last."""
    sign = -1 if config.monitor.resolved_mode == "max" else 1

    def rank(row: Row) -> float:
        score = float(row["best_score"])
        return math.inf if math.isnan(score) else sign * score

    return sorted((row for row in rows if row["state"] == "complete"), key=rank)


def table(config: SearchConfig, rows: list[Row]) -> list[str]:
    """The ranking for people, one line per trial; pruned ones below."""
    columns = ["best_score", *["std"] * (config.folds is not None), "best_epoch", "seconds"]
    keys = [key for key in rows[0] if key not in ("trial", *FIGURES)]
    titles = {"best_score": config.monitor.figure, "best_epoch": "epoch"}
    cells = [["rank", *(titles.get(key, key) for key in columns), *keys]]
    ranked = [(str(place), row) for place, row in enumerate(ranking(config, rows), 1)]
    pruned = [("pruned", row) for row in rows if row["state"] == "pruned"]
    for rank, row in [*ranked, *pruned]:
        shown = {**row, "best_score": f"{float(row['best_score']):.5f}"}
        cells.append([rank, *(shown[key] for key in [*columns, *keys])])
    return log.aligned(cells)


if __name__ == "__main__":
    run(main)
