"""Signals that ask a run to leave, once and twice: rows 6, 10 and 11."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from distcls.training.checkpointing import newest_intact
from tests.faults.conftest import Unbroken
from tests.faults.survival import (
    STEPS,
    assert_bit_equal,
    finish,
    global_batches,
    half_written,
    start,
    steps_done,
    wait_for,
    workers,
)


@pytest.mark.row(10)
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_leaves(number: signal.Signals, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(digits, out, "--checkpoint.every-steps", "1000", SLOW="0.1")
    wait_for(lambda: steps_done(out) >= 3, process)
    process.send_signal(number)
    said = finish(process, code=75)
    assert f"stopped by {number.name} after step" in said
    assert "--resume auto continues" in said
    assert "Traceback" not in said
    found = newest_intact(out / "last")
    assert found is not None
    assert 3 <= found[1]["progress"]["step"] < STEPS


@pytest.mark.row(6, 10)
def test_a_signal_to_one_process_stops_all_at_one_step(
    unbroken_run: Callable[[int], Unbroken], digits: Path, tmp_path: Path
) -> None:
    _, reference, trace = unbroken_run(2)
    out, own_trace = tmp_path / "run", tmp_path / "trace"
    own_trace.mkdir()
    process = start(digits, out, processes=2, TRACE=str(own_trace), SLOW="0.1")
    wait_for(lambda: steps_done(out) >= 2, process)
    workers(process)[1].send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode != 0
    found = newest_intact(out / "last")
    assert found is not None
    assert found[1]["progress"]["step"] < STEPS
    finish(start(digits, out, processes=2, TRACE=str(own_trace)))
    assert_bit_equal(reference, out)
    assert global_batches(own_trace) == global_batches(trace)


@pytest.mark.row(11)
@pytest.mark.slow
def test_more_signals_during_the_save(unbroken: Unbroken, digits: Path, tmp_path: Path) -> None:
    processes, reference, _ = unbroken
    out = tmp_path / "run"
    every = ("--checkpoint.every-steps", "1000")
    process = start(digits, out, *every, processes=processes, SLOW="0.1", SLOW_SAVE="3")
    wait_for(lambda: steps_done(out) >= 2, process)
    family = [process] if processes == 1 else workers(process)
    assert not half_written(out)
    for worker in family:  # to each of them, as a scheduler does
        worker.send_signal(signal.SIGTERM)
    assert wait_for(lambda: bool(half_written(out)), process)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        for worker in family:
            worker.send_signal(number)
    assert half_written(out), "the save was over before the second signal came"
    _, said = process.communicate(timeout=60)
    # several processes are started by a launcher, which has a code of its own
    assert process.returncode == 75 if processes == 1 else process.returncode != 0
    assert "--resume auto continues" in said
    assert not half_written(out)
    found = newest_intact(out / "last")
    assert found is not None
    assert 2 <= found[1]["progress"]["step"] < STEPS
    assert [path.name for path in (out / "last").iterdir()] == [found[0].name]
    finish(start(digits, out, processes=processes))
    assert_bit_equal(reference, out)
