"""Running the trials of a search one after the other, each in a process that can be resumed."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from distcls import log
from distcls.config import dump_yaml, flatten
from distcls.errors import Stopped, UsageError
from distcls.files import require_writable, write_text
from distcls.training.signals import StopSignals
from launch.trials import Trial

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
