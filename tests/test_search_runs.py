"""Searches over a stand-in for training: failed, pruned, stopped, continued, folds, jobs."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from distcls.commands.report import main as report
from distcls.errors import DistclsError, Stopped, UsageError
from distcls.launch import search
from distcls.training.config import TrainConfig

TRAINER = '''
"""Trains nothing: top-1 of epoch e is 1 - |log10(lr) + 2| + e / 100, of fold2 0.1 less."""
import csv, json, math, pathlib, re, signal, sys, time

text = pathlib.Path(sys.argv[1]).read_text()
key = lambda name: re.search(f"^{name}: (.*)$", text, re.M)[1].strip("'")
out, lr, epochs = pathlib.Path(key("out")), float(key("lr")), int(key("epochs"))
out.mkdir(parents=True, exist_ok=True)
with (out / "starts").open("a") as starts:
    starts.write(f"{time.time()} ")
if lr == 5:
    sys.exit("error: no")
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
rows = list(csv.DictReader((out / "history.csv").open())) if (out / "history.csv").exists() else []
rows = [{"epoch": int(row["epoch"]), "val_top1": float(row["val_top1"])} for row in rows]
for epoch in range(len(rows) + 1, epochs + 1):
    score = 1 - abs(math.log10(lr) + 2) + epoch / 100 - 0.1 * key("data").endswith("fold2")
    rows.append({"epoch": epoch, "val_top1": score})
    part = out / "part"
    with part.open("w") as file:
        table = csv.DictWriter(file, ["epoch", "val_top1"])
        table.writeheader()
        table.writerows(rows)
    part.replace(out / "history.csv")
    time.sleep(PACE)
    if told and epoch < epochs:
        sys.exit(75)
with (out / "starts").open("a") as starts:
    starts.write(f"{time.time()}\\n")
best = max(rows, key=lambda row: row["val_top1"])
print(json.dumps({"best_epoch": best["epoch"], "best_score": best["val_top1"], "seconds": 1.0}))
'''


@pytest.fixture
def pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trials run `TRAINER`; returns the file of the seconds that its epochs take."""
    script, seconds = tmp_path / "trainer.py", tmp_path / "pace"
    seconds.write_text("0.01")
    read = f"pathlib.Path({str(seconds)!r}).read_text()"
    script.write_text(TRAINER.replace("PACE", f"float({read})"))

    def command(config: TrainConfig, jobs: int = 1) -> list[str]:
        assert yaml.safe_load(search.recipe(config).read_text())["out"] == str(config.out)
        return [sys.executable, "-S", str(script), str(search.recipe(config))]

    monkeypatch.setattr(search, "command", command)
    monkeypatch.setattr(search, "POLL", 0.01)
    return seconds


@pytest.fixture
def found(digits: Path, tmp_path: Path) -> Path:
    for fold in (1, 2):
        (tmp_path / f"fold{fold}").symlink_to(digits)
    return tmp_path / "found"


def look(found: Path, *flags: str, data: str = "fold1") -> list[dict[str, str]]:
    """Search; the rows of its table."""
    base = ["--data", str(found.parent / data), "--out", str(found), "--quiet", "--epochs", "3"]
    search.main([*base, *flags])
    return rows(found)


def rows(found: Path) -> list[dict[str, str]]:
    with (found / search.SEARCH_TABLE).open(newline="") as handle:
        return list(csv.DictReader(handle))


@contextlib.contextmanager
def told_to_stop_in(folder: Path) -> Iterator[None]:
    """SIGTERM to this process, once the run in `folder` has an epoch behind it."""

    def tell() -> None:
        deadline = time.monotonic() + 30
        while not (folder / "history.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.usefixtures("pace")
def test_a_failed_trial_is_tried_again_and_finished_ones_are_not(found: Path) -> None:
    flags = ["--grid", "lr=0.01,5,0.1"]
    table = look(found, *flags)
    assert [row["state"] for row in table] == ["complete", "failed", "complete"]
    assert (table[1]["exit_code"], table[1]["error"], table[1]["best_score"]) == ("1", "no", "")
    assert float(table[0]["best_score"]) == pytest.approx(1.03)
    before = {path: path.read_text() for path in sorted(found.rglob("starts"))}
    assert look(found, *flags, "--resume", "auto") == [
        {**row, "seconds": after["seconds"]} for row, after in zip(table, rows(found), strict=True)
    ]
    again = [path.parent.name for path, text in before.items() if path.read_text() != text]
    assert again == ["002-lr=5"]
    with pytest.raises(UsageError, match=r"grid: .*'0\.2'.* given, but the search in .* was"):
        look(found, "--grid", "lr=0.01,5,0.2", "--resume", "auto")
    with pytest.raises(UsageError, match=r"epochs: 4 given, .* begun with 3; a continued search"):
        look(found, *flags, "--resume", "auto", "--epochs", "4")
    with pytest.raises(DistclsError, match="all 1 trials failed"):
        look(found.with_name("other"), "--grid", "lr=5")


def test_a_stopped_search_continues_where_it_was(found: Path, pace: Path) -> None:
    flags = ["--grid", "lr=0.01,0.1,1", "--jobs", "2"]
    look(found.with_name("unbroken"), *flags)
    pace.write_text("0.3")
    with told_to_stop_in(found / "002-lr=0.1"), pytest.raises(Stopped) as stopped:
        look(found, *flags)
    assert str(stopped.value).startswith("stopped by SIGTERM in 00")
    assert not (found / "003-lr=1").exists()
    pace.write_text("0.01")
    table = look(found, *flags, "--resume", "auto")
    assert table == rows(found.with_name("unbroken"))
    assert len((found / "002-lr=0.1" / "starts").read_text().split()) == 3  # twice, ended once


def test_tpe_draws_what_an_unbroken_search_would_have_drawn(found: Path, pace: Path) -> None:
    flags = ["--sampler", "tpe", "--trials", "15", "--range", "lr=1e-6..1"]
    unbroken = found.with_name("unbroken")
    table = look(unbroken, *flags)
    rates = [float(row["lr"]) for row in table]
    assert len(set(rates)) == 15
    assert min(rates) >= 1e-6
    assert max(rates) <= 1
    near = [0.5e-2 < rate < 2e-2 or 1e-3 < rate < 1e-1 for rate in rates]
    assert sum(near[10:]) > sum(near[:10]) / 2  # ten are drawn evenly, then near the best
    twelfth = next(unbroken.glob("012-*/history.csv")).parent.name
    pace.write_text("0.3")
    for path in unbroken.iterdir():  # the first eleven are quick
        if path.is_dir() and path.name < "012":
            (found / path.name).mkdir(parents=True)
            (found / path.name / "history.csv").write_bytes((path / "history.csv").read_bytes())
    (found / ".lock").touch()
    with told_to_stop_in(found / twelfth), pytest.raises(Stopped):
        look(found, *flags, "--resume", "auto")
    assert len(rows(found)) == 11
    pace.write_text("0.01")
    again = look(found, *flags, "--resume", "auto")
    assert [row["lr"] for row in again] == [row["lr"] for row in table]


def test_pruned_trials_are_marked_and_left_alone(found: Path, pace: Path) -> None:
    flags = ["--grid", "lr=0.01,1e-5,0.011,1e-6", "--pruner", "hyperband", "--epochs", "9"]
    pace.write_text("0.1")
    table = look(found, *flags)
    assert [row["state"] for row in table[:3:2]] == ["complete"] * 2
    pruned = table[3]  # in the first of hyperband's brackets; the second one is in the last
    assert pruned["state"] == "pruned"
    assert (pruned["exit_code"], pruned["error"]) == ("75", "")
    history = (found / pruned["trial"] / "history.csv").read_text().splitlines()
    assert 2 <= len(history) < 10
    assert float(pruned["best_score"]) == pytest.approx(float(history[-1].split(",")[1]))
    before = (found / pruned["trial"] / "starts").read_text()
    assert look(found, *flags, "--resume", "auto") == table
    assert (found / pruned["trial"] / "starts").read_text() == before


def test_the_median_pruner_waits_for_five(found: Path, pace: Path) -> None:
    pace.write_text("0.1")
    rates = "0.01,0.012,0.014,0.016,1e-6,1e-5,0.011"
    table = look(found, "--grid", f"lr={rates}", "--pruner", "median")
    assert [row["state"] for row in table] == [*["complete"] * 5, "pruned", "complete"]
    report([str(found), "--quiet"])
    told = (found / "report.html").read_text()
    assert "a trial is stopped when its best score so far is below the median" in told
    assert f"--config {found}/search.yaml --resume auto" in told
    settings = yaml.safe_load((found / search.SETTINGS).read_text())
    assert settings["grid"] == [f"lr={rates}"]
    words = ["--config", str(found / search.SETTINGS), "--quiet", "--resume", "auto"]
    search.main(words)
    assert rows(found) == table


@pytest.mark.usefixtures("pace")
def test_folds_are_trained_one_after_the_other(
    found: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = look(found, "--grid", "lr=0.1,0.01", "--folds", "2", data="fold{fold}")
    assert [float(row["best_score"]) for row in table] == pytest.approx([-0.02, 0.98])
    assert [float(row["std"]) for row in table] == pytest.approx([0.0707107] * 2)
    assert [row["best_epoch"] for row in table] == ["3 3", "3 3"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["rank", "top1", "std", "epoch", "seconds", "lr"]
    assert printed[1].split() == ["1", "0.98000", "0.0707107", "3", "3", "2.0", "0.01"]
    first = [float(word) for word in (found / "001-lr=0.1/fold1/starts").read_text().split()]
    second = [float(word) for word in (found / "001-lr=0.1/fold2/starts").read_text().split()]
    assert first[1] <= second[0]


def test_jobs_run_at_the_same_time(found: Path, pace: Path) -> None:
    pace.write_text("0.3")
    look(found, "--grid", "lr=0.1,0.01,1", "--jobs", "2")
    spans = [
        [float(word) for word in path.read_text().split()] for path in sorted(found.rglob("starts"))
    ]
    assert spans[1][0] < spans[0][1]
    assert spans[2][0] > min(spans[0][1], spans[1][1])


@pytest.mark.usefixtures("pace")
def test_a_study_that_was_cut_off_while_it_was_written(found: Path) -> None:
    table = look(found, "--grid", "lr=0.1,0.01")
    with (found / search.STUDY).open("a") as journal:
        journal.write('{"op_code": 4, "half')
    Path(f"{found / search.STUDY}.lock").symlink_to("gone")
    assert look(found, "--grid", "lr=0.1,0.01", "--resume", "auto") == table


@pytest.mark.usefixtures("pace")
def test_json_holds_the_best_and_all(found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = look(found, "--grid", "lr=0.1,0.01", "--json")
    assert json.loads(capsys.readouterr().out) == {"best": table[1], "trials": table}
