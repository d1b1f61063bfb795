"""Several processes: one dies, their number changes, they disagree: rows 3 to 6."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest

from distcls.training.checkpointing import newest_intact, states
from tests.faults.conftest import Unbroken
from tests.faults.survival import (
    PLATEAU,
    STEPS,
    assert_bit_equal,
    assert_every_sample_once_an_epoch,
    finish,
    global_batches,
    kill_all,
    start,
    steps_done,
    wait_for,
    workers,
)


@pytest.mark.row(3)
def test_when_one_process_dies_the_others_end(digits: Path, tmp_path: Path) -> None:
    process = start(digits, tmp_path / "run", processes=2, SLOW="0.2")
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, process)
    family = workers(process)
    assert len(family) == 2
    family[1].kill()
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode != 0
    assert "SIGKILL" in said or "Signal 9" in said
    assert "another process has died" in said
    assert "DistclsError" not in said  # a line of its own, no traceback
    assert not [worker for worker in family if worker.is_running()]


@pytest.mark.row(4)
def test_resumed_with_another_number_of_processes(
    unbroken: Unbroken, digits: Path, tmp_path: Path
) -> None:
    processes, _, trace = unbroken
    out, own_trace = tmp_path / "run", tmp_path / "trace"
    own_trace.mkdir()
    process = start(digits, out, processes=processes, TRACE=str(own_trace))
    wait_for(lambda: steps_done(out) >= 5, process)
    kill_all(process)
    finish(start(digits, out, processes=3 - processes, TRACE=str(own_trace)))
    assert_every_sample_once_an_epoch(own_trace)
    assert global_batches(own_trace) == global_batches(trace)


@pytest.mark.row(5)
@pytest.mark.slow
def test_two_jobs_on_one_host(digits: Path, tmp_path: Path) -> None:
    both = [start(digits, tmp_path / name, processes=2) for name in ("one", "other")]
    for process in both:
        finish(process)
    assert_bit_equal(tmp_path / "one", tmp_path / "other")


@pytest.mark.row(6)
@pytest.mark.parametrize(("blind", "epochs"), [(0, 2), pytest.param(1, 4, marks=pytest.mark.slow)])
def test_the_ranks_see_different_scores(
    blind: int, epochs: int, digits: Path, tmp_path: Path
) -> None:
    """The main process's score counts: one that alone sees no progress stops all, or none."""
    out, trace = tmp_path / "run", tmp_path / "trace"
    trace.mkdir()
    more = ("--epochs", "4", "--monitor.patience", "1", "--limit", "100")
    environment = {"BLIND": str(blind), "TRACE": str(trace)}
    said = finish(start(digits, out, *more, processes=2, **environment))
    assert ("stopped early" in said) == (epochs == 2)
    with (out / "history.csv").open(newline="") as handle:
        assert [int(float(row["epoch"])) for row in csv.DictReader(handle)] == list(
            range(1, epochs + 1)
        )
    ends = []
    for rank in (0, 1):
        last = json.loads((trace / f"{rank}.jsonl").read_text().splitlines()[-1])
        ends.append((last["epoch"], last["step"]))
    assert ends[0] == ends[1]
    assert ends[0][0] == epochs - 1
    found = newest_intact(out / "last")
    assert found is not None
    assert found[1]["progress"]["step"] == ends[0][1] + 1


@pytest.mark.slow
@pytest.mark.parametrize(("blind", "factor"), [(0, 0.5), (1, 1.0)])
def test_the_rate_falls_on_the_same_step_everywhere(
    blind: int, factor: float, digits: Path, tmp_path: Path
) -> None:
    """By the main process's score: one that alone sees no progress lowers all rates, or none."""
    trace = tmp_path / "trace"
    trace.mkdir()
    more = (*PLATEAU, "--monitor.min-delta", "0", "--limit", "100")
    environment = {"BLIND": str(blind), "TRACE": str(trace)}
    said = finish(start(digits, tmp_path / "run", *more, processes=2, **environment))
    assert said.count("learning rate reduced to") == (2 if factor < 1 else 0)
    rates = []
    for rank in (0, 1):
        rows = map(json.loads, (trace / f"{rank}.jsonl").read_text().splitlines())
        rates.append({row["step"]: row["lr"] for row in rows})
    assert rates[0] == rates[1]
    assert sorted(rates[0]) == list(range(12))
    assert rates[0][7] == pytest.approx(1e-3)
    assert [rates[0][step] / rates[0][7] for step in range(8, 12)] == pytest.approx([factor] * 4)


@pytest.mark.row(5)
def test_two_runs_in_one_run_directory(digits: Path, tmp_path: Path) -> None:
    """The second one ends at once, on all its processes, and takes nothing from the first."""
    out = tmp_path / "run"
    first = start(digits, out, SLOW="0.2")
    assert wait_for(lambda: steps_done(out) >= 4 and bool(states(out / "last")), first)
    os.kill(first.pid, signal.SIGSTOP)  # so that it cannot end before the others have come
    unfinished = out / "last" / ".step_00000099.0.pth.x.part"  # as the first one's may be
    unfinished.write_bytes(b"half")
    alone, pair = start(digits, out), start(digits, out, processes=2)
    line = f"error: out: another run is writing {out} at this moment; wait for its end, or choose"
    said = finish(alone, code=2)
    assert (said.count(line), said.count("\n")) == (1, 1)
    said = finish(pair, code=1)  # the launcher's
    assert said.count(line) == 2
    assert "resumed from" not in said
    assert unfinished.exists()
    kill_all(first)
    finish(start(digits, out))  # the system has released what the killed run held
    assert steps_done(out) == STEPS
    assert not unfinished.exists()
