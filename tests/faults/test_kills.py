"""Runs that are killed, and go on as if nothing had been: rows 1, 2 and 9.

KILLS=50 python -m pytest tests/faults/test_kills.py -s     the large number of repetitions
"""

from __future__ import annotations

import csv
import functools
import os
import random
import shutil
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
    half_written,
    kill_all,
    start,
    steps_done,
    wait_for,
    weights,
)

KILLS = int(os.environ.get("KILLS", "2"))
"""Times a run is killed before it may finish."""


def reached(out: Path, step: int) -> bool:
    return steps_done(out) >= step


def saved(out: Path, step: int) -> bool:
    """Whether there is a state of that step or a later one."""
    return any(int(path.name[5:13]) >= step for path in states(out / "last"))


def rates(out: Path) -> list[float]:
    """The learning rate at the end of each epoch."""
    with (out / "history.csv").open(newline="") as handle:
        return [float(row["lr"]) for row in csv.DictReader(handle)]


def fallen(out: Path) -> dict[str, int]:
    """What plateau remembers in the newest state."""
    found = newest_intact(out / "last")
    assert found is not None
    schedule: dict[str, int] = found[1]["tensors"]["schedule"]
    return schedule


def writes_another(out: Path, before: list[Path]) -> bool:
    """Whether a state is being written now, beside a whole one and what earlier kills have left."""
    return bool(states(out / "last") and set(half_written(out)) - set(before))


@pytest.mark.row(1)
def test_killed_at_random_steps_it_ends_with_the_same_weights(
    unbroken: Unbroken, digits: Path, tmp_path: Path
) -> None:
    processes, reference, trace = unbroken
    rng = random.Random(0)
    out, own_trace = tmp_path / "run", tmp_path / "trace"
    own_trace.mkdir()
    for number in range(KILLS):
        if steps_done(out) >= STEPS:  # the next life
            finish(start(digits, out, processes=processes, TRACE=str(own_trace)))
            assert_bit_equal(reference, out)
            shutil.rmtree(out)
        target = rng.randint(steps_done(out) + 1, STEPS)
        process = start(digits, out, processes=processes, TRACE=str(own_trace))
        wait_for(functools.partial(reached, out, target), process)
        kill_all(process)
        print(f"kill {number + 1}: aimed at step {target}, hit after step {steps_done(out)}")
    finish(start(digits, out, processes=processes, TRACE=str(own_trace)))
    assert_bit_equal(reference, out)
    assert_every_sample_once_an_epoch(own_trace)
    assert global_batches(own_trace) == global_batches(trace)


@pytest.mark.row(1)
@pytest.mark.slow  # tests/test_resume_options.py has it without the kills
@pytest.mark.parametrize("processes", [1, 2])
def test_plateau_remembers_what_it_has_seen(processes: int, digits: Path, tmp_path: Path) -> None:
    """Killed while it waits, in the second epoch, and after the rate has fallen, in the third."""
    reference, out = tmp_path / "unbroken", tmp_path / "run"
    finish(start(digits, reference, *PLATEAU, processes=processes))
    assert rates(reference) == pytest.approx([1e-3, 1e-3, 5e-4])
    for step, falls in ((9, 0), (15, 1)):
        process = start(digits, out, *PLATEAU, processes=processes, SLOW="0.05")
        wait_for(functools.partial(saved, out, step), process)
        kill_all(process)
        assert steps_done(out) < 21
        assert fallen(out) == {"falls": falls, "waited": 0}
    finish(start(digits, out, *PLATEAU, processes=processes))
    assert rates(out) == rates(reference)
    assert fallen(out) == fallen(reference) == {"falls": 2, "waited": 0}
    assert any(name.startswith("/average/") for name in weights(out))
    assert_bit_equal(reference, out)


@pytest.mark.row(2)
def test_no_half_state_is_ever_taken(digits: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    out = tmp_path / "run"
    hits = 0
    for number in range(KILLS):
        before = half_written(out)
        process = start(digits, out, "--checkpoint.every-steps", "1", SLOW_SAVE="0.3")
        if wait_for(functools.partial(writes_another, out, before), process):
            time.sleep(rng.uniform(0, 0.3))
        kill_all(process)
        hits += bool(set(half_written(out)) - set(before))
        found = newest_intact(out / "last")
        assert found is not None
        assert found[0] == states(out / "last")[0]  # none is damaged
        print(f"kill {number + 1}: {len(half_written(out))} half, step {steps_done(out)}")
        if steps_done(out) >= STEPS:
            shutil.rmtree(out)
    print(f"{hits} of {KILLS} kills met a state being written")
    assert hits
    finish(start(digits, out, "--checkpoint.every-steps", "1"))
    assert not half_written(out)


@pytest.mark.row(9)
@pytest.mark.parametrize(
    "damage",
    ["flipped bit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cut", "empty"))],
)
def test_a_damaged_state_falls_back_to_the_one_before(
    damage: str, unbroken: Unbroken, digits: Path, tmp_path: Path
) -> None:
    processes, reference, _ = unbroken
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    newest = states(out / "last")[0]
    data = bytearray(newest.read_bytes())
    if damage == "flipped bit":
        data[len(data) // 3] ^= 16
    else:
        data = data[: len(data) // 2 if damage == "cut" else 0]
    newest.write_bytes(data)
    said = finish(start(digits, out, processes=processes))
    assert f"{newest} is damaged" in said
    assert_bit_equal(reference, out)
