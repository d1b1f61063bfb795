"""A search as a user runs it: trials, one that fails, stopped, killed, and gone on with."""

from __future__ import annotations

import csv
import html
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from distcls.commands.report import main as report
from distcls.errors import UsageError
from distcls.launch.search import main
from distcls.model_card import SEARCH_TABLE
from distcls.training.checkpointing import states
from tests.e2e.commands import ROOT, command, run

TINY = [
    *("--model.name", "simple_nn", "--epochs", "2", "--batch-size", "32", "--limit", "100"),
    *("--threads", "1", "--log-every", "1"),
]
Rows = list[dict[str, str]]


def arguments(digits: Path, out: Path, *more: object) -> list[object]:
    return ["--data", digits, "--out", out, *TINY, *more]


def rows(out: Path) -> Rows:
    with (out / SEARCH_TABLE).open(newline="") as handle:
        return list(csv.DictReader(handle))


def start(digits: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments(digits, out, *more), module="launch.search"),
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_training(process: subprocess.Popen[str], folder: Path) -> None:
    """Until the trial in `folder` has a state to go on from."""
    deadline = time.monotonic() + 120
    while not states(folder / "last"):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)


def search(*words: object) -> None:
    """In this process; the trials are processes of their own all the same."""
    main([str(word) for word in words])


def test_trials_are_ranked_and_a_failed_one_is_a_row(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found"
    (tmp_path / "no.pth").write_text("no model")
    flags = ["--grid", f"distill.teacher=null,{tmp_path / 'no.pth'}"]
    search(*arguments(digits, out, *flags, "--json"))
    printed, said = capfd.readouterr()
    table = rows(out)
    good, bad = table
    assert (good["exit_code"], good["error"]) == ("0", "")
    assert (bad["exit_code"], bad["best_score"]) == ("2", "")
    assert bad["error"].startswith("distill.teacher: ")
    history = (out / good["trial"] / "history.csv").read_text().splitlines()
    assert len(history) == 3
    assert float(good["best_score"]) > 0
    assert good["best_epoch"] in ("1", "2")
    assert json.loads(printed) == {"best": good, "trials": table}
    assert "1 of 2 trials failed" in said
    # a page of it, and a line in that of a trial
    report([str(out), "--quiet"])
    page = (out / "report.html").read_text()
    assert f"distcls train --config {out / good['trial'] / 'config.yaml'} --out runs/best" in page
    assert html.escape(bad["error"][:50]) in page
    report([str(out / good["trial"]), "--quiet", "--audit", "false", "--explain", "0"])
    page = (out / good["trial"] / "report.html").read_text()
    assert "This is trial 001 of the search" in page
    # what is there is not written over, and no other search is mixed in
    with pytest.raises(UsageError, match="already contains a search; choose another --out"):
        search(*arguments(digits, out, *flags))
    more = ["--resume", "auto", "--batch-size", "16"]
    with pytest.raises(UsageError, match=r"batch_size: 16 given, but .* begun with 32"):
        search(*arguments(digits, out, *flags, *more))
    with pytest.raises(UsageError, match=r"grid: .* given, but .* a continued search keeps"):
        search(*arguments(digits, out, "--resume", "auto", "--grid", "lr=5"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    with pytest.raises(UsageError, match="photos contains other files"):
        search(*arguments(digits, tmp_path / "photos", *flags))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_search_that_is_ended_goes_on(
    number: signal.Signals, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found"
    flags = ["--grid", "epochs=1,30", "--checkpoint.every-steps", "1"]
    flags += ["--monitor.patience", "none"]
    process = start(digits, out, *flags)
    try:
        wait_until_training(process, out / "002-epochs=30")
    except BaseException:
        process.terminate()
        process.communicate()
        raise
    first = (out / "001-epochs=1" / "metrics.jsonl").stat().st_mtime_ns
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert process.returncode == 75, said
        assert "stopped by SIGTERM in 002-epochs=30; --resume auto continues" in said
        assert len(rows(out)) == 1
    done = run(*arguments(digits, out, *flags, "--resume", "auto"), module="launch.search")
    assert "trial 1 of 2, epochs 1: finished before" in done.stderr
    assert (out / "001-epochs=1" / "metrics.jsonl").stat().st_mtime_ns == first
    assert [row["exit_code"] for row in rows(out)] == ["0", "0"]
    # each epoch once: it went on, and did not begin anew beside a trial that was still running
    text = (out / "002-epochs=30" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    epochs = [line["epoch"] for line in lines if line["kind"] == "epoch"]
    assert epochs == list(range(1, 31))
    assert "resumed from" in (out / "002-epochs=30.log").read_text()
    assert "rank" in done.stdout


@pytest.mark.slow
def test_trials_on_two_processes(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    flags = ["--grid", "lr=1e-3", "--processes", "2"]
    done = run(*arguments(digits, out, *flags), module="launch.search")
    assert [row["exit_code"] for row in rows(out)] == ["0"]
    assert "2 processes" in (out / "001-lr=1e-3.log").read_text()
    assert done.stdout.splitlines()[1].split()[0] == "1"
