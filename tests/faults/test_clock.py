"""A wall clock that jumps by an hour, either way: row 21."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distcls.training.checkpointing import newest_intact, states
from tests.faults.conftest import Unbroken
from tests.faults.survival import (
    assert_bit_equal,
    finish,
    kill_all,
    start,
    steps_done,
    wait_for,
)

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
"""The library of Debian's package faketime."""
HOUR = 3600


def faked(clock: Path) -> dict[str, str]:
    """The environment of a process whose wall clock is as far off as the file says."""
    return {
        "LD_PRELOAD": str(LIBRARIES[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",  # the file is looked at again with every reading of the clock
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_RESET": "1",
        "NO_FAKE_STAT": "1",
        "CLOCK_LOG": str(clock.with_suffix(".log")),
    }


@pytest.mark.row(21)
@pytest.mark.skipif(not LIBRARIES, reason="needs libfaketime (Debian's package faketime)")
@pytest.mark.parametrize(
    "jump",
    [pytest.param(HOUR, id="forward"), pytest.param(-HOUR, id="back")],
)
@pytest.mark.slow
def test_the_clock_jumps_in_a_run_and_before_its_resume(
    jump: int, unbroken_run: Callable[[int], Unbroken], digits: Path, tmp_path: Path
) -> None:
    out, clock = tmp_path / "run", tmp_path / "clock"
    clock.write_text("+0")
    # forward: no state is due for ten minutes; back: one is due every half second
    minutes = "10" if jump > 0 else "0.008"
    every = ("--checkpoint.every-steps", "null", "--checkpoint.every-minutes", minutes)
    process = start(digits, out, *every, processes=1, SLOW="0.3", **faked(clock))
    wait_for(lambda: steps_done(out) >= 2, process)
    clock.write_text(f"{jump:+d}")
    jumped = steps_done(out)
    wait_for(lambda: steps_done(out) >= 6, process)
    within = [path for path in states(out / "last") if jumped + 1 < int(path.name[5:13]) < 7]
    assert bool(within) == (jump < 0)
    wait_for(lambda: steps_done(out) >= 9, process)
    kill_all(process)
    clock.write_text(f"{-jump:+d}")
    finish(start(digits, out, *every, processes=1, **faked(clock)))

    seen = [float(line) for line in clock.with_suffix(".log").read_text().split()]
    assert max(seen) - min(seen) > 2 * HOUR - 600, "the clock has not jumped"
    with (out / "history.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [int(float(row["epoch"])) for row in rows] == [1, 2]
    for row in rows:
        assert 0 < float(row["seconds"]) < HOUR / 2
        assert 0 < float(row["images_per_s"]) < 10_000
        assert 0 <= float(row["data_wait"]) <= 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 15))
    assert all(0 < line["images_per_s"] < 10_000 for line in lines)
    assert_bit_equal(unbroken_run(1)[1], out)


@pytest.mark.row(21)
def test_the_newest_state_is_the_one_of_the_last_step(
    unbroken_run: Callable[[int], Unbroken], tmp_path: Path
) -> None:
    shutil.copytree(unbroken_run(1)[1] / "last", tmp_path / "last")
    newest, *older = states(tmp_path / "last")
    assert older
    now = time.time()
    os.utime(newest, (now - HOUR, now - HOUR))  # written after the clock went back
    for path in older:
        os.utime(path, (now + HOUR, now + HOUR))
    assert states(tmp_path / "last")[0] == newest
    found = newest_intact(tmp_path / "last")
    assert found is not None
    assert found[0] == newest
