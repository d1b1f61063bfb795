"""launch/elastic.sh, really run: a process of a training dies, and the run ends as if none had."""

from __future__ import annotations

import contextlib
import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.e2e.commands import ROOT, SMALL

EPOCHS = 4


@contextlib.contextmanager
def started(call: Sequence[object], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Start torchrun; whatever of it is left at the end is killed."""
    process = subprocess.Popen(
        list(map(str, call)),
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONWARNINGS": "ignore"},
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


def epochs(out: Path) -> list[str]:
    """The epochs in history.csv, which is replaced as a whole."""
    path = out / "history.csv"
    table = path.read_text().splitlines() if path.exists() else []
    return [row["epoch"] for row in csv.DictReader(table)]


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_goes_on(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ["--data", digits, "--out", out, *SMALL, "--epochs", EPOCHS]
    environment = {"PROCESSES": "2", "RESTARTS": "1", "PYTHON": sys.executable}
    with started([ROOT / "launch" / "elastic.sh", *more], environment) as torchrun:
        deadline = time.monotonic() + 120
        while not (epochs(out) and any((out / "last").glob("step_*.pth"))):
            assert time.monotonic() < deadline
            assert torchrun.poll() is None
            time.sleep(0.02)
        workers = psutil.Process(torchrun.pid).children(recursive=True)
        [victim] = [worker for worker in workers if rank_of(worker) == "1"]
        victim.kill()
        said = torchrun.communicate(timeout=120)[1]
    assert torchrun.returncode == 0, said
    assert said.count("resumed from") == 1
    assert epochs(out) == [str(epoch + 1) for epoch in range(EPOCHS)]
    assert not [worker for worker in workers if worker.is_running()]
